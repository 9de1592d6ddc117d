"""Images to latents and back, for any number of images, and images that a command line names."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.datasets.base import open_image
from flowtrain.datasets.folder import files_of
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.flow.passes import sampling_batch_size
from flowtrain.system import capacity


def silent(done: float, total: float) -> None:
    pass


def encode(
    flow: Flow, x: Tensor, progress: Callable[[float, float], None] = silent, what: str = "encoding"
) -> Tensor:
    """The latents of images `(N, C, H, W)`, float32 `(N, D)` on the CPU. See `Flow.encode`.

    `what` begins the message of the `UserError` that is raised where there is no room for them.
    """
    capacity.require(2 * 4 * len(x) * flow.latent_dims, f"{what}: {len(x):,} latents need")
    z = torch.empty(len(x), flow.latent_dims)
    at_a_time = sampling_batch_size(flow)
    for start in range(0, len(x), at_a_time):
        part = x[start : start + at_a_time]
        z[start : start + len(part)] = flow.encode(part)
        progress(start + len(part), len(x))
    return z


def joined(levels: Sequence[Tensor]) -> Tensor:
    """The latents `(B, D)` of which `Flow.split_latents` gives these levels."""
    return torch.cat([level.flatten(1) for level in levels], dim=1)


def files_at(paths: Sequence[Path], option: str) -> dict[str, Path]:
    """Image files, and those in folders at any depth, by name: the path below the folder.

    Raises `UserError` that begins with `option` where a folder has no image, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        named = {path.name: path}
        if path.is_dir():
            try:
                names = [file.name for file in files_of(path, "")]
            except UserError as error:
                why = str(error).removeprefix("data.path: ")
                raise UserError(f"{option} {path}: {why}") from None
            named = {name: path / name for name in names}
        for name, file in named.items():
            if name in found:
                raise UserError(f"{option} {file}: it has the same name as {found[name]}")
            found[name] = file
    return found


def read_images(files: Sequence[Path], model: LoadedModel, option: str) -> Tensor:
    """Image files as images of the model's shape, `(N, C, H, W)`.

    They are resized by the policy of the model's data set, or by `crop` if it has none. Raises
    `UserError` that names the file where one cannot be read, or `option` for a model of points.
    """
    flow, policy = model.flow, model.config.data.options().get("resize", "crop")
    levels = flow.kind.require_levels(f"{option}: the model is of real-valued data, not of images")
    capacity.require(len(files) * flow.dims, f"{option}: {len(files):,} images need")
    x = torch.empty(len(files), *flow.shape, dtype=torch.uint8)
    for image, file in zip(x, files, strict=True):
        image.copy_(torch.from_numpy(open_image(file, flow.shape, levels, policy)))
    return x
