"""The findings of `doctor`: numbers with their bounds and verdicts, and `doctor.json`.

`docs/doctor.md` has the effect of crossing each bound on a pixel or on a bit.
"""

import logging
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError

Verdict = Literal["ok", "watch", "bad"]
VERDICTS: tuple[Verdict, ...] = ("ok", "watch", "bad")

logger = logging.getLogger(__name__)

# The error that one layer may make, in the unit interval. An error of half a level loses a pixel of
# 8 bits. The rounding errors of 300 layers (no model here has more) add up to sqrt(300) times the
# error of one layer.
SHARE = 0.5 / 256 / math.sqrt(300)
ROUNDING = 2.0**-24  # of float32, relative
# Relative error of a layer of other code that may be the tolerance of a solver. Whether it matters
# is measured by the round trips of the whole model.
TOLERANCE = 1e-3

# For noise and extreme images, only a value that is not finite is bad. Any flow that fits images
# well stretches noise so far that it does not come back (Behrmann et al. 2021, "Understanding and
# Mitigating Exploding Inverses"). This harms neither images nor samples.
IMAGES, NOISE, SAMPLES = "test images", "uniform noise", "prior samples"
EXTREME = "extreme images"  # the lowest level, the highest, and both as a checkerboard
UNLIKELY = (NOISE, EXTREME)

# The bounds (watch, bad) of each check. A value beyond one gets that verdict. If the second bound
# is the smaller one, smaller values are worse.
BOUNDS = {
    # The number of entries of parameters and buffers, or of images, that are not finite.
    "parameters": (0, 0),
    "parameters that change": (0, 0),
    # The change of a latent with other random numbers. An estimated log-det changes the steps of an
    # adaptive ODE solver, within its tolerance.
    "random latents": (1e-5, TOLERANCE),
    # The change of a latent, or of a log-det in nats, with the other examples of a batch. The steps
    # of an adaptive ODE solver depend on the batch, within its tolerance.
    "other examples, evaluation": (1e-5, 1e-2),
    "other examples, training": (1e-5, 1e-2),
    "forward pass": (0, 0),
    "inverse pass": (0, 0),
    # The factor by which a layer enlarges a rounding error, in a pixel or in a likelihood.
    "lowest log-scale": (math.log(4 * ROUNDING / SHARE), math.log(ROUNDING / SHARE)),
    "highest log-scale": (
        math.log(1e-4 * math.log(2) / ROUNDING),
        math.log(1e-3 * math.log(2) / ROUNDING),
    ),
    "condition number": (SHARE / ROUNDING / 4, SHARE / ROUNDING),
    # Errors of one layer, relative to the entry or to the root mean square, whichever is larger.
    "inverse of forward": (SHARE / 4, SHARE),
    "forward of inverse": (SHARE / 4, SHARE),
    # Binary digits of a latent or log-det that are fewer than in its input.
    "digits of the result": (0, 0),
    # Tensors on the CPU for an input on another device: an error there, but not here.
    "device": (0, 1),
    # Errors in bits per dimension of the whole image.
    "log-det": (1e-4, 1e-3),
    "log-det of the inverse": (1e-4, 1e-3),
    "log_prob": (1e-5, 1e-4),
    "float32 likelihood": (1e-4, 1e-3),
    # Errors of the whole model, in levels (data) and in bits per dimension (latents).
    "data round trip, float32": (0.05, 0.5),
    "data round trip, float64": (0.005, 0.05),
    "latent round trip, float32": (1e-4, 1e-3),
    "latent round trip, float64": (1e-5, 1e-4),
    # The distance of a density's integral from 1, or by which a sum of probabilities exceeds 1.
    "integral": (0.01, 0.05),
    # Nats by which the likeliest image of uniform noise is below the entropy, D log Q.
    "noise below its entropy": (20, 40),
    # The distance from the project's own figure, beyond six standard errors.
    "the project's bits/dim": (1e-3, 1e-2),
    # Bits of the test images, relative to a uniform coder with log2(Q) for each entry.
    "likelihood": (1, 1),
    # A fraction. If fewer than one image in 1,000 changes, a value lies at the edge of its bin, but
    # the inverse is right.
    "images that come back exactly": (1, 0.999),
}


