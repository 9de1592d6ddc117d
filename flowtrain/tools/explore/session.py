"""A model, its data, and latents and images for requests. No web, no state of a tab."""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from PIL.ExifTags import Base
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
from flowtrain.latents.paths import slerp
from flowtrain.system.console import console
from flowtrain.system.random import Stream, generator
from flowtrain.tools.explore import requests
from flowtrain.tools.explore.background import Background
from flowtrain.tools.explore.edits import (
    Stoppable,
    along_attribute,
    levels_of,
    mixed,
    towards_class,
)
from flowtrain.tools.explore.requests import Refused
from flowtrain.tools.explore.worker import Check, keep

KEPT = 64  # latents of sources, and images at places, that are kept
UPLOADS = 64  # images of the user that are kept
LARGEST_FILE = 32 * 2**20  # bytes of an image file
READING = "the data are being read"
LONGEST_REASON = 1000  # characters of a message, which may have long paths
BYTES_OF_PIXEL = 16  # of an image file, while it is decoded, converted and resized


class Session:
    """A model, its data and their statistics. Its methods are called by one thread.

    `check`, an argument of slow methods, raises an exception if the result is no longer wanted.
    Methods raise `Refused` for a request that cannot be served.

    Args:
        model: The model, of images.
        word: The model as a word of a command line.
        data: Gives the model's data, and may raise `UserError` or `RunError`.
        memory: Bytes that a request may allocate.
        options: The options of a command line that select these weights, beside `word`.

    Raises:
        UserError: for a model of real values, or if an image does not fit into `memory`.
    """

    def __init__(
        self,
        model: LoadedModel,
        word: str,
        data: Callable[[], DataSet],
        memory: int,
        options: Sequence[str] = (),
    ):
        self.model, self.word, self.memory, self.options = model, word, memory, options
        self.flow = flow = model.flow
        self.levels = levels_of(flow)
        self.q = flow.kind.require_bins(
            f"{model.checkpoint.path}: a model of points, and the explorer shows images; "
            f"flowtrain sample draws points and their density"
        )
        # Layers, and the image in its forms: levels, 8 bits, a file, and its text in JSON.
        of_image = ALIVE * largest_activation(flow) + 16 * flow.dims + 1024
        if of_image > memory:
            raise UserError(
                f"--max-memory: one image of this model takes {of_image / 2**20:,.0f} MiB, more "
                f"than {memory / 2**20:,.0f}"
            )
        self.at_a_time = min(fitting_batch_size(flow), memory // of_image)
        # An image and its latent, in their forms in a response.
        of_kept = 4 * 2 * flow.latent_dims + 8 * flow.dims + 1024
        self.largest_count = min(1024, memory // (4 * of_kept))
        self.largest_file = min(LARGEST_FILE, memory // 4)  # bytes of a file that is dropped in
        try:
            self.attributes = directions.existing(model)
        except UserError as error:
            self.attributes = {}
            console.print(f"{error}; the page is without them")
        self._read_data = data
        self.data: Background | str = READING
        self.waits = False  # for `read_data` with `download`
        self._latents: OrderedDict[str, Tensor] = OrderedDict()
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        self._uploads: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()  # of `_uploads`

    def read_data(self, download: bool = False) -> None:
        """Reads the data, or the reason why there are none. Any thread may call it.

        Data that have to be downloaded or decoded first wait for a call with `download`.
        """
        try:
            data = self._read_data()
            data.require(self.flow.shape, self.flow.num_bins, self.model.checkpoint.path)
            here = data.train_images.at_hand() and data.test_images.at_hand()
            if not (here or download):
                root = data.config.root.expanduser().resolve()
                self.waits = True
                self.data = (
                    f"the images of {data.config.name} are not ready: they have to be downloaded "
                    f"to {root}, or decoded once"
                )
                return
            self.data = Background(self.flow, self.levels, data, self.memory // 8, self.at_a_time)
        except Exception as error:
            self._without_data(error)

    def _without_data(self, error: Exception) -> None:
        why = short(error, LONGEST_REASON)
        if not isinstance(error, UserError | RunError | OSError):
            logging.getLogger("flowtrain").error("explore: %s", error, exc_info=error)
            why = f"flowtrain failed ({type(error).__name__})"
        self.data = f"there are no test or training images: {why}"

    def idle(self, check: Check) -> bool:
        """Does a part of the work without a request. Returns whether there is more."""
        try:
            return isinstance(self.data, Background) and self.data.step(check)
        except Refused:
            raise
        except Exception as error:
            self._without_data(error)
            return False

    def background(self) -> Background:
        """The data and their statistics. Raises `Refused` if there are no data."""
        if isinstance(self.data, str):
            raise Refused(self.data)
        return self.data

    def upload(self, data: bytes) -> tuple[str, Tensor, str]:
        """Converts an image file to the model's shape and levels. Any thread may call it.

        Returns its id, the image `(C, H, W)`, and the conversion in words. Raises `Refused` for a
        damaged file, and for an image too large for the memory, before a pixel is decoded.
        """
        policy = self.model.config.data.resize_policy
        channels, height, width = self.flow.shape
        try:
            with picture(data) as image:
                size, mode = image.size, image.mode
                fits = size[0] * size[1] * BYTES_OF_PIXEL <= self.memory
                # The orientation may come after the pixels, which are then decoded.
                if fits and image.getexif().get(Base.Orientation, 1) > 4:  # a quarter turn
                    size = size[1], size[0]
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            raise Refused(f"the file cannot be read as an image ({short(error)})") from None
        if not fits:
            raise Refused(
                f"the image has {size[0]:,} x {size[1]:,} pixels, too many for --max-memory"
            )
        pixels = decoded(data, self.flow.shape, policy)
        if isinstance(pixels, str):
            raise Refused(f"the file cannot be read as an image ({pixels})")
        x = torch.from_numpy(quantize(pixels, self.q))
        name = hashlib.blake2b(x.numpy().tobytes(), digest_size=16).hexdigest()
        with self._lock:
            keep(self._uploads, name, x, UPLOADS)
        words = [f"{size[0]} x {size[1]} pixels"]
        if size[0] * height != size[1] * width:
            words.append("stretched" if policy == "stretch" else "cropped to the centre")
        if size != (width, height):
            words.append(f"resized to {width} x {height}")
        if channels == 1 and mode not in ("L", "1"):
            words.append("made grey")
        if self.q != 256:
            words.append(f"reduced to {self.q} levels")
        return name, x, ", ".join(words)

    def given(self, source: requests.Test | requests.Upload) -> Tensor:
        """The image `(1, C, H, W)` of a source that is an image."""
        if isinstance(source, requests.Test):
            test = self.background().test
            if source.index >= len(test):
                raise Refused(f"there are {len(test)} test images, none with index {source.index}")
            return test.take(slice(source.index, source.index + 1))
        with self._lock:
            if source.id not in self._uploads:
                raise Refused("this image is no longer there: drop it in again")
            return self._uploads[source.id][None]

    def latent_of(self, source: requests.Source, check: Check) -> Tensor:
        """The latent `(1, D)` of a source, from which `decode` without a label gives its image.

        If networks see the class, a sample was drawn with it. Then the latent encodes its image.
        """
        key = source.model_dump_json()
        z = self._latents.get(key)
        if z is None:
            if isinstance(source, requests.Sample) and not isinstance(
                self.flow.class_prior, ClassContext
            ):
                z = self.drawn(source, source.index, 1)[0]
            else:
                x = self.image(requests.Place(source=source), check)
                z = self.flow.encode(x, Stoppable(check, MatchingInverse(lambda share: check())))
        keep(self._latents, key, z, min(KEPT, self.largest_count))
        return z

    def drawn(
        self, parameters: requests.Drawn, start: int, count: int
    ) -> tuple[Tensor, Tensor | None]:
        """Latents `(count, D)` of samples of a seed, with their labels."""
        flow, label, temperatures = self.flow, parameters.label, parameters.temperatures
        if len(temperatures) != len(self.levels):
            raise Refused(f"temperatures: {len(temperatures)}, for {len(self.levels)} levels")
        self.require_count(start + count)
        if label is not None and label >= flow.classes:
            raise Refused(f"label: {label}, and the model has {flow.classes} classes")
        noise = flow.draw_latents(start + count, generator(parameters.seed, Stream.LATENTS))
        entries = torch.tensor([level.entries for level in self.levels])
        noise = noise[start:] * torch.tensor(temperatures).repeat_interleave(entries).to(noise)
        if not flow.classes:
            return noise, None
        labels = torch.arange(start, start + count) % flow.classes
        if label is not None:
            labels = torch.full((count,), label)
        return flow.latents_of_classes(noise, labels), labels

    def require_count(self, count: int) -> None:
        if count > self.largest_count:
            raise Refused(f"{count:,} images are too many: at most {self.largest_count:,}")

    def latent(self, place: requests.Place, check: Check) -> Tensor:
        """The latent `(1, D)` of a place: its source's latent with the edits."""
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
        z = z.clone()
        for move in place.principal:
            found = self.background().components
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

    def keep_image(self, place: requests.Place, x: Tensor) -> None:
        """Keeps the image `(1, C, H, W)` at a place for the next requests, its figures."""
        keep(self._images, place.model_dump_json(), x, min(KEPT, self.largest_count))

    def image(self, place: requests.Place, check: Check) -> Tensor:
        """The image `(1, C, H, W)` at a place. An unedited image of the data is itself."""
        source = place.source
        x = self._images.get(place.model_dump_json())
        if x is None:
            if place != requests.Place(source=source):
                x = self.decode(self.latent(place, check), check)
            elif isinstance(source, requests.Sample):
                z, labels = self.drawn(source, source.index, 1)
                x = self.decode(z, check, labels)
            else:
                return self.given(source)
        self.keep_image(place, x)
        return x

    def decode(self, z: Tensor, check: Check, labels: Tensor | None = None) -> Tensor:
        """Latents `(B, D)` as images on the CPU, in batches that fit into the memory."""
        parts = z.split(self.at_a_time)
        of_parts = [None] * len(parts) if labels is None else labels.split(self.at_a_time)
        executor = Stoppable(check)
        try:
            images = [
                self.flow.decode(part, of_part, executor).cpu()
                for part, of_part in zip(parts, of_parts, strict=True)
            ]
        except FloatingPointError:
            raise Refused("the image is not finite: this latent is too far out") from None
        return torch.cat(images)
