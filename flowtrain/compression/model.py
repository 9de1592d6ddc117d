"""What an archive says about the model that its images were coded with."""

import hashlib
import json
from importlib import metadata

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel


def model_hash(model: LoadedModel) -> str:
    """SHA-256 of all that the model computes with: its options, shape, levels, and the weights that
    are used. Its first `format.HASH_DIGITS` digits are in an archive.
    """
    described = {key: model.checkpoint.meta["config"][key] for key in ("model", "dequantization")}
    described |= {"shape": list(model.flow.shape), "levels": model.flow.levels}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.flow.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_bytes(model: LoadedModel) -> bytes:
    """A checkpoint that holds the weights that are used, and nothing else."""
    tensors = {f"model.{name}": tensor for name, tensor in model.flow.state_dict().items()}
    meta = {key: model.checkpoint.meta[key] for key in ("config", "shape", "levels", "step")}
    return checkpoint_format.encoded(meta, tensors)


def versions() -> dict[str, str]:
    """The versions that the numerics may depend on."""
    return {**checkpoint_format.versions(), "constriction": metadata.version("constriction")}
