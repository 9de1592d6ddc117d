"""flowtrain: normalizing flows on images, with likelihoods that can be trusted."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from flowtrain.flow.flow import Flow as Flow
    from flowtrain.flow.inputs import Batch
    from flowtrain.foreign.contract import Foreign as Foreign
    from flowtrain.tools.doctor.findings import Finding
    from flowtrain.tools.quality.figures import Quality, Statistics

__version__ = "1.0.0"


def __getattr__(name: str) -> object:
    if name == "Flow":
        from flowtrain.flow.flow import Flow  # torch is imported only when it is needed

        return Flow
    if name == "Foreign":
        from flowtrain.foreign.contract import Foreign

        return Foreign
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    model: str | os.PathLike[str],
    device: "str | torch.device" = "auto",
    weights: str | None = None,
    trust_code: bool = False,
    mirror: bool = False,
) -> "Flow":
    """A trained flow, ready to use.

    Args:
        model: a checkpoint, a run directory (its best checkpoint, else its last), a trained model
            of `flowtrain list`, or `hf://user/name` on the Hugging Face Hub.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N` or `mps`.
            For CUDA it turns off TF32 in cuDNN, in the whole process, as likelihoods need float32.
        weights: `ema` or `raw`; by default the averaged weights if the run kept them.
        trust_code: allow a checkpoint to name a module of your own (dotted), which is then
            imported.
        mirror: make the model the mixture of each image and its mirror image, or of all orders
            (`model.orders`): likelihoods are the mean of all, in a pass each, and samples take one
            at random.

    Raises:
        flowtrain.errors.UserError: for a missing or damaged checkpoint, a device that is not
        there, or `mirror` for a model trained without flips and orders.
    """
    from flowtrain.checkpoints.load import load_model
    from flowtrain.system import device as devices

    loaded = load_model(os.fspath(model), devices.resolve(str(device)), weights, trust_code, mirror)
    return loaded.flow


def check(
    flow: "Flow | Foreign", x: "Batch", seed: int = 0, train: "Batch | None" = None
) -> "list[Finding]":
    """The findings of `flowtrain doctor` about any flow.

    Args:
        flow: a flow of flowtrain, or one of another library with its contract.
        x: images or points that the flow was not trained on, as for `Flow.log_prob`.
        seed: of the noise images, the samples and the dequantization noise.
        train: images that it was trained on, whose bits/dim a project may have printed.

    Raises:
        flowtrain.errors.UserError: for a flow that has none of the known forms.
        ValueError: for images of another shape, or with values outside 0..Q-1.
    """
    from flowtrain.tools.doctor.examine import check

    return check(flow, x, seed, train)


def quality(
    images: "Batch",
    reference: "Batch | Statistics",
    features: str | None = None,
    device: "str | torch.device" = "auto",
) -> "Quality":
    """The figures of `flowtrain quality`: FID, KID, precision, recall, density and coverage.

    Args:
        images: uint8 with values 0..255, in the forms of `Flow.log_prob`.
        reference: images of the same shape, or `flowtrain.tools.quality.figures.Statistics`.
        features: `inception`, `mnist-cnn` or `cifar-cnn`; by default the classifier for images of
            this shape, else Inception.
        device: as for `load`.

    Raises:
        flowtrain.errors.UserError: for too few images, other types than uint8, or a network that
        does not take them or has no weights.
        ValueError: for images of different shapes.
    """
    from flowtrain.system import device as devices
    from flowtrain.tools.quality import figures

    return figures.quality(images, reference, features, devices.resolve(str(device)))
