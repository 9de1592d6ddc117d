"""Checkpoints: one safetensors file with a JSON description and a checksum over every byte.

The file is an ordinary safetensors file. Its metadata has two strings: `flowtrain`, the description as JSON (format,
versions, configuration, image shape, levels, step, the data's fingerprint, the trainer's counters), and `checksum`,
the SHA-256 of the whole file with these 64 digits at zero. Nothing in it can run code.
"""

import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import flowtrain
from flowtrain import config as configuration
from flowtrain.classes import ClassPrior
from flowtrain.config import Config, Dequantization
from flowtrain.dequantize import Dequantizer, RealValued, UniformNoise
from flowtrain.errors import UserError
from flowtrain.flow import Flow
from flowtrain.system import distributed
from flowtrain.system.files import write_atomically
from flowtrain.system.random import Stream
from flowtrain.variational import VariationalNoise

FORMAT = 1


SUFFIX = ".safetensors"


_ZEROS = b"0" * 64


_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')


@dataclass
class Checkpoint:
    """A checkpoint's file, description and tensors (named `model.*`, `ema.*`, `optimizer.*`)."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, without its prefix."""
        prefix = f"{name}."
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


def versions() -> dict[str, str]:
    return {"flowtrain": flowtrain.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint so that a kill at any moment leaves the old file or the new one, never a part.

    Raises `RunError` where the disk does not take it; what was there before is kept.
    """
    described = json.dumps({"format": FORMAT, "versions": versions(), **meta}, allow_nan=False)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytearray(safetensors.torch.save(contiguous, {"flowtrain": described, "checksum": _ZEROS.decode()}))
    match = _CHECKSUM.search(data, 0, _header_end(data))
    assert match is not None
    data[match.start(1) : match.end(1)] = hashlib.sha256(data).hexdigest().encode()
    write_atomically(path, bytes(data))


def read(path: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises `UserError` naming the file where it is missing, damaged or foreign."""
    return _parse(path, _bytes(path))


def read_by_main(find: Callable[[], Path | None]) -> Checkpoint | None:
    """As `read`, by one process for all: the others need neither the file nor to look for it."""
    path = distributed.from_main(lambda: None if (found := find()) is None else str(found))
    if path is None:
        return None
    return _parse(Path(path), distributed.bytes_from_main(lambda: _bytes(Path(path))))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(path: Path, data: bytes) -> Checkpoint:
    foreign = UserError(
        f"{path}: not a flowtrain checkpoint (a safetensors file with its description; pickles are never loaded)"
    )
    try:
        header = json.loads(data[8 : _header_end(data)])
        metadata = header["__metadata__"]
        described, checksum = metadata["flowtrain"], metadata["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # A damaged header cannot be told from a file of another kind, unless it says whose it is.
        if b'"flowtrain"' in data[:1_000_000] or path.suffix == SUFFIX:
            raise UserError(f"{path}: damaged: its header cannot be read (truncated, or bytes changed)") from error
        raise foreign from error
    match = _CHECKSUM.search(data, 0, _header_end(data))
    if match is None:
        raise UserError(f"{path}: damaged: it has no checksum")
    digest = hashlib.sha256()
    for part in (data[: match.start(1)], _ZEROS, data[match.end(1) :]):
        digest.update(part)
    if digest.hexdigest() != checksum:
        raise UserError(f"{path}: damaged: its bytes do not match its checksum (truncated or changed)")
    meta = json.loads(described)
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path}: written in checkpoint format {meta.get('format')} by flowtrain "
            f"{meta.get('versions', {}).get('flowtrain', '?')}; this is flowtrain {flowtrain.__version__}, "
            f"which reads format {FORMAT}: use that version, or train again"
        )
    return Checkpoint(path, meta, safetensors.torch.load(data))


def _header_end(data: bytes | bytearray) -> int:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, 100_000_000):
        raise ValueError("header length")
    return 8 + length


def find(model: str | None, runs: Path = Path("runs")) -> Path:
    """`MODEL` to a checkpoint file: a file, a run directory (best, else last), or by default the newest run.

    Raises `UserError` where there is none.
    """
    if model is None:
        candidates = [run for run in runs.glob("*") if _checkpoint_of(run) is not None]
        if not candidates:
            raise UserError(f"no MODEL given, and there is no run under {runs}/: give a checkpoint or a run directory")
        model = str(max(candidates, key=lambda run: max(file.stat().st_mtime_ns for file in _checkpoints_of(run))))
    path = Path(model)
    if path.is_dir():
        found = _checkpoint_of(path)
        if found is None:
            raise UserError(
                f"{path}: has no checkpoint (looked for checkpoints/best{SUFFIX} and checkpoints/last{SUFFIX})"
            )
        return found
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run directory")
    return path


