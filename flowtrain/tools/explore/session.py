"""What the page on a model shows, computed from what it asks for. No web, no state of a tab."""

import base64
import hashlib
import io
import logging
import math
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.bijections.inverses import MatchingInverse
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.datasets.base import decoded, picture
from flowtrain.errors import RunError, UserError, short, shown
from flowtrain.flow.class_prior import ClassContext, ClassPrior
from flowtrain.flow.inputs import quantize
from flowtrain.flow.passes import ALIVE, fitting_batch_size, largest_activation
from flowtrain.latents import directions
from flowtrain.latents.files import Latents, npz
from flowtrain.latents.nearest import CHUNK, nearest_images
from flowtrain.latents.paths import slerp
from flowtrain.pictures import grid
from flowtrain.pictures.lossless import picture_of
from flowtrain.system.console import console
from flowtrain.system.random import Stream, generator, uniform
from flowtrain.tools.explore import asked
from flowtrain.tools.explore.accounts import account
from flowtrain.tools.explore.asked import Refused
from flowtrain.tools.explore.background import Background, coded, share_below
from flowtrain.tools.explore.edits import (
    Stoppable,
    along_attribute,
    by_level,
    levels_of,
    mixed,
    towards_class,
)
from flowtrain.tools.ood.ood import complexity_corrected, typicality

Check = Callable[[], None]
Answer = dict[str, Any]  # what becomes JSON

NEAREST = 8  # training images
KEPT = 64  # latents of sources, and images at places, that are kept
UPLOADS = 64  # images of the user that are kept
LARGEST_FILE = 32 * 2**20  # bytes of an image file
BYTES_OF_COMPARED = 32  # of a pixel of a training image, in float64 and twice in between
BYTES_OF_PIXEL = 16  # of an image file, while it is decoded, converted and resized


