"""`flowtrain doctor` on flows of other libraries: sound ones, and faults in three libraries."""

import itertools
import json
import math
import re
import textwrap
import types

import foreign_flows as flows
import pytest
import torch
from cli_helpers import quick
from foreign_flows import BINS, CONVOLUTION, COUPLING, GLOWS, LOG_PROBS, SCALE, SHAPE
from helpers import REPOSITORY
from torch import nn

import flowtrain
from flowtrain.errors import UserError
from flowtrain.foreign.contract import Foreign
from flowtrain.tools.doctor.findings import EXTREME, IMAGES

pytestmark = pytest.mark.run

POINTS = {**flows.POINTS, **flows.OWN, **flows.ESTIMATES}
DIMS = math.prod(SHAPE)
PAGE = (REPOSITORY / "docs" / "howto" / "foreign.md").read_text()
BLOCKS = re.findall(r"^    # (\w+)\.py\n((?:(?:    .*)?\n)+?)(?=\S)", PAGE, re.MULTILINE)
EXAMPLES = {name: textwrap.dedent(text) for name, text in BLOCKS}
NAMES = {"distribution": "affine", "own": "scale"}  # of the flow, if it is not the file's


def checked(contract, count=8, **options):
    """The findings as `{(check, layer, inputs): finding}`."""
    if contract.num_bins is None:
        x = torch.cat([flows.reals(count)] * (contract.shape[0] // 2), dim=1)
    else:
        x = flows.pictures(count, contract.shape[-1]).clamp(max=contract.num_bins - 1)
    return {(f.check, f.layer, f.inputs): f for f in flowtrain.check(contract, x, **options)}


def bad(found):
    """The bad findings. An untrained flow is worse than a uniform coder, as it should be."""
    return {key: f for key, f in found.items() if f.verdict == "bad" and f.check != "likelihood"}


@pytest.mark.parametrize(
    "images, name", [*((True, name) for name in flows.IMAGES), *((False, name) for name in POINTS)]
)
def test_a_sound_flow(images, name):
    """Nothing is bad, and every layer of the library is checked."""
    if images:
        contract = flows.IMAGES[name]()
    else:
        contract = Foreign(POINTS[name](), (4 if name == "residual" else 2,))
    found = checked(contract)
    assert bad(found) == {}
    checks = {check for check, _, _ in found}
    assert {"log-det", "other examples, evaluation", "parameters that change"} <= checks
    assert ("noise below its entropy" in checks) == images
    assert [f.value for f in found.values() if f.check in ("device", "random latents")] == [0, 0]
    layers = {layer for check, layer, _ in found if check == "log-det"}
    assert len(layers) > 1 or name in ("density", "zuko, GMM") or contract.adds_noise


def bits_of(library, flow, nats=0.0, unit=1.0):
    """The project's own bits/dim, whose terms for the bins are `nats`, in `unit` bits."""

    def bits_per_dim(x):
        v = (x + torch.rand(x.shape)) * SCALE
        return (nats - LOG_PROBS[library](flow, v) / DIMS) / math.log(2) * unit

    return bits_per_dim


def of_figure(**options):
    def build(library):
        flow = flows.zuko_glow() if library == "zuko" else GLOWS[library]()
        own = bits_of(library, flow, **options)
        return Foreign(flow, SHAPE, BINS, flat=library == "zuko", bits_per_dim=own)

    return build


def with_fault(inject, **options):
    def build(library):
        flow = GLOWS[library](**options)
        inject(library, flow)
        return Foreign(flow, SHAPE, BINS)

    return build


def initialized_again(library, flow):
    actnorm = flows.find(flow, "ActNorm")
    if library == "normflows":  # as a checkpoint without the buffer leaves it
        actnorm.data_dep_init_done = torch.tensor(0.0)
    elif library == "FrEIA":
        actnorm.init_on_next_batch = True
    else:

        def forward(own, self, x, context=None):
            if not self.initialized:
                self._initialize(x)
            return own(x)

        actnorm.initialized = torch.tensor(False)
        flows.altered(actnorm, "forward", forward)


def wrong_sign(library, flow):
    flows.altered_log_det(library, flows.find(flow, CONVOLUTION[library]), torch.neg)


def no_jacobian(library, flow):
    flows.altered_log_det(library, flows.find(flow, "Logit"), lambda log_det: 0 * log_det)


def half_precision(library, flow):
    flows.altered_log_det(library, flows.find(flow, COUPLING[library]), torch.Tensor.half)


def counted_twice(library, flow):
    """The container adds the log-det of its 1x1 convolution again."""
    containers = {"normflows": "GlowBlock", "nflows": "CompositeTransform"}
    container = flows.find(flow, containers[library]) if library in containers else flow

    def remembered(own, self, *args, **kwargs):
        z, log_det = own(*args, **kwargs)
        self.last = log_det
        return z, log_det

    def forward(own, self, *args, **kwargs):
        z, log_det = own(*args, **kwargs)
        mixing = next(module for module in self.modules() if hasattr(module, "last"))
        return z, log_det + mixing.last.flatten()[0]

    flows.altered(flows.find(container, CONVOLUTION[library]), flows.FORWARD[library], remembered)
    flows.altered(container, flows.FORWARD[library], forward)


def batch_statistics(library, flow):
    def forward(own, self, x, *args, **kwargs):
        z, log_det = own(x, *args, **kwargs)
        centre = (z[0] if isinstance(z, tuple) else z).mean(0, keepdim=True)
        return ((z[0] - centre,) if isinstance(z, tuple) else z - centre), log_det

    flows.altered(flows.find(flow, COUPLING[library]), flows.FORWARD[library], forward)


def truncated(library, flow):
    """As a solver that stops after a few steps."""

    def inverse(own, self, z, *args, **kwargs):
        x, log_det = own(z, *args, **kwargs)
        if library != "FrEIA":
            return 1.01 * x, log_det
        return ((1.01 * x[0],) if kwargs.get("rev") else x), log_det

    flows.altered(flows.find(flow, COUPLING[library]), flows.INVERSE[library], inverse)


# How to build each fault, the check that it fails, and words of the layer and the reason.
FAULTS = {
    "32 for 256 bins": (
        *(of_figure(nats=math.log(32)), "the project's bits/dim"),
        "32 bins in place of 256",
    ),
    "missing log 256": (of_figure(), "the project's bits/dim", "log 256 is missing"),
    "nats called bits": (
        *(of_figure(nats=math.log(256), unit=math.log(2)), "the project's bits/dim"),
        "nats are called bits",
    ),
    "ActNorm set again": (
        *(with_fault(initialized_again), "parameters that change"),
        "the first batch sets ",
    ),
    "sign of the 1x1 convolution": (
        *(with_fault(wrong_sign), "log-det"),
        "{convolution}: it has the wrong sign",
    ),
    "logit without Jacobian": (
        *(with_fault(no_jacobian, logit=True), "log-det"),
        "Logit: it is missing",
    ),
    "permutation counted twice": (
        *(with_fault(counted_twice), "log-det"),
        "{convolution} counts twice",
    ),
    "batch statistics": (
        *(with_fault(batch_statistics), "other examples, evaluation"),
        "{coupling}: the first layer that reads them",
    ),
    "truncated inverse": (*(with_fault(truncated), "inverse of forward"), "{coupling}"),
    "float16 log-det": (
        *(with_fault(half_precision), "digits of the result"),
        "{coupling}: they are torch.float16",
    ),
}


def of_input(change, bins=BINS, **options):
    """The bits/dim of inputs `change(x, u)`, without terms for their map."""

    def build(flow):
        def bits_per_dim(x):
            z, log_det = flow(change(x, torch.rand(x.shape)))
            log_prob = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1) + log_det
            return math.log2(bins) - log_prob / (DIMS * math.log(2))

        return Foreign(flow, SHAPE, bins, bits_per_dim=bits_per_dim, **options)

    return build


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_a_logit_that_is_missing_in_a_figure(alpha):
    """Also with many black and white entries, where its log-determinant depends on the noise."""
    own = of_input(
        lambda x, u: torch.logit(alpha + (1 - 2 * alpha) * (x + u) / 17), 17, alpha=alpha
    )
    x = (flows.pictures(256).float() / 8 - 12).clamp(0, 16).to(torch.uint8)
    reason = next(f.reason for f in flowtrain.check(own(Likely(0)), x) if "project" in f.check)
    assert reason.endswith("the log-determinant of the logit is missing")


def test_an_offset_that_is_missing_in_a_figure():
    """The flow raises for other mistakes."""
    own = of_input(lambda x, u: (x + u) * SCALE, offset=-0.5)
    found = checked(own(Bounded(0)))
    assert found["the project's bits/dim", "", IMAGES].reason.endswith(": the offset is missing")


OF_FIGURES = [fault for fault, (_, check, _) in FAULTS.items() if check == "the project's bits/dim"]


@pytest.mark.parametrize(
    "fault, library", [*itertools.product(FAULTS, GLOWS), *itertools.product(OF_FIGURES, ["zuko"])]
)
def test_a_fault_is_named(fault, library):
    build, check, words = FAULTS[fault]
    found = bad(checked(build(library)))
    sentences = [f"{f.layer}: {f.reason}" for f in found.values() if f.check == check]
    if library != "zuko":
        words = words.format(convolution=CONVOLUTION[library], coupling=COUPLING[library])
    assert any(words in sentence for sentence in sentences), found
    if "bits/dim" in check:
        assert {key[0] for key in found} == {check}
    else:
        assert all(key[0] != "the project's bits/dim" for key in found)


LINEAR, LOG_DET = "LULinearTransform", "log_abs_det_jacobian"
# The part of zuko's distribution, its method and the change, the check, and its words.
ZUKO = {
    "sign of a linear map": (
        *(LINEAR, LOG_DET, lambda own, self, x, y: -own(x, y), "log-det"),
        f"{LINEAR}: it has the wrong sign",
    ),
    "logit without Jacobian": (
        *("Inverse", LOG_DET, lambda own, self, x, y: 0 * own(x, y), "log-det"),
        "Inverse: it is missing",
    ),
    "linear map counted twice": (
        *("NormalizingFlow", "log_prob"),
        lambda own, self, x: own(x) + self.transform.transforms[1].call_and_ladj(x)[1],
        *("log_prob", "it is not the base density of the latent plus the log-det"),
    ),
    "batch statistics": (
        *("CouplingTransform", "call_and_ladj"),
        lambda own, self, x: (own(x)[0] - own(x)[0].mean(0), own(x)[1]),
        *("other examples, evaluation", "CouplingTransform: the first layer that reads them"),
    ),
    "truncated inverse": (
        *("CouplingTransform", "_inverse", lambda own, self, z: 1.01 * own(z)),
        *("inverse of forward", "CouplingTransform"),
    ),
    "float16 log-det": (
        *("CouplingTransform", "call_and_ladj", lambda own, self, x: (own(x)[0], own(x)[1].half())),
        *("digits of the result", "CouplingTransform: they are torch.float16"),
    ),
}


@pytest.mark.parametrize("fault", ["", *ZUKO])
def test_a_fault_in_zuko_is_named(fault):
    flow = flows.zuko_glow(logit=True)
    if fault:
        name, method, change, check, words = ZUKO[fault]
        flows.altered_part(flow, name, method, change)
    found = bad(checked(Foreign(flow, SHAPE, BINS, flat=True)))
    if fault:
        assert any(
            key[0] == check and words in f"{f.layer}: {f.reason}" for key, f in found.items()
        )
    else:
        assert found == {}


def test_layers_of_large_images_are_checked_on_a_part():
    """The ActNorm of FrEIA holds its size, so the part shows nothing about it."""
    flow = flows.freia_glow(side=32)
    found = checked(Foreign(flow, (1, 32, 32), BINS), 4)
    assert bad(found) == {} and ("log-det", "module_list/1 ActNorm", IMAGES) in found
    wrong_sign("FrEIA", flow)
    found = checked(Foreign(flow, (1, 32, 32), BINS), 4)
    wrong = {f.layer: f.reason for f in bad(found).values()}
    assert wrong == {"module_list/2 Fixed1x1Conv": "it has the wrong sign"}


def more(amount):
    return lambda own, self, *args: own(*args) + amount


def of_inverse(own, self, z):
    x, log_det = own(z)
    return x, -log_det


class Likely(nn.Module):
    """Probabilities that add up to more than 1, if `nats` is not 0."""

    def __init__(self, nats):
        super().__init__()
        self.nats = nats

    def forward(self, x):
        return x, self.nats

    def inverse(self, z):
        return z, -self.nats


class Bounded(Likely):
    def forward(self, x):
        if x.min() < -0.5 or x.max() >= 1:
            raise ValueError("outside of the domain")
        return super().forward(x)


class Few(Likely):
    """It raises for many images."""

    def forward(self, x):
        if len(x) > 2:
            raise ValueError("too many")
        return super().forward(x)


class Contrast(Likely):
    """NaN for constant images."""

    def forward(self, x):
        contrast = x.flatten(1).amax(1) - x.flatten(1).amin(1)
        return x, 0 * (BINS * contrast - 1).log()


class Elsewhere(flows.Scaled):
    """It computes with a tensor on the CPU, and in float32."""

    def forward(self, x):
        z, log_det = super().forward(x)
        return (z + torch.zeros(2)).float(), log_det


class Centred(flows.Scaled, nn.Module):
    """The first batch sets the buffer `mean`, if it is NaN, and each call changes `calls`."""

    def __init__(self, mean=math.nan, scale=0.0):
        nn.Module.__init__(self)
        self.log_scale = nn.Parameter(torch.full((2,), scale))
        self.register_buffer("mean", torch.full((2,), mean))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        if self.mean.isnan().any():
            self.mean.copy_(x.mean(0))
        return super().forward(x - self.mean)

    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x + self.mean, log_det


class Unregistered(flows.Scaled):
    """The first batch sets a tensor of an object that is no module."""

    mean = None

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(0)
        return super().forward(x - self.mean)

    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x + (0 if self.mean is None else self.mean), log_det


def of_images(flow, **options):
    return lambda: Foreign(flow, SHAPE, BINS, **options)


def of_points(build, *change):
    def contract():
        flow = build()
        if change:
            flows.altered(flow, *change)
        return Foreign(flow, (2,))

    return contract


def of_few(nats, scale=1.0):
    """All 256 images, with the part of a normal distribution within 2 `scale` of 0."""
    return lambda: Foreign(Likely(nats), (1, 2, 2), 4, scale=scale, offset=-2 * scale)


@pytest.mark.parametrize(
    "build, check, words",
    [
        (of_points(flows.normflows_points, "log_prob", more(1)), "log_prob", "it is not the base"),
        (of_points(flows.Mixture, "log_prob", more(0.5)), "integral", ""),
        (
            of_points(flows.Scaled, "inverse", of_inverse),
            *("log-det of the inverse", "it has the sign of the"),
        ),
        (of_points(lambda: flows.Estimated(bias=1.0)), "log-det", ""),
        (
            of_points(lambda: flows.Around(Centred())),
            *("parameters that change", "the first batch sets mean"),
        ),
        (of_points(lambda: flows.Around(Centred(0.0, math.nan))), "parameters", ""),
        (of_points(Unregistered), "parameters that change", "neither parameters nor buffers"),
        (of_points(Elsewhere), "digits of the result", "in float64, they are torch.float32"),
        (of_images(Likely(200)), "noise below its entropy", "their entropy is 8 bits/dim"),
        (of_images(Likely(450)), "integral", "16 images together have exp("),
        (of_few(0.5), "integral", "all 256 images together have 1.3"),
        (of_images(Contrast(0)), "forward pass", ""),
        (
            of_images(Few(0), bits_per_dim=8.0),
            "the project's bits/dim",
            "Few: ValueError: too many",
        ),
        (of_images(flows.Dequantized(False)), "random latents", "without adds_noise in its"),
        (of_images(Likely(0), adds_noise=True), "random latents", "the flow draws no random"),
        (of_images(flows.Dequantized(False, 1), adds_noise=True), "log-det", "D log Q is missing"),
    ],
)
def test_other_faults(build, check, words):
    found = bad(checked(build()))
    assert any(key[0] == check and words in f.reason for key, f in found.items()), found


def test_what_is_no_fault():
    """Of the flows above."""
    for scale in (1.0, 2.0):  # where the estimate may exceed 1
        found = checked(of_few(0, scale)())
        assert found["integral", "", ""].value == 0 and bad(found) == {}
    found = checked(of_images(Contrast(0))())
    assert found["forward pass", "flow", EXTREME].value == 2  # black and white
    assert found["forward pass", "", IMAGES].value == 0
    found = checked(of_points(Elsewhere)())
    assert found["device", "flow", IMAGES].verdict == "watch"
    for scale in (0.0, math.nan):
        found = checked(Foreign(Centred(0.0, scale), (2,)))
        assert found["parameters that change", "", ""].value == 0
    found = checked(of_points(flows.Kept)())
    assert found["device", "flow", IMAGES].verdict == "watch" and bad(found) == {}


def test_a_check_leaves_the_flow_alone():
    """Also tensors with a history of gradients, and a module in a closure or a global variable."""
    normal, module = flows.trained_normal(), flows.Coupling(flows.batch_norm)
    closure = types.SimpleNamespace(
        forward=lambda x: module(x), inverse=lambda z: module.inverse(z)
    )
    of_file = {"module": module}
    exec(
        "def f(x): return [module(x) for _ in 'a'][0]\ninverse = lambda z: module.inverse(z)",
        of_file,
    )
    of_file["forward"] = eval("lambda x: f(x)", of_file)
    glob = types.SimpleNamespace(forward=of_file["forward"], inverse=of_file["inverse"])
    found = [checked(Foreign(flow, (2,))) for flow in (normal, closure, glob)]
    assert {k: v.verdict for k, v in found[1].items()} == {
        k: v.verdict for k, v in found[2].items()
    }
    assert normal.base_dist.scale.grad_fn is not None and module.training
    assert module.net[0].weight.dtype == torch.float32 and module.net[0].weight.requires_grad
    assert of_file["module"] is module


def test_the_figure_that_a_project_prints():
    """It agrees with the images, with the training images, or with neither."""
    flow = GLOWS["normflows"]()
    dark = flows.pictures(24)[8:] // 8

    def finding(figure, **options):
        found = checked(Foreign(flow, SHAPE, BINS, bits_per_dim=figure), **options)
        return found["the project's bits/dim", "", IMAGES]

    words = finding(0.0, train=dark).reason
    own, of_dark = (float(re.search(f"([0-9.]+){after}", words)[1]) for after in (", and", " for"))
    assert abs(own - of_dark) > 0.1
    assert finding(own).verdict == finding(own, train=dark).verdict == "ok"
    seen = finding(of_dark, train=dark)
    assert seen.verdict == "bad" and seen.reason.endswith("the figure of data seen in training")
    assert "training" not in finding(of_dark).reason
    assert "seen" not in finding(own, train=flows.pictures(8)).reason
    assert finding(own - 8).reason.endswith("log 256 is missing")


def test_a_figure_without_a_distance():
    """NaN is bad, and one image has no standard error."""
    for figure in (math.nan, lambda x: math.nan):
        contract = Foreign(Likely(0), SHAPE, BINS, bits_per_dim=figure)
        assert ("the project's bits/dim", "", IMAGES) in bad(checked(contract, 2))
    for count, train in ((1, None), (2, flows.pictures(1))):
        with pytest.raises(UserError, match="a printed figure needs two t.* images or more"):
            checked(Foreign(Likely(0), SHAPE, BINS, bits_per_dim=8.0), count, train=train)


def test_a_figure_that_raises():
    contract = Foreign(Likely(0), SHAPE, BINS, bits_per_dim=lambda x: x.gone)
    with pytest.raises(UserError, match="bits_per_dim: AttributeError"):
        checked(contract)


@pytest.mark.parametrize("library", GLOWS)
def test_the_true_figure_of_a_project_is_confirmed(library):
    found = checked(of_figure(nats=math.log(256))(library))
    assert found["the project's bits/dim", "", IMAGES].value == 0


def test_the_command(tmp_path):
    pytest.importorskip("zuko", reason="zuko is not installed")
    (tmp_path / "flow.py").write_text(
        "import flowtrain, torch, zuko\n"
        "torch.manual_seed(0)\n"
        "def flow():\n"
        "    own = zuko.flows.MAF(2, transforms=1, hidden_features=[8])\n"
        "    return flowtrain.Foreign(own, (2,))\n"
    )
    words = ("flow.py:flow", "data.name=two_moons", "--num-images", 4)
    done = quick("doctor", *words, cwd=tmp_path).ok()
    assert "running the code of flow.py, because flow.py:flow names it" in done.err
    assert "verdict: ok" in done.out
    assert (tmp_path / "runs" / "foreign" / "flow-flow" / "doctor.json").exists()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_of_the_page(name, tmp_path):
    """Each file of docs/howto/foreign.md, saved and examined."""
    pytest.importorskip({"glow": "normflows", "maf": "nflows"}.get(name, "torch"))
    pytest.importorskip({"spline": "zuko", "inn": "FrEIA"}.get(name, "torch"))
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    data = "digits" if "num_bins" in EXAMPLES[name] else "two_moons"
    words = (f"{name}.py:{NAMES.get(name, name)}", f"data.name={data}", "--num-images", 4)
    quick("doctor", *words, "--json", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {f["check"] for f in found if f["verdict"] == "bad"} <= {"likelihood"}
