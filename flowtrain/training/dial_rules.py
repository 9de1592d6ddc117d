"""The rules of the dial, `flowtrain train DATA --budget TIME --for PURPOSE`.

docs/lab/dial.md has the experiments that they come from.
"""

from dataclasses import dataclass
from typing import Any, Literal

Purpose = Literal["likelihood", "pictures", "latents"]
Colours = Literal["colour", "grey"]


@dataclass(frozen=True)
class Size:
    """A model, for runs of at least so many steps. With fewer, the size before is better."""

    steps: int
    model: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of model. Its sizes, the smallest first, and its settings of training are for images
    in colour, or for grey ones.
    """

    description: str
    sizes: dict[Colours, tuple[Size, ...]]
    train: dict[Colours, dict[str, Any]]
    few: dict[str, Any]  # in place of `train` if images are few


_CAUSAL = {"name": "causal", "blocks": 5, "downsample": 2, "pixels": True, "uniform": 5e-4}
_SMALL = Size(0, {"name": "causal", "width": 48, "blocks": 3, "components": 3, "dropout": 0.1})
_CAUSAL_TRAIN = {"batch_size": 32, "lr": 1e-2, "weight_decay": 0.1, "ema": 0.995}
CAUSAL = Family(
    "causal flow, with the best bits/dim for any time, and samples pixel by pixel",
    sizes={
        "colour": (
            _SMALL,
            Size(200, _CAUSAL | {"width": 96, "units": 16, "components": 5}),
            Size(900, _CAUSAL | {"width": 160, "units": 32, "components": 8}),
            Size(3000, _CAUSAL | {"width": 192, "units": 32, "components": 8}),
            Size(15000, _CAUSAL | {"width": 224, "units": 48, "components": 8}),
        ),
        "grey": (
            _SMALL,
            Size(200, _CAUSAL | {"width": 64, "units": 32, "components": 10}),
            Size(3500, _CAUSAL | {"width": 128, "units": 48, "components": 20}),
        ),
    },
    train={"colour": _CAUSAL_TRAIN, "grey": _CAUSAL_TRAIN},
    few={"batch_size": 64, "lr": 5e-3, "weight_decay": 1.0, "schedule": "constant"},
)
# `steps` has a number for each level. Images with fewer levels take the first ones.
_GLOW = {"name": "glow", "initialization": "whitening"}
GLOW = Family(
    "Glow, which encodes and decodes in one pass, with latents at several scales",
    sizes={
        "colour": (
            Size(0, _GLOW | {"steps": [8, 4, 2], "width": 64}),
            Size(800, _GLOW | {"steps": [12, 4, 2], "width": 160}),
        ),
        "grey": (
            Size(0, _GLOW | {"steps": [8, 8, 4], "width": 64}),
            Size(800, _GLOW | {"steps": [8, 8, 4], "width": 96, "coupling": "spline"}),
        ),
    },
    train={
        "colour": {"batch_size": 64, "lr": 7e-3},
        "grey": {"batch_size": 32, "lr": 5e-3, "clip_norm": 1.0},
    },
    few={"batch_size": 64, "lr": 8e-3, "weight_decay": 1.0, "optimizer": "adamw", "clip_norm": 1.0},
)
FAMILIES: dict[Purpose, Family] = {"likelihood": CAUSAL, "pictures": CAUSAL, "latents": GLOW}

# Training sets of fewer values (images times dimensions) get the smallest size, whose weight decay
# lets it train for any time. A run ends after so many passes over the images: few images gain
# nothing from more, and others are learned by heart.
FEW = 2 * 10**6
PASSES = 30
PASSES_OF_FEW = 200
LEAST_STEPS = 1000

# The images of a folder get the first of these sides that half of them have.
SIDES = (32, 16, 8)

# From this share of black and white values on, Glow models the logit.
EXTREMES = 0.3

VALIDATED = 1000  # images, if there are ten times as many
VALIDATIONS = 8  # in a run
