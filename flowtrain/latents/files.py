"""Files of latents: an .npz file with one array for each level, and the hash of the model.

format    the version of this format, FORMAT
model     the hash of the model (`checkpoints.load.model_hash`)
names     one text for each image, usable as a file name
level1    float32 (N, C, H, W), the finest level, or (N, D) if the model has no levels
level2    the next level, and so on; the last is the coarsest
classes   int64 (N,), if they are known
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel, model_hash
from flowtrain.errors import UserError, cut
from flowtrain.flow.flow import Flow
from flowtrain.system.arrays import ArrayFile
from flowtrain.system.files import check_names

FORMAT = 1


@dataclass(frozen=True)
class Latents:
    """Latents `z`, float32 `(N, D)`, the names of the images, and their classes `(N,)`."""

    z: Tensor
    names: list[str]
    classes: Tensor | None = None


def npz(latents: Latents, model: LoadedModel) -> bytes:
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "model": np.array(model_hash(model)),
        "names": np.array(latents.names, dtype=np.str_),
    }
    for number, level in enumerate(model.flow.split_latents(latents.z), start=1):
        arrays[f"level{number}"] = level.numpy()
    if latents.classes is not None:
        arrays["classes"] = latents.classes.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # noise: compression would gain a tenth
    return buffer.getvalue()


def read(path: Path, model: LoadedModel) -> Latents:
    """The latents in a file, which may come from a stranger, without the classes.

    Raises `UserError` that names the file if it has another format, is of another model, or has a
    number that is not finite or impossible names of files.
    """
    file = ArrayFile(path)
    require_format(file, FORMAT, "latents", model)
    flow = model.flow
    shapes = [level.shape[1:] for level in flow.split_latents(torch.empty(1, flow.latent_dims))]
    names = file.read("names", "U", (None,)).tolist()
    if not names:
        raise UserError(f"{path}: it has no latents")
    levels = []
    for number, shape in enumerate(shapes, start=1):
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            level = file.read(f"level{number}", "f", (len(names), *shape)).astype(np.float32)
        finite = np.isfinite(level.reshape(len(level), -1)).all(axis=1)
        if not finite.all():
            name = names[int(finite.argmin())]
            raise UserError(f"{path}: level{number} of {cut(name)} has a number that is not finite")
        levels.append(torch.from_numpy(level).flatten(1))
    try:
        check_names(names)
    except ValueError as error:
        raise UserError(f"{path}: names: {error}") from None
    return Latents(torch.cat(levels, dim=1), names)


def images_npz(flow: Flow, x: Tensor, names: Sequence[str]) -> bytes:
    """Images or points `(N, C, H, W)` with names as an .npz file, in the format of `sample`."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "images": x.movedim(1, -1).numpy(),
        "names": np.array(names, dtype=np.str_),
    }
    np.savez_compressed(buffer, **arrays, **flow.kind.npz())
    return buffer.getvalue()


class OtherModel(UserError):
    """A file is of another model, or of other weights."""


def require_format(file: ArrayFile, known: int, of_what: str, model: LoadedModel) -> None:
    """Raises `UserError` unless the format is `known`, and `OtherModel` if the model is another."""
    found = int(file.read("format", "iu", ()))
    if found != known:
        raise UserError(
            f"{file.path}: {of_what} in format {found}, and this version of flowtrain reads {known}"
        )
    its, own = str(file.read("model", "U", ())), model_hash(model)
    if its != own:
        raise OtherModel(
            f"{file.path}: {of_what} of the model {cut(its, 16)}; {model.checkpoint.path} "
            f"({model.weights} weights) is another one, {own[:16]}"
        )