def _checkpoints_of(run: Path) -> list[Path]:
    files = [run / "checkpoints" / f"{name}{SUFFIX}" for name in ("best", "last")]
    return [file for file in files if file.is_file()]


def _checkpoint_of(run: Path) -> Path | None:
    return next(iter(_checkpoints_of(run)), None)


def run_of(path: Path) -> Path:
    """The run directory that a checkpoint file lies in, or its own folder."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


@dataclass
class LoadedModel:
    """A flow with the description that came with it."""

    flow: Flow
    config: Config
    weights: str  # ema or raw
    checkpoint: Checkpoint


def build_flow(config: Config, shape: tuple[int, int, int], levels: int | None) -> Flow:
    """A new flow for images of `shape` with values 0..levels-1, or real-valued; its weights are a function of the seed.

    Raises `UserError` where the options do not fit the shape, or data without levels.
    """
    module = configuration.component_module("models", config.model.name)
    options = config.dequantization
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + int(Stream.WEIGHTS))
        bijection = module.build(shape, **config.model.options())
        class_prior = None
        if config.model.classes:
            probe = torch.zeros(1, bijection.latent_dims(math.prod(shape)))
            class_prior = ClassPrior(config.model.classes, tuple(bijection.split_latents(probe)[-1].shape[1:]))
        if levels is None:
            if options != Dequantization.model_validate({}):
                raise UserError("dequantization: real-valued data have no levels, and need none of its keys")
            return Flow(bijection, RealValued(), shape, class_prior)
        if bijection.latent_dims(math.prod(shape)) != math.prod(shape):
            raise UserError(f"model.name: {config.model.name} is for real-valued data, these have {levels} levels")
        # After the bijection, whose weights are the same with any noise.
        variational = options.name == "variational"
        noise_model = VariationalNoise(shape, options.steps, options.width) if variational else UniformNoise()
    dequantizer = Dequantizer(levels, options.transform, options.alpha, noise_model)
    return Flow(bijection, dequantizer, shape, class_prior)


def load_weights(flow: Flow, checkpoint: Checkpoint, weights: str | None = None) -> str:
    """Copies a checkpoint's weights into `flow`, and says which: `ema` (where there are any) or `raw`.

    Raises `UserError` where they are not there or do not fit.
    """
    chosen = weights or ("ema" if checkpoint.part("ema") else "raw")
    if chosen not in ("ema", "raw"):
        raise UserError(f"--weights {chosen}: expected ema or raw")
    state = checkpoint.part({"ema": "ema", "raw": "model"}[chosen])
    if not state:
        raise UserError(f"--weights {chosen}: {checkpoint.path} has none (train.ema was 0); use --weights raw")
    own = flow.state_dict()
    for name in [*own, *sorted(state.keys() - own.keys())]:  # safetensors has no order
        here, there = own.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = ["nothing" if t is None else "x".join(map(str, t.shape)) or "a number" for t in (there, here)]
            raise UserError(
                f"{checkpoint.path}: does not fit this model: {name} is {shapes[0]} there and {shapes[1]} here"
            )
    flow.load_state_dict(state)
    return chosen


def load_model(
    model: str | None, device: torch.device, weights: str | None = None, trust_code: bool = False
) -> LoadedModel:
    """The flow of a checkpoint or run directory, on `device`, in evaluation mode. See `flowtrain.load`."""
    checkpoint = read_by_main(lambda: find(model))
    assert checkpoint is not None
    for section in ("model", "data"):
        name = checkpoint.meta["config"][section]["name"]
        if "." in name and not trust_code:
            raise UserError(
                f"{checkpoint.path}: {section}.name is {name!r}, a module outside flowtrain; loading it runs its code. "
                "If you trust it, say --trust-code"
            )
    config = configuration.parse(checkpoint.meta["config"], str(checkpoint.path))
    flow = build_flow(config, tuple(checkpoint.meta["shape"]), checkpoint.meta["levels"])
    chosen = load_weights(flow, checkpoint, weights)
    return LoadedModel(flow.to(device).eval().requires_grad_(False), config, chosen, checkpoint)
