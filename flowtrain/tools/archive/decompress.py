"""An archive that is opened, verified and unpacked."""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowtrain.bijections.orders import turn_each
from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import LoadedModel, load_model, model_hash
from flowtrain.errors import UserError, cut, short
from flowtrain.system import capacity
from flowtrain.system.console import silent
from flowtrain.system.files import content_of
from flowtrain.system.threads import one_thread
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.codec import Coder, coder_of
from flowtrain.tools.archive.stack import words_of
from flowtrain.tools.archive.streams import decode_stream
from flowtrain.tools.archive.strips import unstrip
from flowtrain.tools.archive.threads import Progress, Tick, in_threads

CPU = torch.device("cpu")


class Opened:
    """An archive that has been read and verified. Raises `UserError` as `format.unpack` does.

    `memory` is the limit in bytes, by default a quarter of the machine's memory.
    """

    def __init__(self, path: Path, memory: int | None = None):
        self.path = path
        memory = capacity.total() // 4 if memory is None else memory
        data = content_of(path, memory)
        self.description, self.parts = archive.unpack(path, data, memory)
        self.names = self.description.files
        self.num_bins = self.description.levels
        self.streams = self.description.streams
        if self.streams:
            identity = self.parts[0][-archive.IDENTITY.size :]
            hashed, self.probe = archive.IDENTITY.unpack(identity)
            self.hash = hashed.hex()

    def load(self, given: str | None, trust_code: bool) -> LoadedModel | None:
        """The model: the given one, else the embedded one, else the one at its old path.

        None if no image needs it. Raises `UserError` if it is missing, or another one.
        """
        wanted = self.description.model
        if wanted is None:
            return None
        if given is None and wanted.embedded:
            model = self._embedded_model(trust_code)
        else:
            if given is None and not _is_there(wanted.path):
                raise UserError(
                    f"{self.path}: it needs the model {self.hash}, which was "
                    f"{cut(wanted.path)}: give its path by --model"
                )
            # A model that was pushed has the averaged weights alone, as raw ones.
            weights = None if wanted.weights == "ema" else "raw"
            model = load_model(given or wanted.path, CPU, weights, trust_code)
        found = model_hash(model)[: archive.HASH_DIGITS]
        if found != self.hash:
            raise UserError(
                f"{self.path}: it was coded with the model {self.hash}, "
                f"{wanted.weights} weights; {model.checkpoint.path} is another one, "
                f"{found}: give its path by --model"
            )
        if (tuple(model.flow.shape), model.flow.num_bins) != (
            self.description.shape,
            self.num_bins,
        ):
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
                return load_model(str(path), CPU, "raw", trust_code)
            except (MemoryError, OSError):
                raise
            except Exception as error:  # its checksum may be right, and its content anything
                raise UserError(
                    f"{self.path}: the model in it cannot be loaded ({short(error)})"
                ) from None

    def images(self, model: LoadedModel | None, progress: Progress = silent) -> Tensor:
        """All images, uint8 `(N, C, H, W)`, checked one by one. `model` is the result of `load`.

        Raises `UserError` if this machine computes other numbers than the archive's writer.
        """
        described = self.description
        number = -(-described.images // described.checked)
        checksums = np.frombuffer(self.parts[0], "<u4", count=number).tolist()
        found = torch.empty(described.images, *described.shape, dtype=torch.uint8)
        packed = self.parts[0][4 * number :][: described.side_bytes]
        sides = archive.unpacked_sides(packed, described.sides, len(found))
        self._read_stored(found)
        if self.streams:
            assert model is not None
            self._decode(found, sides, model, progress)
        turn_each(found, sides, back=True)
        pairs = zip(found.split(described.checked), checksums, strict=True)
        wrong = sum(len(part) for part, known in pairs if archive.checksum(part) != known)
        if wrong:
            raise self._irreproducible(
                f"{wrong} of {len(found)} images do not match their checksums"
            )
        if self.num_bins < 256 and any((image >= self.num_bins).any() for image in found):
            raise UserError(
                f"{self.path}: not a valid archive: it has values that are not in "
                f"0..{self.num_bins - 1}"
            )
        return found

    def _read_stored(self, found: Tensor) -> None:
        """Writes the images of the strips to their places in `found`, strip by strip."""
        stored, first = self.description.stored, 0
        try:
            for data, count in zip(self.parts[1:], self.description.strips, strict=False):
                images = torch.empty(count, *self.description.shape, dtype=torch.uint8)
                unstrip(data, images)
                found[stored[first : first + count]] = images
                first += count
        except MemoryError:
            raise
        except Exception as error:  # bytes that are no picture make Pillow raise almost anything
            raise UserError(
                f"{self.path}: an image that is stored in it cannot be read ({short(error)})"
            ) from None

    def _decode(self, found: Tensor, sides: Tensor, model: LoadedModel, progress: Progress) -> None:
        """Writes the images of the streams to their places in `found`."""

        def decode(places: list[int], coder: Coder, index: int, tick: Tick) -> None:
            words = words_of(self.parts[first + index])
            found[places] = decode_stream(coder, words, self.streams[index], tick, sides[places])

        first = 1 + len(self.description.strips)
        stored = set(self.description.stored)
        others = [i for i in range(len(found)) if i not in stored]
        try:
            with one_thread():
                coder = coder_of(model.flow)
                if coder.probe() != self.probe:
                    raise self._irreproducible("the model computes other numbers here")
            tasks = []
            for index, described in enumerate(self.streams):
                places, others = others[: described.images], others[described.images :]
                tasks.append(functools.partial(decode, places, coder, index))
            in_threads(tasks, sum(stream.images for stream in self.streams), progress)
        except (MemoryError, UserError):
            raise
        # The coder and Pillow raise almost anything for meaningless bits.
        except Exception as error:
            raise self._irreproducible(short(error)) from error

    def _irreproducible(self, why: str) -> UserError:
        here = archive.versions()
        differing = [
            f"; written with {cut(name, 20)} {cut(version, 20)}, here {here.get(name)}"
            for name, version in self.description.versions.items()
            if version != here.get(name)
        ]
        return UserError(
            f"{self.path}: this machine does not reproduce the numbers of the one that wrote it "
            f"({why}{''.join(differing)}): nothing is written; use the versions and the kind of "
            f"machine that wrote it"
        )


def _is_there(model: str) -> bool:
    return os.path.isfile(model) or model in zoo.names()  # noqa: PTH113 (never raises)
