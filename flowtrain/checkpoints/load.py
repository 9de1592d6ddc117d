"""Finds checkpoints, and loads the models in them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from flowtrain import config as configuration
from flowtrain.bijections.precision import default_dtype
from flowtrain.checkpoints import hub, zoo
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import SUFFIX, Checkpoint, read_by_main
from flowtrain.config import Config
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError, cut, did_you_mean
from flowtrain.flow.flow import Flow
from flowtrain.foreign import file as foreign

NAMED = 3  # tensors in a message


def find(model: str | None) -> Path:
    """The checkpoint file of a command line's `MODEL`.

    That is the file itself, the best (else the last) checkpoint of a run directory, a trained model
    of flowtrain by its name, `hf://user/name` on the hub, or by default the newest run. Raises
    `UserError` if there is none.
    """
    if model is not None and model.startswith(hub.PREFIX):
        return hub.download(model)
    path = _newest() if model is None else Path(model)
    if not _is_there(path):
        if model in (trained := zoo.names()):
            return zoo.verified(model)
        raise UserError(
            f"{path}: no such checkpoint or run directory{did_you_mean(str(path), trained)}"
        )
    if not path.is_dir():
        return path
    files = _checkpoints_of(path)
    if not files:
        raise UserError(
            f"{path}: has no checkpoint (looked for checkpoints/best{SUFFIX} and "
            f"checkpoints/last{SUFFIX})"
        )
    return files[0]


def _newest() -> Path:
    """The run directory whose checkpoint was written last."""
    written = {
        run: max(file.stat().st_mtime_ns for file in files)
        for run in Path("runs").glob("*")
        if (files := _checkpoints_of(run))
    }
    if not written:
        raise UserError(
            "no MODEL given, and there is no run under runs/: give a checkpoint or a run directory"
        )
    return max(written, key=lambda run: written[run])


def _checkpoints_of(run: Path) -> list[Path]:
    """The best and the last checkpoint of a run directory, if they exist."""
    files = [run / "checkpoints" / f"{name}{SUFFIX}" for name in ("best", "last")]
    return [file for file in files if _is_there(file) and file.is_file()]


def _is_there(path: Path) -> bool:
    """Whether there is a file, a folder or a link. Raises `PermissionError`."""
    try:
        path.lstat()
    except PermissionError:
        raise
    except (OSError, ValueError):  # also for a name that is too long
        return False
    return True


def run_of(path: Path) -> Path:
    """The folder for results about a checkpoint: its run directory, or else its own folder. For a
    trained model of flowtrain it is `runs/zoo/NAME`, because `runs/NAME` may be a run of the user,
    for one of the hub `runs/hf/USER/NAME`, and for FILE.py:NAME `runs/foreign/FILE-NAME`.
    """
    if path.parent == zoo.FOLDER:
        return Path("runs") / "zoo" / path.stem
    if repository := hub.repository_of(path):
        return Path("runs") / "hf" / repository
    if foreign.is_foreign(path.name):
        return Path("runs") / "foreign" / path.name.replace(".py:", "-")
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


@dataclass
class LoadedModel:
    flow: Flow
    config: Config
    weights: str  # ema or raw
    checkpoint: Checkpoint

    def alone(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Description and tensors of a checkpoint of these weights alone, as they are stored,
        without the rest of the run and the folders of this machine. Raises `UserError` for a flow
        of other code.
        """
        if foreign.is_foreign(str(self.checkpoint.path)):
            raise UserError(f"{self.checkpoint.path}: a flow of other code, without a checkpoint")
        meta = {key: self.checkpoint.meta[key] for key in ("config", "shape", "levels", "step")}
        data = {**_named(meta["config"].get("data", {})), "root": "data"}
        meta["config"] = {**meta["config"], "data": data}
        stored = self.checkpoint.part("ema" if self.weights == "ema" else "model")
        return meta, {f"model.{name}": tensor for name, tensor in stored.items()}


