"""flowtrain: normalizing flows on images, with likelihoods that can be trusted."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowtrain.flow.flow import Flow as Flow

__version__ = "1.0.0"


def __getattr__(name: str) -> object:
    if name == "Flow":
        from flowtrain.flow.flow import Flow  # torch is imported only when it is needed

        return Flow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    model: str | os.PathLike[str],
    device: str = "auto",
    weights: str | None = None,
    trust_code: bool = False,
    mirror: bool = False,
) -> "Flow":
    """A trained flow, ready to use.

    Args:
        model: a checkpoint, a run directory (its best checkpoint, else its last), a trained model
            of `flowtrain list`, or `hf://user/name` on the Hugging Face Hub.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N` or `mps`.
        weights: `ema` or `raw`; by default the averaged weights where the run kept them.
        trust_code: allow a checkpoint to name a module of your own (dotted), which is then
            imported.
        mirror: make the model the mixture of each image and its mirror image, or of all orders
            (`model.orders`): likelihoods are the mean of all, in a pass each, and samples take one
            at random.

    Raises:
        flowtrain.errors.UserError: for a missing or damaged checkpoint, a device that is not
        there, or `mirror` for a model that has learned one side of images alone.
    """
    from flowtrain.checkpoints.load import load_model
    from flowtrain.system import device as devices

    loaded = load_model(os.fspath(model), devices.resolve(device), weights, trust_code, mirror)
    return loaded.flow