class Session:
    """A model, its data, and what is known of them. Its methods are called by one thread.

    `check`, an argument of what takes long, raises an exception where the answer is no longer
    wanted. Methods raise `Refused` for what cannot be answered.

    Args:
        model: The model, of images.
        word: The word of a command line that means the model.
        data: Gives the model's data, and may raise `UserError` or `RunError`.
        memory: Bytes that a request may allocate.
        options: What a command line needs beside `word` to mean these weights.

    Raises:
        UserError: for a model of real values, or where an image does not fit into `memory`.
    """

    def __init__(
        self,
        model: LoadedModel,
        word: str,
        data: Callable[[], DataSet],
        memory: int,
        options: Sequence[str] = (),
    ):
        self.flow, self.word, self.memory, self.options = model.flow, word, memory, options
        self.model = model
        flow = self.flow
        self.levels = levels_of(flow)
        self.q = flow.kind.require_levels(
            f"{model.checkpoint.path}: a model of points, and the explorer shows images; "
            f"flowtrain sample draws points and their density"
        )
        # Layers, and the image in its forms: levels, 8 bits, a file, and its text in JSON.
        self.bytes_of_image = ALIVE * largest_activation(flow) + 16 * flow.dims + 1024
        if self.bytes_of_image > memory:
            raise UserError(
                f"--max-memory: one image of this model takes "
                f"{self.bytes_of_image / 2**20:,.0f} MiB, more than {memory / 2**20:,.0f}"
            )
        self.at_a_time = min(fitting_batch_size(flow), memory // self.bytes_of_image)
        self.largest_count = min(1024, memory // (4 * self.bytes_of_kept))
        try:
            self.attributes = directions.existing(model)
        except UserError as error:
            self.attributes = {}
            console.print(f"{error}; the page is without them")
        self._read_data = data
        self.data: Background | str = "the data are being read"
        self._latents: OrderedDict[str, Tensor] = OrderedDict()
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        self._uploads: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # of `_uploads`

    @property
    def bytes_of_kept(self) -> int:
        """Bytes of an image and its latent, in the forms in which an answer has them."""
        return 4 * 2 * self.flow.latent_dims + 8 * self.flow.dims + 1024

    # --- data -------------------------------------------------------------------------------------

    def read_data(self) -> None:
        """Reads the data, or finds out why there are none. Any thread may call it."""
        try:
            data = self._read_data()
            data.require(self.flow.shape, self.flow.levels, self.model.checkpoint.path)
            self.data = Background(self.flow, self.levels, data, self.memory // 8, self.at_a_time)
        except Exception as error:
            self._without_data(error)

    def _without_data(self, error: Exception) -> None:
        why = short(error)
        if not isinstance(error, UserError | RunError | OSError):
            logging.getLogger("flowtrain").error("explore: %s", error, exc_info=error)
            why = f"flowtrain failed ({type(error).__name__})"
        self.data = f"there are no test or training images: {why}"

    def idle(self, check: Check) -> bool:
        """Does a part of what is computed while no request waits. Returns whether there is more."""
        try:
            return isinstance(self.data, Background) and self.data.step(check)
        except Refused:
            raise
        except Exception as error:
            self._without_data(error)
            return False

    def known(self) -> Background:
        """What is known of the data. Raises `Refused` where there are none."""
        if isinstance(self.data, str):
            raise Refused(self.data)
        return self.data

    # --- the model --------------------------------------------------------------------------------

    def describe(self) -> Answer:
        """What the page has to know of the model."""
        flow, data = self.flow, self.data
        known = data if isinstance(data, Background) else None
        return {
            "model": self.word,
            "shape": list(flow.shape),
            "levels": [
                {"words": level.words, "entries": level.where.stop - level.where.start}
                for level in self.levels
            ],
            "grey": self.q,
            "classes": flow.classes,
            "moves_classes": isinstance(flow.class_prior, ClassPrior),
            "sequential": flow.bijection.inverse_is_sequential,
            "exact": flow.exact,
            "bound": flow.kind.bound,
            "unit": flow.kind.unit,
            "parameters": sum(p.numel() for p in flow.parameters()),
            "dataset": self.model.config.data.name,
            "largest_count": self.largest_count,
            "largest_file": self.largest_file,
            "data": data if isinstance(data, str) else None,
            "test": 0 if known is None else len(known.test),
            "train": 0 if known is None else len(known.train),
            "progress": 0.0 if known is None else known.progress,
            "principal": []
            if known is None
            else [len(each.deviations) for each in known.components],
            "attributes": [
                {"name": each.name, "accuracy": each.accuracy} for each in self.attributes.values()
            ],
        }

    # --- images of the user -----------------------------------------------------------------------

    @property
    def largest_file(self) -> int:
        """Bytes of a file that may be dropped in."""
        return min(LARGEST_FILE, self.memory // 4)

    def upload(self, data: bytes) -> Answer:
        """Takes an image file, brings it to the model's shape and levels, and says how.

        Its size is compared with the memory before a pixel is decoded. Raises `Refused` where it
        is too large, or no image.
        """
        policy = self.model.config.data.resize_policy
        channels, height, width = self.flow.shape
        try:
            with picture(data) as image:
                size, mode = image.size, image.mode
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            raise Refused(f"the file cannot be read as an image ({short(error)})") from None
        if size[0] * size[1] * BYTES_OF_PIXEL > self.memory:
            raise Refused(
                f"the image has {size[0]:,} x {size[1]:,} pixels, too many for --max-memory"
            )
        pixels = decoded(data, self.flow.shape, policy)
        if isinstance(pixels, str):
            raise Refused(f"the file cannot be read as an image ({pixels})")
        x = torch.from_numpy(quantize(pixels, self.q))
        name = hashlib.blake2b(x.numpy().tobytes(), digest_size=16).hexdigest()
        with self._lock:
            self._uploads[name] = x
            self._uploads.move_to_end(name)
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)
        said = [f"{size[0]} x {size[1]} pixels"]
        if size[0] * height != size[1] * width:
            said.append("stretched" if policy == "stretch" else "cut to the largest centred part")
        if size != (width, height):
            said.append(f"resized to {width} x {height}")
        if channels == 1 and mode not in ("L", "1"):
            said.append("turned grey")
        if self.q != 256:
            said.append(f"reduced to {self.q} levels")
        return {"id": name, "image": self.url(x), "said": ", ".join(said)}

    # --- latents ----------------------------------------------------------------------------------

    def given(self, source: asked.Test | asked.Upload) -> Tensor:
        """The image `(1, C, H, W)` of a source that is an image."""
        if isinstance(source, asked.Test):
            test = self.known().test
            if source.index >= len(test):
                raise Refused(f"there are {len(test)} test images, none with index {source.index}")
            return test.take(slice(source.index, source.index + 1))
        with self._lock:
            if source.id not in self._uploads:
                raise Refused("this image is no longer there: drop it in again")
            return self._uploads[source.id][None]

    def latent_of(self, source: asked.Source, check: Check) -> Tensor:
        """The latent `(1, D)` of a source, from which `decode` without a label gives its image.

        Where networks see the class, a sample was drawn with it, so its latent is that of an image.
        """
        key = source.model_dump_json()
        if key not in self._latents:
            seen = isinstance(self.flow.class_prior, ClassContext)
            if isinstance(source, asked.Sample) and not seen:
                z = self.drawn(source, source.index, 1)[0]
            else:
                x = self.image(asked.Place(source=source), check)
                z = self.flow.encode(x, Stoppable(check, MatchingInverse(lambda share: check())))
            self._keep(self._latents, key, z)
        self._latents.move_to_end(key)
        return self._latents[key]

    def _keep(self, kept: OrderedDict[str, Tensor], key: str, value: Tensor) -> None:
        kept[key] = value
        while len(kept) > min(KEPT, self.largest_count):
            kept.popitem(last=False)

    def drawn(
        self, asked_for: asked.Sample | asked.Samples, start: int, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Latents `(count, D)` of samples of a seed, with their labels."""
        flow = self.flow
        temperatures = asked_for.temperatures
        if len(temperatures) != len(self.levels):
            raise Refused(f"temperatures: {len(temperatures)}, for {len(self.levels)} levels")
        self.require_count(start + count)
        label = asked_for.label
        if label is not None and label >= flow.classes:
            raise Refused(f"label: {label}, and the model has {flow.classes} classes")
        noise = flow.draw_latents(start + count, generator(asked_for.seed, Stream.LATENTS))
        noise = noise[start:] * by_level(self.levels, temperatures).to(noise)
        if not flow.classes:
            return noise, None
        labels = (
            torch.arange(start, start + count) % flow.classes
            if label is None
            else torch.full((count,), label)
        )
        return flow.latents_of_classes(noise, labels), labels

    def require_count(self, count: int) -> None:
        if count > self.largest_count:
            raise Refused(f"{count:,} images are too many: at most {self.largest_count:,}")

    def latent(self, place: asked.Place, check: Check) -> Tensor:
        """The latent `(1, D)` of a place."""
        z = self.latent_of(place.source, check)
        if place.other is not None:
            other = self.latent_of(place.other, check)
            if place.way:
                z = slerp(z[0], other[0], torch.tensor([place.way]).to(z))
            if any(place.from_other):
                if len(place.from_other) != len(self.levels):
                    raise Refused(
                        f"from_other: {len(place.from_other)}, for {len(self.levels)} levels"
                    )
                z = mixed(z, other, self.levels, place.from_other)
        if place.to_class is not None:
            prior, label = self.flow.class_prior, place.to_class.label
            if not isinstance(prior, ClassPrior) or label >= prior.classes:
                raise Refused(f"to_class.label: {label}, and the model has no such class prior")
            z = towards_class(prior, z, label, place.to_class.amount)
        return self.moved(z, place)

    def moved(self, z: Tensor, place: asked.Place) -> Tensor:
        z = z.clone()
        for move in place.principal:
            found = self.known().components
            if move.level >= len(found) or move.component >= len(found[move.level].deviations):
                raise Refused(
                    f"principal: level {move.level}, direction {move.component} is not there (yet)"
                )
            each = found[move.level]
            step = move.amount * each.deviations[move.component] * each.directions[move.component]
            z[:, self.levels[move.level].where] += step.to(z)
        for attribute in place.attributes:
            if attribute.name not in self.attributes:
                raise Refused(f"attributes: the model has no attribute {shown(attribute.name)}")
            z = along_attribute(z, self.attributes[attribute.name], attribute.amount)
        return z

    def image(self, place: asked.Place, check: Check) -> Tensor:
        """The image `(1, C, H, W)` at a place.

        An image of the data that nothing was done to is itself. Facts and neighbours follow an
        image that was shown, so it is kept.
        """
        key = place.model_dump_json()
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        source = place.source
        if place != asked.Place(source=source):
            x = self.decode(self.latent(place, check), check)
        elif isinstance(source, asked.Sample):
            z, labels = self.drawn(source, source.index, 1)
            x = self.decode(z, check, labels)
        else:
            return self.given(source)
        self._keep(self._images, key, x)
        return x

    def decode(self, z: Tensor, check: Check, labels: Tensor | None = None) -> Tensor:
        """Latents `(B, D)` as images on the CPU, as many at a time as fit into the memory."""
        parts = z.split(self.at_a_time)
        of_parts = [None] * len(parts) if labels is None else labels.split(self.at_a_time)
        executor = Stoppable(check)
        try:
            images = [
                self.flow.decode(part, of_part, executor).cpu()
                for part, of_part in zip(parts, of_parts, strict=True)
            ]
        except FloatingPointError:
            raise Refused("the image is not finite: this place is too far out") from None
        return torch.cat(images)

    # --- answers ----------------------------------------------------------------------------------

    def samples(self, request: asked.Samples, check: Check) -> Answer:
        z, labels = self.drawn(request, request.start, request.count)
        x = self.decode(z, check, labels)
        for index, image in enumerate(x, request.start):
            source = asked.Sample(
                kind="sample",
                seed=request.seed,
                index=index,
                temperatures=request.temperatures,
                label=request.label,
            )
            key = asked.Place(source=source).model_dump_json()
            self._keep(self._images, key, image[None].clone())
        return {
            "images": [self.url(each) for each in x],
            "command": self.sampling(request, request.start + request.count),
        }

    def tests(self, request: asked.Tests, check: Check) -> Answer:
        self.require_count(request.count)
        test = self.known().test
        x = test.take(slice(request.start, request.start + request.count))
        return {"images": [self.url(each) for each in x]}

    def show(self, request: asked.Show, check: Check) -> Answer:
        return {
            "image": self.url(self.image(request.place, check)[0]),
            "command": self.command("decode", "latent.npz", "--out", "images"),
        }

    def facts(self, request: asked.Show, check: Check) -> Answer:
        """What the model says about an image."""
        x = self.image(request.place, check)
        source = request.place.source
        first = source.index if isinstance(source, asked.Test) else 0
        x = x.to(self.flow.device)
        noise = uniform(x.shape, 0, Stream.EVALUATION, first, 0, x.device)
        found = account(self.flow, x, noise, check)
        if not math.isfinite(found.total):
            raise Refused("the likelihood of this image is not finite")
        parts = [
            {
                "name": f"{size[0]} x {size[1]}",
                "loss": each.mean().item(),
                "size": list(size),
                "values": packed(each),
            }
            for size, each in found.places.items()
        ]
        whole = found.map if found.places else None
        of_class = found.of_class
        return {
            "loss": found.total,
            "map": None
            if whole is None
            else {"size": list(whole.shape), "values": packed(whole), "loss": whole.mean().item()},
            "levels": parts,
            "noise": found.noise,
            "class": None
            if of_class is None
            else {
                "label": of_class.label,
                "probability": of_class.probability,
                "loss": of_class.loss,
            },
            "scores": self.scores(found.total, x.cpu()),
        }

    def scores(self, loss: float, x: Tensor) -> list[Answer]:
        """The scores of an image, and the share of test images that have smaller ones."""
        if isinstance(self.data, str):
            return []
        known, entropy = self.data, self.data.entropy
        of_test = known.scores
        code = coded(self.flow, x.numpy())
        value, all_of_test = np.array([loss]), of_test.loss
        rows = [("likelihood", value, all_of_test)]
        if entropy is not None:
            rows.append(
                ("typicality", typicality(value, entropy), typicality(all_of_test, entropy))
            )
        rows.append(
            (
                "complexity_corrected",
                complexity_corrected(value, code),
                complexity_corrected(all_of_test, of_test.complexity),
            )
        )
        return [
            {
                "name": name,
                "value": float(own[0]),
                "below": share_below(others, float(own[0])),
                "of": len(others),
                "entropy": entropy,
            }
            for name, own, others in rows
        ]

    def neighbours(self, request: asked.Neighbours, check: Check) -> Answer:
        """The nearest training images, of all by their pixels, or of those encoded by latents."""
        known = self.known()
        x = self.image(request.place, check)
        if request.by == "pixels":
            distances, where = nearest_images(
                x, known.train, self.q, NEAREST, check, min(CHUNK, self.memory // BYTES_OF_COMPARED)
            )
            found = known.train.take(where[0].numpy())
            compared = len(known.train)
        else:
            compared = len(known.latents)
            if not compared:
                raise Refused("no training image is encoded yet")
            z = self.latent(request.place, check)
            every = (known.latents - z.cpu()).square().mean(dim=1).sqrt()
            distances, where = (
                each[None] for each in every.topk(min(NEAREST, compared), largest=False)
            )
            found = known.images[where[0]]
        return {
            "images": [self.url(each) for each in found],
            "distances": distances[0].tolist(),
            "indices": where[0].tolist(),
            "compared": compared,
        }

    # --- files ------------------------------------------------------------------------------------

    def png(self, request: asked.Show, check: Check) -> bytes:
        x = self.image(request.place, check)
        return grid.png(grid.grid(x, self.q, 1))

    def latent_file(self, request: asked.Show, check: Check) -> bytes:
        """The latent of a place, as `flowtrain decode` reads it."""
        z = self.latent(request.place, check)
        return npz(Latents(z.cpu().float(), ["image"]), self.model)

    def gif(self, request: asked.Animation, check: Check) -> bytes:
        """The path from a source to another, there and back."""
        place, steps = request.place, request.steps
        if place.other is None:
            raise Refused("a path needs a second image")
        self.require_count(8 * steps)  # frames are enlarged
        a, b = (self.latent_of(each, check)[0] for each in (place.source, place.other))
        x = self.decode(slerp(a, b, torch.linspace(0, 1, steps).to(a)), check)
        frames = [
            Image.fromarray(grid.grid(each[None], self.q, 1).movedim(0, -1).contiguous().numpy())
            for each in x
        ]
        return grid.gif(frames + frames[-2:0:-1])

    # --- commands ---------------------------------------------------------------------------------

    def sampling(self, request: asked.Samples | asked.Sample, count: int) -> str | None:
        """The command that draws the same samples. There is none for several temperatures."""
        if len(set(request.temperatures)) > 1:
            return None
        words = ["--num-images", str(count)]
        words += ["--temperature", f"{request.temperatures[0]:g}", "--seed", str(request.seed)]
        if request.label is not None:
            words += ["--classes", str(request.label)]
        return self.command("sample", *words)

    def command(self, name: str, *words: str) -> str:
        """A command on the model. `decode` makes the image of a latent that was saved."""
        return shlex.join(["flowtrain", name, self.word, *words, *self.options])

    # --- pictures ---------------------------------------------------------------------------------

    def url(self, x: Tensor) -> str:
        """An image `(C, H, W)` as a PNG in a data URL."""
        buffer = io.BytesIO()
        picture_of(grid.to_8bit(x, self.q).numpy()).save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def packed(values: Tensor) -> str:
    """Numbers as little-endian float32 in base64, row by row."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
