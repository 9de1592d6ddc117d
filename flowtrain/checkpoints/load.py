"""Finds checkpoints, and loads the models in them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import SUFFIX, Checkpoint, read_by_main
from flowtrain.config import Config
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow


def find(model: str | None, runs: Path = Path("runs")) -> Path:
    """The checkpoint file that a command line's `MODEL` means.

    That is the file itself, the best (else the last) checkpoint of a run directory, or by default
    that of the newest run. Raises `UserError` where there is none.
    """
    path = _newest(runs) if model is None else Path(model)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run directory")
    if not path.is_dir():
        return path
    files = _checkpoints_of(path)
    if not files:
        raise UserError(
            f"{path}: has no checkpoint (looked for checkpoints/best{SUFFIX} and "
            f"checkpoints/last{SUFFIX})"
        )
    return files[0]


def _newest(runs: Path) -> Path:
    """The run directory whose checkpoint was written last."""
    written = {
        run: max(file.stat().st_mtime_ns for file in files)
        for run in runs.glob("*")
        if (files := _checkpoints_of(run))
    }
    if not written:
        raise UserError(
            f"no MODEL given, and there is no run under {runs}/: give a checkpoint or a run "
            f"directory"
        )
    return max(written, key=lambda run: written[run])


def _checkpoints_of(run: Path) -> list[Path]:
    """The best and the last checkpoint of a run directory, where they exist."""
    files = [run / "checkpoints" / f"{name}{SUFFIX}" for name in ("best", "last")]
    return [file for file in files if file.is_file()]


def run_of(path: Path) -> Path:
    """The run directory that a checkpoint file lies in, or else its own folder."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


@dataclass
class LoadedModel:
    """A flow, and the checkpoint that it came from."""

    flow: Flow
    config: Config
    weights: str  # ema or raw
    checkpoint: Checkpoint


def load_weights(flow: Flow, checkpoint: Checkpoint, weights: str | None = None) -> str:
    """Copies a checkpoint's weights into `flow`, and returns which: `ema` or `raw`.

    By default, the averaged weights (`ema`) are taken where there are any. Raises `UserError` where
    the weights are missing or do not fit.
    """
    chosen = weights or ("ema" if checkpoint.part("ema") else "raw")
    state = checkpoint.part("ema" if chosen == "ema" else "model")
    if not state:
        raise UserError(
            f"--weights {chosen}: {checkpoint.path} has none (train.ema was 0); use --weights raw"
        )
    own = flow.state_dict()
    for name in [*own, *sorted(state.keys() - own.keys())]:  # safetensors has no order
        here, there = own.get(name), state.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [
                "nothing" if t is None else "x".join(map(str, t.shape)) or "a number"
                for t in (there, here)
            ]
            raise UserError(
                f"{checkpoint.path}: does not fit this model: {name} is {shapes[0]} there and "
                f"{shapes[1]} here"
            )
    flow.load_state_dict(state)
    return chosen


def load_model(
    model: str | None, device: torch.device, weights: str | None = None, trust_code: bool = False
) -> LoadedModel:
    """The flow of a checkpoint or run directory, on `device`, in evaluation mode. See
    `flowtrain.load`.
    """
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: expected ema or raw")
    checkpoint = read_by_main(lambda: find(model))
    assert checkpoint is not None
    for section in ("model", "data"):
        name = checkpoint.meta["config"][section]["name"]
        if "." in name and not trust_code:
            raise UserError(
                f"{checkpoint.path}: {section}.name is {name!r}, a module outside flowtrain; "
                f"loading it runs its code. If you trust it, say --trust-code"
            )
    config = configuration.parse(checkpoint.meta["config"], str(checkpoint.path))
    flow = build_flow(config, tuple(checkpoint.meta["shape"]), checkpoint.meta["levels"])
    chosen = load_weights(flow, checkpoint, weights)
    return LoadedModel(flow.to(device).eval().requires_grad_(False), config, chosen, checkpoint)
