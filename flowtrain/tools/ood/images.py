"""The images that are compared: of the model's data, of other data, and made ones."""

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
from flowtrain.pictures.grid import picture_of, to_8bit
from flowtrain.system.random import Stream, generator
from flowtrain.types import Policy, Shape


@dataclass(frozen=True)
class Collection:
    """Images of one kind, brought to the model's shape and levels."""

    name: str
    images: np.ndarray  # uint8 (N, C, H, W), values 0..Q-1, or float32 real values
    positions: np.ndarray  # of the images in the split, or 0..N-1
    split: str | None = None  # None for made images
    stored: tuple[Shape, int] | None = None  # shape and levels, if those are not the model's
    names: list[str] | None = None  # of the images, if they are files


def collect(
    model: LoadedModel,
    data: DataSet,
    inside: str | None,
    outside: list[str],
    *,
    num_images: int,
    seed: int = 0,
) -> list[Collection]:
    """A sample of `num_images` images of each data set that a command line names: the reference,
    which has no image of `inside`, then `inside`, then each of `outside`.

    Args:
        data: the model's own data. The reference is its validation split, or its training split if
            there is none.
        inside: `--in`: images like the training images. By default, the test split of `data`.
        outside: `--data`: other images, or names in `MADE`.
        seed: of the samples, and of images that are made.

    Raises:
        UserError: naming the option, for a name that is given twice, images for a model of real
            values, or the reverse.
    """
    for index, name in enumerate(outside):
        if name in (inside or data.config.name, *outside[:index]):
            raise UserError(f"--data {name}: it is named twice")
    within = (
        named(inside, "--in", model, data, num_images, seed)
        if inside
        else own_split("test", model, data, num_images, seed)
    )
    others = [
        made(name, within, num_bins_of(model, f"--data {name}"), seed)
        if name in MADE
        else named(name, "--data", model, data, num_images, seed)
        for name in outside
    ]
    reference: SplitName = "validation" if len(data.split("validation")) else "train"
    return [own_split(reference, model, data, num_images, seed), within, *others]


def named(
    name: str, option: str, model: LoadedModel, own: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a data set, folder or file, brought to the model's format.

    They come from its test split, or from all images of a folder or file without one. `own` are the
    model's own data. Raises `UserError` naming `option`.
    """
    flow = model.flow
    also = MADE if option == "--data" else ()
    section = section_named(name, own.config, flow.shape, option, also=also)
    if name != own.config.name:  # `convert` brings any number of levels to the model's
        section |= {"n_bits": 8, "flip": None, "shift": 0}
    # The modules of the model's configuration were trusted when it was loaded.
    config = configuration.parse(
        {**model.config.resolved(), "data": section}, f"{option} {name}", trust_code=True
    ).data
    data = DataSet(config, undivided(config, own.config))
    if flow.num_bins is None:
        data.require(flow.shape, None, model.checkpoint.path)
    else:
        data.kind.require_bins(f"{option} {name}: real values, not images")
    return _sample(name, "all" if data.undivided else "test", data, model, count, seed)


def own_split(
    split: SplitName, model: LoadedModel, data: DataSet, count: int, seed: int = 0
) -> Collection:
    """A sample of `count` images of a split of the model's own data."""
    data.require(model.flow.shape, model.flow.num_bins, model.checkpoint.path)
    return _sample(data.config.name, split, data, model, count, seed)


def _sample(
    name: str, split: SplitName, data: DataSet, model: LoadedModel, count: int, seed: int
) -> Collection:
    every = data.split(split)
    positions = sampled(len(every), count, seed)
    chosen = every.at(positions)
    images = chosen.take(slice(None)).numpy()
    shape, num_bins, stored = model.flow.shape, model.flow.num_bins, None
    if num_bins is not None and data.num_bins is not None:
        if (data.shape, data.num_bins) != (shape, num_bins):
            stored = data.shape, data.num_bins
        images = convert(images, data.num_bins, shape, num_bins, data.config.resize_policy)
    return Collection(name, images, positions, split, stored, chosen.names)


def num_bins_of(model: LoadedModel, what: str) -> int:
    """Q of a model of images. Raises `UserError` that begins with `what` for a model of real
    values.
    """
    return model.flow.kind.require_bins(
        f"{what}: for models of images, and {model.checkpoint.path} is one of real values"
    )


def convert(
    images: np.ndarray, num_bins: int, to_shape: Shape, to_bins: int, policy: Policy = "crop"
) -> np.ndarray:
    """Converts uint8 `(N, C, H, W)`, values 0..num_bins-1, to `(N, *to_shape)`, 0..to_bins-1.

    Values are stretched to 0..255, and size and channels changed by
    `flowtrain.datasets.base.resize` (grey is repeated in each channel, colours become luma). Then
    2**n levels keep the upper n bits, as `data.n_bits` does, and any other number Q takes the
    nearest of 0..Q-1. Images of the wanted shape and levels stay as they are.
    """
    if images.shape[1:] == to_shape and num_bins == to_bins:
        return images
    pixels = to_8bit(torch.from_numpy(np.ascontiguousarray(images)), num_bins).numpy()
    if pixels.shape[1:] != to_shape:
        pixels = np.stack([resize(picture_of(image), to_shape, policy) for image in pixels])
    return quantize(pixels, to_bins)


MADE = ("noise", "constant", "shuffled")


def made(name: str, like: Collection, num_bins: int, seed: int) -> Collection:
    """The images of a name in `MADE`, as many as in `like` and of their shape.

    Each has a random generator of its own, so the first images do not depend on their number.
    """
    count, *shape = like.images.shape
    if name == "shuffled":
        images = shuffled(like.images, seed)
    elif name == "constant":
        colours = noise(count, (shape[0], 1, 1), num_bins, seed, kind=2)
        images = np.broadcast_to(colours, like.images.shape).copy()
    else:
        images = noise(count, tuple(shape), num_bins, seed)
    return Collection(name, images, np.arange(count))


def noise(
    count: int, shape: tuple[int, ...], num_bins: int, seed: int, kind: int = 1
) -> np.ndarray:
    """Images whose values are independent and uniform over all levels, uint8 `(count, C, H, W)`."""
    images = [
        torch.randint(num_bins, shape, generator=_randomness(seed, index, kind), dtype=torch.uint8)
        for index in range(count)
    ]
    return torch.stack(images).numpy()


def shuffled(images: np.ndarray, seed: int) -> np.ndarray:
    """Each image with its pixels in an order of its own. The channels of a pixel stay together."""
    pixels = images.reshape(*images.shape[:2], -1)
    mixed = [
        image[:, torch.randperm(image.shape[1], generator=_randomness(seed, index, 3)).numpy()]
        for index, image in enumerate(pixels)
    ]
    return np.stack(mixed).reshape(images.shape)


def _randomness(seed: int, index: int, kind: int) -> torch.Generator:
    return generator(seed, Stream.EVALUATION, index, kind)
