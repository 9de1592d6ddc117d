"""Finding checkpoints, and loading the models in them."""

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
    """`MODEL` to a checkpoint file: a file, a run directory (best, else last), or by default the
    newest run.

    Raises `UserError` where there is none.
    """
    if model is None:
        candidates = [run for run in runs.glob("*") if _checkpoint_of(run) is not None]
        if not candidates:
            raise UserError(
                f"no MODEL given, and there is no run under {runs}/: give a checkpoint or a run "
                f"directory"
            )
        model = str(
            max(
                candidates,
                key=lambda run: max(file.stat().st_mtime_ns for file in _checkpoints_of(run)),
            )
        )
    path = Path(model)
    if path.is_dir():
        found = _checkpoint_of(path)
        if found is None:
            raise UserError(
                f"{path}: has no checkpoint (looked for checkpoints/best{SUFFIX} and "
                f"checkpoints/last{SUFFIX})"
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


def load_weights(flow: Flow, checkpoint: Checkpoint, weights: str | None = None) -> str:
    """Copies a checkpoint's weights into `flow`, and says which: `ema` (where there are any) or
    `raw`.

    Raises `UserError` where they are not there or do not fit.
    """
    chosen = weights or ("ema" if checkpoint.part("ema") else "raw")
    if chosen not in ("ema", "raw"):
        raise UserError(f"--weights {chosen}: expected ema or raw")
    state = checkpoint.part({"ema": "ema", "raw": "model"}[chosen])
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
    checkpoint = read_by_main(lambda: find(model))
    assert checkpoint is not None
    for section in ("model", "data"):
        name = checkpoint.meta["config"][section]["name"]
        if "." in name and not trust_code:
            raise UserError(
                f"{checkpoint.path}: {section}.name is {name!r}, a module outside flowtrain; "
                f"loading it runs its code. "
                "If you trust it, say --trust-code"
            )
    config = configuration.parse(checkpoint.meta["config"], str(checkpoint.path))
    flow = build_flow(config, tuple(checkpoint.meta["shape"]), checkpoint.meta["levels"])
    chosen = load_weights(flow, checkpoint, weights)
    return LoadedModel(flow.to(device).eval().requires_grad_(False), config, chosen, checkpoint)
