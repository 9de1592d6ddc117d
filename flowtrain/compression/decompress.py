"""An archive that is opened, verified and unpacked."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel, load_model
from flowtrain.compression import format as archive
from flowtrain.compression.codec import Codec, model_hash, probe, versions
from flowtrain.compression.streams import Progress, decode_stream, in_threads, one_thread, words_of
from flowtrain.errors import UserError, short


class Opened:
    """An archive that has been read and verified. Raises `UserError` where it is damaged or
    none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.description, self.parts = archive.unpack(path, data)
        self.names = self.description.files
        self.levels = self.description.levels
        self.streams = self.description.streams

    def load(self, given: str | None, trust_code: bool) -> LoadedModel:
        """The model: the one given, else the embedded one, else the one at the path where it was.

        Raises `UserError` where it is not there, or is not the one that the images were coded with.
        """
        wanted = self.description.model
        assert wanted is not None  # there are streams
        if given is None and wanted.embedded:
            model = self._embedded_model(trust_code)
        else:
            if given is None and not Path(wanted.path).is_file():
                raise UserError(
                    f"{self.path}: it needs the model {wanted.hash[:16]}, which was {wanted.path}: "
                    "say where it is with --model"
                )
            model = load_model(
                given or wanted.path, torch.device("cpu"), wanted.weights, trust_code
            )
        found = model_hash(model)
        if found != wanted.hash:
            raise UserError(
                f"{self.path}: it was coded with the model {wanted.hash[:16]}, {wanted.weights} "
                f"weights; "
                f"{model.checkpoint.path} is another one, {found[:16]}: say where it is with "
                f"--model"
            )
        if (tuple(model.flow.shape), model.flow.levels) != (self.description.shape, self.levels):
            raise UserError(
                f"{self.path}: not a valid archive: its images are not of its model's shape and "
                f"levels"
            )
        return model

    def _embedded_model(self, trust_code: bool) -> LoadedModel:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embedded.safetensors"
            path.write_bytes(self.parts[-1])
            try:
                return load_model(str(path), torch.device("cpu"), "raw", trust_code)
            except (MemoryError, OSError):
                raise
            except Exception as error:  # its checksum may be right, and its content anything
                raise UserError(
                    f"{self.path}: the model in it cannot be loaded ({short(error)})"
                ) from None

    def images(
        self, model: LoadedModel | None, progress: Progress = lambda done, total: None
    ) -> Tensor:
        """All images, uint8 `(N, C, H, W)`, checked one by one. `model` is needed if there are
        streams.

        Raises `UserError` where this machine computes other numbers than the one that wrote the
        archive.
        """
        described = self.description
        checksums = np.frombuffer(self.parts[0], "<u4").tolist()
        stored = self._stored()
        found = torch.empty(described.images, *described.shape, dtype=torch.uint8)
        if described.stored:
            found[described.stored] = stored
        if self.streams:
            assert model is not None
            others = sorted(set(range(described.images)) - set(described.stored))
            found[others] = self._decoded(model, progress)
        wrong = [
            i
            for i, (image, known) in enumerate(zip(found, checksums, strict=True))
            if archive.checksum(image) != known
        ]
        if wrong:
            raise self._irreproducible(
                f"{len(wrong)} of {len(found)} images do not match their checksums"
            )
        if self.levels < 256 and (found >= self.levels).any():
            raise UserError(
                f"{self.path}: not a valid archive: it has values that are not in "
                f"0..{self.levels - 1}"
            )
        return found

    def _stored(self) -> Tensor:
        described = self.description
        try:
            return torch.cat(
                [
                    torch.empty(0, *described.shape, dtype=torch.uint8),
                    *(
                        archive.unstrip(data, described.shape, count)
                        for data, count in zip(self.parts[1:], described.strips, strict=False)
                    ),
                ]
            )
        except MemoryError:
            raise
        except Exception as error:  # bytes that are no picture make Pillow raise almost anything
            raise UserError(
                f"{self.path}: an image that is stored in it cannot be read ({short(error)})"
            ) from None

    def _decoded(self, model: LoadedModel, progress: Progress) -> Tensor:
        first = 1 + len(self.description.strips)
        try:
            with one_thread():
                codec = Codec(model.flow)
                if probe(codec) != self.description.probe:
                    raise self._irreproducible("the model computes other numbers here")
            tasks = [
                functools.partial(decode_stream, codec, words_of(data), described)
                for data, described in zip(self.parts[first:], self.streams, strict=False)
            ]
            return torch.cat(
                in_threads(tasks, sum(stream.images for stream in self.streams), progress)
            )
        except (MemoryError, UserError):
            raise
        # the coder and Pillow raise almost anything for bits that mean nothing
        except Exception as error:
            raise self._irreproducible(short(error)) from error

    def _irreproducible(self, why: str) -> UserError:
        wrote = self.description.versions
        here = versions()
        differing = [
            f"{name} {wrote[name]}, here {here.get(name)}"
            for name in wrote
            if wrote[name] != here.get(name)
        ]
        return UserError(
            f"{self.path}: this machine does not reproduce the numbers of the one that wrote it "
            f"({why}"
            + "".join(f"; written with {text}" for text in differing)
            + "): nothing is written; use the versions and the kind of machine that wrote it"
        )
