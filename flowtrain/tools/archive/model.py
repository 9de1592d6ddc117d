"""What an archive says about the model that its images were coded with."""

from importlib import metadata

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel


def model_bytes(model: LoadedModel) -> bytes:
    """A checkpoint that holds the weights that are used, and nothing else."""
    return checkpoint_format.encoded(*model.alone())


def versions() -> dict[str, str]:
    """The versions that the numerics may depend on."""
    return {**checkpoint_format.versions(), "constriction": metadata.version("constriction")}
