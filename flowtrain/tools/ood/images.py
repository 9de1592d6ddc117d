"""The images that are compared: of the model's data, of other data, and made ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet, SplitName, sampled
from flowtrain.datasets.base import resize
from flowtrain.errors import UserError
from flowtrain.flow.inputs import quantize
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import picture_of
from flowtrain.system.random import Stream, generator
from flowtrain.types import Policy, Shape


@dataclass(frozen=True)
class Collection:
    """Images of one kind, brought to the model's shape and levels."""

    name: str
    images: np.ndarray  # uint8 (N, C, H, W), values 0..Q-1
    positions: np.ndarray  # of the images in the split, or 0..N-1
    split: str | None = None  # None for made images
    # Shape and levels as stored, where those are not the model's.
    stored: tuple[Shape, int] | None = None


@dataclass(frozen=True)
class Collections:
    """The images of a comparison. `reference` are images of the model's data that are not among
    those of `inside`.
    """

    reference: Collection
    inside: Collection
    outside: list[Collection]

    @property
    def all(self) -> list[Collection]:
        return [self.reference, self.inside, *self.outside]


def collect(
    model: LoadedModel,
    data: DataSet,
    inside: str | None,
    outside: list[str],
    *,
    num_images: int,
    seed: int = 0,
) -> Collections:
    """A sample of `num_images` images of each data set that a command line names.

    Args:
        data: the model's own data. The reference is its validation split, or its training split
            where that is empty.
        inside: `--in`: images of the kind that the model was trained on. By default, the test split
            of its own data.
        outside: `--data`: other images, or names in `MADE`.
        seed: of the samples, and of images that are made.

    Raises `UserError` naming the option, for a model of real values, and where a name is given
    twice.
    """
    own = data.config.name
    _check_names(inside or own, outside)
    within = (
        named(inside, "--in", model, data, num_images, seed)
        if inside
        else own_split("test", model, data, num_images, seed)
    )
    others = [
        made(name, within, levels_of(model), seed)
        if name in MADE
        else named(name, "--data", model, data, num_images, seed)
        for name in outside
    ]
    reference: SplitName = "validation" if len(data.split("validation")) else "train"
    return Collections(own_split(reference, model, data, num_images, seed), within, others)


def _check_names(inside: str, outside: list[str]) -> None:
    """Raises `UserError` where two data sets have one name: rows and figures would look alike."""
    for index, name in enumerate(outside):
        if name in (inside, *outside[:index]):
            raise UserError(f"--data {name}: it is named twice")


def named(
    name: str, option: str, model: LoadedModel, own: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a data set, folder or file that a command line names, as the
    model's.

    They are those of its test split, or all, for a folder or file that has no test split. `own` are
    the model's own data. Raises `UserError` naming `option`.
    """
    flow = model.flow
    also = MADE if option == "--data" else ()
    section = section_named(name, own.config, flow.shape, option, also=also)
    if name != own.config.name:  # `convert` brings any number of levels to the model's
        section |= {"n_bits": 8, "flip": None, "shift": 0}
    # What the model's configuration names was trusted when it was loaded.
    config = configuration.parse(
        {**model.config.resolved(), "data": section}, f"{option} {name}", trust_code=True
    ).data
    data = DataSet(config, undivided(config, own.config))
    levels = data.kind.require_levels(f"{option} {name}: real values, not images")
    return _sample(name, "all" if data.undivided else "test", data, levels, model, count, seed)


def own_split(
    split: SplitName, model: LoadedModel, data: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a split of the model's own data."""
    levels = levels_of(model)
    data.require(model.flow.shape, levels, model.checkpoint.path)
    return _sample(data.config.name, split, data, levels, model, count, seed)


def _sample(
    name: str,
    split: SplitName,
    data: DataSet,
    data_levels: int,
    model: LoadedModel,
    count: int,
    seed: int,
) -> Collection:
    every = data.split(split)
    positions = sampled(len(every), count, seed)
    images = every.take(positions).numpy()
    shape, levels = model.flow.shape, levels_of(model)
    policy = data.config.resize_policy
    stored = None if (data.shape, data_levels) == (shape, levels) else (data.shape, data_levels)
    converted = convert(images, data_levels, shape, levels, policy)
    return Collection(name, converted, positions, split, stored)


def levels_of(model: LoadedModel) -> int:
    """Q of a model of images. Raises `UserError` for a model of real values."""
    return model.flow.kind.require_levels(
        f"{model.checkpoint.path}: a model of real values; the scores are of images"
    )


def convert(
    images: np.ndarray, levels: int, to_shape: Shape, to_levels: int, policy: Policy = "crop"
) -> np.ndarray:
    """Brings images, uint8 `(N, C, H, W)` with values 0..levels-1, to a model's shape and levels:
    uint8 `(N, *to_shape)` with values 0..to_levels-1.

    Values are stretched to 0..255, and size and channels changed by
    `flowtrain.datasets.base.resize` (grey is repeated in each channel, colours become luma). Then
    2**n levels keep the upper n bits, as `data.n_bits` does, and any other number Q takes the
    nearest of 0..Q-1. Images that have the model's shape and levels stay as they are.
    """
    if images.shape[1:] == to_shape and levels == to_levels:
        return images
    pixels = to_8bit(torch.from_numpy(np.ascontiguousarray(images)), levels).numpy()
    if pixels.shape[1:] != to_shape:
        pixels = np.stack([resize(picture_of(image), to_shape, policy) for image in pixels])
    return quantize(pixels, to_levels)


MADE = ("noise", "constant", "shuffled")


def made(name: str, like: Collection, levels: int, seed: int) -> Collection:
    """The images that a name in `MADE` stands for: as many as those of `like`, and of their
    shape.
    """
    count, channels, height, width = like.images.shape
    if name == "shuffled":
        images = shuffled(like.images, seed)
    else:
        make = {"noise": noise, "constant": constant}[name]
        images = make(count, (channels, height, width), levels, seed)
    return Collection(name, images, np.arange(count))


def noise(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images whose values are independent and uniform over all levels, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 1)
    return np.stack([_draw(shape, levels, randomness(index)) for index in range(count)])


def constant(count: int, shape: Shape, levels: int, seed: int) -> np.ndarray:
    """Images of one colour each, uniform over all colours, uint8 `(count, C, H, W)`."""
    randomness = _randomness(seed, 2)
    colours = [_draw((shape[0], 1, 1), levels, randomness(index)) for index in range(count)]
    return np.broadcast_to(np.stack(colours), (count, *shape)).copy()


def shuffled(images: np.ndarray, seed: int) -> np.ndarray:
    """The images with their pixels in another order, each in its own; the channels of a pixel stay
    together.
    """
    randomness = _randomness(seed, 3)
    pixels = images.reshape(*images.shape[:2], -1)
    mixed = [
        image[:, torch.randperm(image.shape[1], generator=randomness(index)).numpy()]
        for index, image in enumerate(pixels)
    ]
    return np.stack(mixed).reshape(images.shape)


def _randomness(seed: int, kind: int) -> Callable[[int], torch.Generator]:
    """A generator per image index, so that the first images do not depend on how many there are."""
    return lambda index: generator(seed, Stream.EVALUATION, index, kind)


def _draw(shape: Shape, levels: int, randomness: torch.Generator) -> np.ndarray:
    return torch.randint(levels, shape, generator=randomness, dtype=torch.uint8).numpy()
