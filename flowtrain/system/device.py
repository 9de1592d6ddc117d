"""Devices: what `--device` names, and how tensors get there."""

import torch

from flowtrain.errors import UserError
from flowtrain.system import distributed


def resolve(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` names.

    Several processes on a machine have one GPU each: `cuda` is the GPU of the local rank.

    Raises:
        UserError: if the name is another one, or the machine has no such device.
    """
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, available in there.items() if available), "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: this machine, or this build of torch, has no CUDA device; use "
            f"--device cpu"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: this machine has no MPS device; use --device cpu")
    if distributed.world() > 1 and (index or kind == "mps"):
        raise UserError(
            f"--device {name}: there are {distributed.world()} processes; expected auto, cpu or "
            f"cuda"
        )
    if kind == "cuda" and distributed.world() > 1:
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: {torch.cuda.device_count()} CUDA devices on this machine, none "
                f"for the process of "
                f"local rank {distributed.local_rank()}: start no more processes than devices "
                f"(--nproc-per-node)"
            )
        name = f"cuda:{distributed.local_rank()}"
        torch.cuda.set_device(name)
    if kind == "cuda":
        # float32 means float32: cuDNN's default rounds the inputs of convolutions to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on the device. A GPU fetches it from pinned memory, and the host does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