def _named(value: Any) -> Any:
    """The options of a data set, with each absolute path cut to its last name."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    is_path = isinstance(value, str) and PurePath(value).is_absolute()
    return PurePath(value).name if is_path else value


def load_weights(flow: Flow, checkpoint: Checkpoint, weights: str | None = None) -> str:
    """Copies a checkpoint's weights into `flow`, and returns which: `ema` or `raw`, by default the
    averaged ones if there are any. Raises `UserError` if they are missing or do not fit.
    """
    chosen, state = _require_weights(flow, checkpoint, weights)
    for name, here in flow.state_dict().items():
        _require_constant(checkpoint.path, name, state[name].to(here.device), here)
    flow.load_state_dict(state)
    return chosen


def _require_weights(
    flow: Flow, checkpoint: Checkpoint, weights: str | None
) -> tuple[str, dict[str, Tensor]]:
    """The kind of weights that `load_weights` takes, and the tensors. Raises `UserError`."""
    chosen = weights or ("ema" if checkpoint.part("ema") else "raw")
    part = "ema" if chosen == "ema" else "model"
    state = checkpoint.part(part)
    if not state:
        why = "has none (train.ema was 0); use --weights raw" if part == "ema" else "has none"
        raise UserError(f"--weights {chosen}: {checkpoint.path} {why}")
    if checkpoint.meta["progress"] is None:  # a model alone may be in half precision
        half = {name: value for name, value in state.items() if value.dtype == torch.float16}
        state |= {name: value.float() for name, value in half.items()}
    require_tensors(checkpoint.path, state, flow.state_dict())
    return chosen, state


def require_tensors(path: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises `UserError`, with the first wrong names, unless the tensors of a checkpoint have the
    names, shapes and types of `own`, the tensors that the configuration builds.
    """
    wrong = []
    for name in [*own, *sorted(found.keys() - own.keys())]:  # safetensors has no order
        here, there = own.get(name), found.get(name)
        if there is None:
            wrong.append(f"{cut(name)} is missing")
        elif here is None:
            wrong.append(f"{cut(name)} is not in this model")
        elif here.shape != there.shape:
            wrong.append(f"{cut(name)} is {_shape(there)} there and {_shape(here)} here")
        elif here.dtype != there.dtype:
            wrong.append(f"{cut(name)} is {there.dtype} there and {here.dtype} here")
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{path}: does not fit this model: {'; '.join(wrong[:NAMED])}{more}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _require_constant(path: Path, name: str, there: Tensor, here: Tensor) -> None:
    """Raises `UserError` for impossible values of a buffer: an order that is no permutation,
    another mask, or a layer that was not initialized.
    """
    if there.dtype == torch.bool:
        fits = torch.equal(there, here) if here.ndim else bool(there)
    else:
        fits = there.dtype != torch.int64 or torch.equal(there.sort()[0], here.sort()[0])
    if not fits:
        raise UserError(f"{path}: does not fit this model: {name} has values that it cannot have")


def load_model(
    model: str | None,
    device: torch.device,
    weights: str | None = None,
    trust_code: bool = False,
    mirror: bool = False,
) -> LoadedModel:
    """The flow of a `MODEL`, on `device`, in evaluation mode. See `flowtrain.load`."""
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: expected ema or raw")
    if model is not None and foreign.is_foreign(model):
        return _foreign(model, device, weights, mirror)
    checkpoint = read_by_main(lambda: find(model))
    assert checkpoint is not None
    meta = checkpoint.meta
    config = configuration.parse(meta["config"], str(checkpoint.path), trust_code)
    found = {t.dtype for t in checkpoint.part("model").values() if t.is_floating_point()}
    # The type is that in the file, whatever the default of the caller. A model gets no memory if
    # its tensors are not those in the file.
    with default_dtype(torch.float64 if found == {torch.float64} else torch.float32):
        flow = build_flow(
            config,
            meta["shape"],
            meta["levels"],
            check=lambda sizes: _require_weights(sizes, checkpoint, weights),
        )
    flow.sides = _sides(flow, config) if mirror else 1
    chosen = load_weights(flow, checkpoint, weights)
    return LoadedModel(flow.to(device).eval().requires_grad_(False), config, chosen, checkpoint)


def _foreign(model: str, device: torch.device, weights: str | None, mirror: bool) -> LoadedModel:
    """The flow that `FILE.py:NAME` names. Its data are the default, until settings name others."""
    if weights == "ema" or mirror:
        option = "--mirror" if mirror else "--weights ema"
        raise UserError(f"{option}: not possible for {model}, which is a flow of other code")
    flow = foreign.flow_named(model).to(device).eval().requires_grad_(False)
    config = configuration.parse({}, model)
    meta = {"config": config.resolved(), "shape": list(flow.shape), "levels": flow.num_bins}
    described = Checkpoint(Path(model), {**meta, "step": 0}, {})
    return LoadedModel(flow, config, "raw", described)


def _sides(flow: Flow, config: Config) -> int:
    """The number of sides of images in training. Raises `UserError` if it is 1."""
    if flow.orders > 1:
        return flow.orders
    flow.kind.require_bins("--mirror: the model is of real values, which have no mirror images")
    flip = config.data.flip
    if flip is None:  # no image is read for the default of the data set
        try:
            flip = DataSet(config.data).flip
        except UserError as error:
            raise UserError(
                f"--mirror: data.flip is null, so it depends on the data set: {error}"
            ) from None
    if not flip:
        raise UserError(
            f"--mirror: the model was trained without mirror images (data.flip is "
            f"{'null' if config.data.flip is None else 'false'}, data.name is {config.data.name})"
        )
    return 2


def model_hash(model: LoadedModel) -> str:
    """SHA-256 of the model's options, shape, levels, and the weights in use."""
    config = model.checkpoint.meta["config"]
    described = {key: config.get(key, {}) for key in ("model", "dequantization")}
    described |= {"shape": list(model.flow.shape), "levels": model.flow.num_bins}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.flow.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