@dataclass(frozen=True)
class Finding:
    """One number with its bounds.

    check: the measured quantity, a key of `BOUNDS`.
    layer: its name, or "" for the whole model.
    inputs: "test images", "uniform noise", "extreme images", "prior samples", or "" for a number of
        the weights.
    value: the worst over all inputs; None if it is not finite or could not be computed.
    watch, bad: the bounds, as in `BOUNDS`. The verdict is ok up to `watch` (inclusive). If `bad` is
        the largest float, or minus it, only a value that is not finite is bad.
    reason: the cause, if the value shows one.
    """

    check: str
    layer: str
    inputs: str
    value: float | None
    watch: float
    bad: float
    verdict: Verdict
    reason: str = ""

    @property
    def severity(self) -> float:
        """Orders the findings of one check: larger is worse. It is inf if there is no value."""
        if self.value is None:
            return math.inf
        return -self.value if self.bad < self.watch else self.value


@dataclass
class Notes:
    """The worst finding per check, layer and kind of input, in the order of their first values."""

    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)

    def add(
        self,
        check: str,
        value: float | Tensor,
        layer: str = "",
        inputs: str = "",
        harmless: bool = False,
        reason: str = "",
    ) -> None:
        new = replace(judge(check, float(value), layer, inputs, harmless), reason=reason)
        old = self.findings.setdefault((check, layer, inputs), new)
        if new.severity > old.severity:
            self.findings[check, layer, inputs] = new

    def failed(
        self, checks: tuple[str, ...], error: Exception, layer: str = "", inputs: str = ""
    ) -> None:
        """Adds checks that have no value because of `error`. Logs each reason once."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        if reason not in self.reasons:
            self.reasons.add(reason)
            logger.warning(f"{layer or 'the model'}: {checks[0]}: {reason}")
        for check in checks:
            self.add(check, math.nan, layer, inputs, reason=reason)


def judge(
    check: str, value: float, layer: str = "", inputs: str = "", harmless: bool = False
) -> Finding:
    """The finding for a value: its bounds and its verdict.

    If it is `harmless`, or for unlikely images, only a value that is not finite is bad.
    """
    watch, bad = BOUNDS[check]
    if (harmless or inputs in UNLIKELY) and watch != bad:
        bad = math.copysign(sys.float_info.max, bad - watch)
    sign = -1 if bad < watch else 1
    verdict: Verdict = (
        "ok" if sign * value <= sign * watch else "watch" if sign * value <= sign * bad else "bad"
    )
    known = value if math.isfinite(value) else None
    return Finding(check, layer, inputs, known, watch, bad, verdict)


def overall(findings: list[Finding]) -> Verdict:
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="ok")


def worst(findings: list[Finding]) -> list[Finding]:
    """The bad findings, causes before effects: in the order of `BOUNDS`, then by severity."""
    checks = list(BOUNDS)
    bad = [finding for finding in findings if finding.verdict == "bad"]
    return sorted(bad, key=lambda finding: (checks.index(finding.check), -finding.severity))


def count(findings: list[Finding]) -> dict[Verdict, int]:
    return {kind: sum(finding.verdict == kind for finding in findings) for kind in VERDICTS}


def require_none_bad(findings: list[Finding]) -> None:
    """Raises `RunError` naming the layers of the bad findings, the worst first."""
    if bad := worst(findings):
        names = list(dict.fromkeys(finding.layer or "the whole model" for finding in bad))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise RunError(
            f"{len(bad)} of {len(findings)} findings are bad, the worst first: "
            f"{', '.join(names[:5])}{more}"
        )


def as_json(
    findings: list[Finding], model: LoadedModel, data: DataSet, num_images: int, seed: int
) -> dict[str, Any]:
    """The content of `doctor.json`: the findings, and the arguments of `examine`."""
    return {
        "verdict": overall(findings),
        "counts": count(findings),
        "checkpoint": str(model.checkpoint.path),
        "weights": model.weights,
        "step": model.checkpoint.meta["step"],
        "dataset": data.config.name,
        "num_images": min(num_images, len(data.split("test"))),
        "seed": seed,
        "findings": [asdict(finding) for finding in findings],
    }
