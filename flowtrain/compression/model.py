"""What an archive says about the model that its images were coded with."""

import hashlib
import json
from importlib import metadata

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel

HASH_DIGITS = 16  # of the model's hash in an archive, at least; earlier versions wrote all of them


def model_hash(model: LoadedModel) -> str:
    """SHA-256 of all that the model computes with: its options, shape, levels, and the weights that
    are used.
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
    return checkpoint_format.encoded(*model.alone())


def versions() -> dict[str, str]:
    """The versions that the numerics may depend on."""
    return {**checkpoint_format.versions(), "constriction": metadata.version("constriction")}
