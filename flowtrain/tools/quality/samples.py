"""Many samples of a model, drawn by several processes, and continued after a kill."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel, model_hash, run_of
from flowtrain.pictures.sample import sample
from flowtrain.system import capacity, distributed
from flowtrain.system.arrays import ONLY, ArrayFile
from flowtrain.system.console import silent
from flowtrain.system.files import remove_left_overs, save

PART = 100  # images in a file; a kill costs each process at most so many


def folder_of(model: LoadedModel, seed: int, **options: Any) -> Path:
    """Where the parts of these samples lie, in the run. `options` as for `sample`."""
    key = json.dumps([model_hash(model), seed, options], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return run_of(model.checkpoint.path) / f"quality-{digest[:12]}"


def draw(
    model: LoadedModel,
    num: int,
    folder: Path,
    seed: int,
    progress: Callable[[float, float], None] = silent,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    """`num` samples with the levels of the model, uint8 `(N, C, H, W)`; on process 0 alone.

    A sample depends on the seed and its position, not on `num` or the number of processes. These
    share the `folder`, where finished parts stay until the caller removes them. `options` are
    `guidance` and `denoise` of `sample`.
    """
    shape = model.flow.shape
    # As bytes twice, and twice as the int32 of `to_8bit`, which follows.
    needed = (2 + 2 * 4) * num * model.flow.dims
    capacity.require(needed, f"--num-images {num}: the samples need")
    starts = range(0, num, PART)
    own = starts[distributed.rank() :: distributed.world()]

    def part(start: int, note: Callable[[float, float], None] = silent) -> Tensor:
        file = folder / f"{start:09}.npy"
        if file.exists():
            return torch.from_numpy(ArrayFile(file).read(ONLY, "iu", (PART, *shape)))
        # The last part is whole, too: its rounding depends on its size.
        images = sample(model.flow, PART, [temperature], seed, note, first=start, **options)
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        save(file, buffer.getvalue(), named=False)
        return images

    for done, start in enumerate(own):

        def note(part: float, of: float, done: int = done) -> None:
            progress((done + part / of) * PART, len(own) * PART)

        part(start, note)
        note(1, 1)
    distributed.barrier()
    if not distributed.is_main():
        return torch.empty(0, *shape, dtype=torch.uint8)
    # An equal command that has ended in the meantime has removed the parts.
    return torch.cat([part(start) for start in starts])[:num]


def remove(parts: Path) -> None:
    """Removes the parts, and the folder, unless an equal command still writes there."""
    remove_left_overs(parts)
    for file in parts.glob("*.npy"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()
