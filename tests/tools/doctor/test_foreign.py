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
from fake_device import device_without_float64
from foreign_flows import BINS, CONVOLUTION, COUPLING, GLOWS, LOG_PROBS, SCALE, SHAPE
from helpers import REPOSITORY
from torch import distributions, nn
from torch.distributions.transforms import identity_transform

import flowtrain
from flowtrain.errors import UserError
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.model import ForeignModel
from flowtrain.tools.doctor import log_dets
from flowtrain.tools.doctor.contract import _own_figure
from flowtrain.tools.doctor.findings import EXTREME, IMAGES
from flowtrain.tools.doctor.log_dets import _middle

pytestmark = pytest.mark.run

POINTS = {**flows.POINTS, **flows.OWN, **flows.ESTIMATES}
DIMS = math.prod(SHAPE)
PAGE = (REPOSITORY / "docs" / "howto" / "foreign.md").read_text()
BLOCKS = re.findall(r"^    # (\w+)\.py\n((?:(?:    .*)?\n)+?)(?=\S)", PAGE, re.MULTILINE)
EXAMPLES = {name: textwrap.dedent(text) for name, text in BLOCKS}
NAMES = {"distribution": "affine", "own": "scale"}  # of the flow, if it is not the file's
FIGURE, OTHERS = "the project's bits/dim", "other examples, evaluation"


def checked(contract, count=8, **options):
    """The findings as `{(check, layer, inputs): finding}`."""
    if contract.num_bins is None:
        x = torch.cat([flows.reals(count)] * 2, dim=1)[:, : contract.shape[0]]
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
    assert {"log-det", OTHERS, "parameters that change"} <= checks
    assert ("noise below its entropy" in checks) == images
    assert [f.value for f in found.values() if f.check in ("device", "random latents")] == [0, 0]
    layers = {layer for check, layer, _ in found if check == "log-det"}
    assert len(layers) > 1 or name in ("density", "zuko, GMM") or contract.adds_noise


def of_figure(nats=0.0, unit=1.0):
    """With the project's own bits/dim, whose terms for the bins are `nats`, in `unit` bits."""

    def build(library):
        flow = flows.zuko_glow() if library == "zuko" else GLOWS[library]()

        def bits_per_dim(x):
            v = (x + torch.rand(x.shape)) * SCALE
            return (nats - LOG_PROBS[library](flow, v) / DIMS) / math.log(2) * unit

        return Foreign(flow, SHAPE, BINS, flat=library == "zuko", bits_per_dim=bits_per_dim)

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


def half_of(library, flow):
    flows.altered_log_det(library, flows.find(flow, COUPLING[library]), torch.Tensor.half)


def counted_twice(library, flow):
    """The container adds the log-det of its 1x1 convolution again."""
    containers = {"normflows": "GlowBlock", "nflows": "CompositeTransform"}
    container = flows.find(flow, containers[library]) if library in containers else flow
    method, last = flows.FORWARD[library], []

    def remember(z, log_det):
        last[:] = [log_det]
        return z, log_det

    flows.altered_results(flows.find(container, CONVOLUTION[library]), method, remember)
    flows.altered_results(container, method, lambda z, own: (z, own + last[0].flatten()[0]))


def batch_statistics(library, flow):
    coupling, method = flows.find(flow, COUPLING[library]), flows.FORWARD[library]
    flows.altered_results(coupling, method, lambda z, log_det: (z - z.mean(0), log_det))


def truncated(library, flow):
    """As a solver that stops after a few steps."""
    coupling, method = flows.find(flow, COUPLING[library]), flows.INVERSE[library]
    flows.altered_results(coupling, method, lambda x, log_det: (1.01 * x, log_det))


IN_NATS = {"nats": math.log(256), "unit": math.log(2)}
# How to build each fault, the check that it fails, and words of the layer and the reason.
FAULTS = {
    "32 for 256 bins": (of_figure(nats=math.log(32)), FIGURE, "32 bins in place of 256"),
    "missing log 256": (of_figure(), FIGURE, "log 256 is missing"),
    "nats called bits": (of_figure(**IN_NATS), FIGURE, "nats are called bits"),
    "ActNorm set again": (initialized_again, "parameters that change", "the first batch sets "),
    "sign of a convolution": (wrong_sign, "log-det", "{convolution}: it has the wrong sign"),
    "logit without Jacobian": (no_jacobian, "log-det", "Logit: it is missing"),
    "permutation counted twice": (counted_twice, "log-det", "{convolution} counts twice"),
    "batch statistics": (batch_statistics, OTHERS, "{coupling}: the first layer that reads them"),
    "truncated inverse": (truncated, "inverse of forward", "{coupling}"),
    "float16 log-det": (half_of, "digits of the result", "{coupling}: they are torch.float16"),
}


def of_input(flow, change, bins=BINS, **options):
    """With the bits/dim of inputs `change(x, u)`, without terms for their map."""

    def bits_per_dim(x):
        z, log_det = flow(change(x, torch.rand(x.shape)))
        log_prob = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1) + log_det
        return math.log2(bins) - log_prob / (DIMS * math.log(2))

    return Foreign(flow, SHAPE, bins, bits_per_dim=bits_per_dim, **options)


@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_a_logit_that_is_missing_in_a_figure(alpha):
    """Also with many black and white entries, where its log-determinant depends on the noise."""
    beta = 1 - 2 * alpha
    own = of_input(Likely(0), lambda x, u: (alpha + beta * (x + u) / 17).logit(), 17, alpha=alpha)
    x = (flows.pictures(256).float() / 8 - 12).clamp(0, 16).to(torch.uint8)
    reason = next(f.reason for f in flowtrain.check(own, x) if "project" in f.check)
    assert reason.endswith("the log-determinant of the logit is missing")


def test_an_offset_that_is_missing_in_a_figure():
    """The flow raises for other mistakes."""
    flow = Likely(0, lambda x: x.min() < -0.5 or x.max() >= 1)
    found = checked(of_input(flow, lambda x, u: (x + u) * SCALE, offset=-0.5))
    assert found[FIGURE, "", IMAGES].reason.endswith(": the offset is missing")


def is_named(found, check, words):
    return any(f.check == check and words in f"{f.layer}: {f.reason}" for f in found.values())


OF_FIGURES = [fault for fault, (_, check, _) in FAULTS.items() if check == FIGURE]


@pytest.mark.parametrize(
    "fault, library", [*itertools.product(FAULTS, GLOWS), *itertools.product(OF_FIGURES, ["zuko"])]
)
def test_a_fault_is_named(fault, library):
    build, check, words = FAULTS[fault]
    if check == FIGURE:
        found = bad(checked(build(library)))
        assert {key[0] for key in found} == {FIGURE}
    else:
        words = words.format(convolution=CONVOLUTION[library], coupling=COUPLING[library])
        flow = GLOWS[library](logit=build is no_jacobian)
        build(library, flow)
        found = bad(checked(Foreign(flow, SHAPE, BINS)))
    assert is_named(found, check, words), found


def twice(own, self, x):
    return own(x) + self.transform.transforms[1].call_and_ladj(x)[1]


def of_both(change):
    """A change of the latents and the log-det."""
    return lambda own, self, x: change(*own(x))


LOG_DET, COUPLED = "log_abs_det_jacobian", ("CouplingTransform", "call_and_ladj")
# The part of zuko's distribution, its method and the change, the check, and its words.
ZUKO = [
    ("LULinearTransform", LOG_DET, lambda own, _, *xy: -own(*xy), "log-det", "the wrong sign"),
    ("Inverse", LOG_DET, lambda own, _, *xy: 0 * own(*xy), "log-det", "it is missing"),
    ("NormalizingFlow", "log_prob", twice, "log_prob", "it is not the base density of the latent"),
    (*COUPLED, of_both(lambda z, of: (z - z.mean(0), of)), OTHERS, "the first layer that reads"),
    (COUPLED[0], "_inverse", lambda own, _, z: 1.01 * own(z), "inverse of forward", ""),
    (*COUPLED, of_both(lambda z, of: (z, of.half())), "digits of the result", "torch.float16"),
]


@pytest.mark.parametrize("part, method, change, check, words", ZUKO)
def test_a_fault_in_zuko_is_named(part, method, change, check, words):
    flow = flows.zuko_glow(logit=True)
    flows.altered_part(flow, part, method, change)
    found = bad(checked(Foreign(flow, SHAPE, BINS, flat=True)))
    layers = [f.layer for f in found.values() if f.check == check and words in f.reason]
    assert any(part in layer for layer in layers) or check == "log_prob" and layers


def test_layers_of_large_images_are_checked_on_a_part():
    """The ActNorm of FrEIA holds its size, so the part shows nothing about it."""
    flow = flows.freia_glow(side=32)
    found = checked(Foreign(flow, (1, 32, 32), BINS), 4)
    assert bad(found) == {} and ("log-det", "module_list/1 ActNorm", IMAGES) in found
    wrong_sign("FrEIA", flow)
    found = checked(Foreign(flow, (1, 32, 32), BINS), 4)
    wrong = {f.layer: f.reason for f in bad(found).values()}
    assert wrong == {"module_list/2 Fixed1x1Conv": "it has the wrong sign"}


class Likely(nn.Module):
    """Probabilities that add up to more than 1, if `nats` is not 0."""

    def __init__(self, nats=0, refuses=lambda x: False):
        super().__init__()
        self.nats, self.refuses = nats, refuses

    def forward(self, x):
        if self.refuses(x):
            raise ValueError("refused")
        return x, self.nats

    def inverse(self, z):
        return z, -self.nats


class Contrast(Likely):
    """NaN for constant images."""

    def forward(self, x):
        contrast = x.flatten(1).amax(1) - x.flatten(1).amin(1)
        return x, 0 * (BINS * contrast - 1).log()


class Centred(flows.Scaled, nn.Module):
    """The first batch sets the buffer `mean`, if it is NaN, and each call changes `calls`."""

    def __init__(self, mean, scale=0.0):
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


class Sets(flows.Mixture):
    """The first batch sets the means of a density without latents."""

    fresh = True

    def log_prob(self, x):
        if self.fresh:
            self.means.data, self.fresh = x[:2, 0].clone(), False
        return super().log_prob(x)


class Periodic:
    """The uniform density on a torus, which repeats beyond one period."""

    def log_prob(self, x):
        return x.new_full((len(x),), -4 * math.log(2))

    def sample(self, n):
        return 2 * torch.rand(n, 4) - 1


def of_images(build, *args, **options):
    return lambda: Foreign(build(*args), SHAPE, BINS, **options)


def of_points(build, *args, **options):
    return lambda: Foreign(build(*args, **options), (2,))


def of_few(nats, scale=1.0):
    """All 256 images, with the part of a normal distribution within 2 `scale` of 0."""
    return lambda: Foreign(Likely(nats), (1, 2, 2), 4, scale=scale, offset=-2 * scale)


def many(x):
    return len(x) > 2


def having(build=flows.Scaled, **changes):
    """A flow of points with other results of its methods: `change(result, log_det)`."""

    def contract():
        flow = build()
        for method, change in changes.items():
            flows.altered_results(flow, method, change)
        return Foreign(flow, (2,))

    return contract


def density(flow, change=lambda own, self, x: own(x) + 1):
    flows.altered(flow, "log_prob", change)
    return flow


LESS = lambda own, self, x: own(x) - 1  # noqa: E731
CHANGE = "parameters that change"
READS = of_points(lambda: density(flows.Mixture(), lambda own, self, x: own(x - x.mean(0))))
# With a tensor on the CPU, and in float32.
ELSEWHERE = having(forward=lambda z, log_det: ((z + torch.zeros(2)).float(), log_det))
# Latents depend on the estimate of the log-det, as of a solver with adaptive steps.
SOLVED = having(
    forward=lambda z, log_det: (z + 3e-4 * torch.rand_like(z), log_det),
    inverse=lambda x, log_det: (x - 3e-4 * torch.rand_like(x), log_det),
)


@pytest.mark.parametrize(
    "contract, check, words",
    [
        (having(inverse=lambda x, of: (x, -of)), "log-det of the inverse", "the sign of the"),
        (of_points(flows.Estimated, bias=1.0), "log-det", ""),
        (of_points(lambda: flows.Around(Centred(math.nan))), CHANGE, "the first batch sets mean"),
        (of_points(lambda: flows.Around(Centred(0.0, math.nan))), "parameters", ""),
        (of_points(Unregistered), CHANGE, "neither parameters nor buffers"),
        (ELSEWHERE, "digits of the result", "in float64, they are torch.float32"),
        (of_points(lambda: density(flows.normflows_points())), "log_prob", "it is not the base"),
        (of_points(lambda: density(flows.Mixture())), "integral", ""),
        (lambda: Foreign(density(flows.Mixture(1)), (1,)), "integral", ""),
        (lambda: Foreign(density(flows.Mixture(4)), (4,)), "integral", "it is about 2."),
        (lambda: Foreign(density(flows.Mixture(4), LESS), (4,)), "integral", "or the samples are"),
        (of_points(Sets), CHANGE, "the first batch sets means"),
        (READS, OTHERS, "its log-density reads them"),
        # far from 0, as in the tails of a spline
        (having(forward=lambda z, of: (z, of + 0.1 * (z.abs() > 1.5).any(1))), "log-det", ""),
        (of_images(Likely, 200), "noise below its entropy", "their entropy is 8 bits/dim"),
        (of_images(Likely, 450), "integral", "16 images together have exp("),
        (of_few(0.5), "integral", "all 256 images together have 1.3"),
        (of_images(Contrast), "forward pass", ""),
        (of_images(Likely, 0, many, bits_per_dim=8.0), FIGURE, "Likely: ValueError: refused"),
        (of_images(flows.Dequantized, False), "random latents", "without adds_noise in its"),
        (of_images(Likely, adds_noise=True), "random latents", "the flow draws no random"),
        (of_images(flows.Dequantized, False, 1, adds_noise=True), "log-det", "D log Q is missing"),
    ],
)
def test_other_faults(contract, check, words):
    found = bad(checked(contract()))
    assert is_named(found, check, words), found


def test_what_is_no_fault():
    """Of the flows above."""
    for scale in (1.0, 2.0):  # where the estimate may exceed 1
        found = checked(of_few(0, scale)())
        assert found["integral", "", ""].value == 0 and bad(found) == {}
    found = checked(of_images(Contrast)())
    assert found["forward pass", "flow", EXTREME].value == 2  # black and white
    assert found["forward pass", "", IMAGES].value == 0
    masked = flows.Coupling()
    masked.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    for contract in (
        Foreign(masked, (2,)),
        Foreign(flows.Mixture(1), (1,)),
        Foreign(flows.Noisy(), SHAPE, BINS, adds_noise=True),
    ):
        assert bad(checked(contract)) == {}
    for sound in (flows.Mixture(4), Periodic()):
        found = checked(Foreign(sound, (4,)))
        assert found["integral", "", ""].value == 0 and bad(found) == {}
    for scale in (0.0, math.nan):
        found = checked(Foreign(Centred(0.0, scale), (2,)))
        assert found["parameters that change", "", ""].value == 0
    for contract, check, layer in (
        (ELSEWHERE, "device", "flow"),
        (of_points(flows.Kept), "device", "flow"),
        (having(flows.Swapped, forward=lambda z, _: (z, torch.zeros(len(z)))), "device", "flow"),
        (SOLVED, "random latents", "flow"),
        (of_images(flows.OfIntegers, scale=1.0, adds_noise=True), "random latents", ""),
    ):
        found = checked(contract())
        assert found[check, layer, IMAGES].verdict == "watch"
        assert bad(found) == {} or contract is ELSEWHERE
        assert contract is not SOLVED or ("log-det", "flow", IMAGES) in found


def test_values_of_a_domain():
    """One entry is above 18, as an age, and the other any number."""
    base = distributions.Normal(torch.zeros(2), torch.ones(2), validate_args=True)
    of_one = distributions.StackTransform([distributions.ExpTransform(), identity_transform], dim=1)
    steps = [of_one, distributions.AffineTransform(torch.tensor([18.0, 0.0]), 1.0)]
    flow = distributions.TransformedDistribution(base, steps)
    found = flowtrain.check(Foreign(flow, (2,)), flow.sample((8,)))
    assert [f for f in found if f.verdict == "bad"] == []
    # The rectangle around samples in a triangle has cells outside of it.

    class Triangle:
        """Uniform on u + v <= 1."""

        def log_prob(self, v):
            if (v.sum(dim=1) > 1).any():
                raise ValueError("outside of the triangle")
            return v.new_full((len(v),), math.log(2))

        def sample(self, n):
            u = 0.999 * torch.rand(n, 2)
            return torch.where(u.sum(dim=1, keepdim=True) > 0.999, 0.999 - u, u)

    found = flowtrain.check(Foreign(Triangle(), (2,)), Triangle().sample(64))
    assert [f for f in found if f.verdict == "bad"] == []


def test_layers_of_large_images_that_take_no_part(monkeypatch):
    """Their Jacobian would not fit into memory."""

    def of_at_least_16(x):
        assert min(x.shape[2:]) >= 16

    assert _middle(of_at_least_16, torch.zeros(1, 3, 64, 48)).shape == (1, 3, 16, 16)
    assert _middle(of_at_least_16, torch.zeros(1, 512, 2, 2)).shape == (1, 512, 2, 2)
    monkeypatch.setattr(log_dets, "LARGEST_JACOBIAN", 1023)
    flow = flows.Scaled()
    flow.log_scale = 0.1 * torch.ones(1, 32, 32)
    found = checked(Foreign(flow, (1, 32, 32), BINS), 4)
    assert bad(found) == {} and ("log-det", "flow", IMAGES) not in found
    assert ("log-det", "", IMAGES) in found


def test_the_autocast_of_the_caller():
    with torch.autocast("cpu", torch.bfloat16):
        assert bad(checked(Foreign(flows.Coupling(), (2,)))) == {}


def test_a_layer_that_a_flow_calls_twice():
    flows.library("nflows")
    from nflows import transforms

    scale = transforms.PointwiseAffineTransform(0.1, 1.5)
    flow = transforms.CompositeTransform([scale, scale])
    assert bad(checked(Foreign(flow, (1, 32, 32), BINS), 4)) == {}


def test_a_check_leaves_the_flow_alone():
    """Also tensors with a history of gradients, and a module in a closure or a global variable."""
    normal, module = flows.trained_normal(), flows.Coupling(flows.batch_norm)
    closure = flows.of_closures(module)
    of_file = {"module": module}
    exec(
        "def f(x): return [module(x) for _ in 'a'][0]\ninverse = lambda z: module.inverse(z)",
        of_file,
    )
    of_file["forward"] = eval("lambda x: f(x)", of_file)
    glob = types.SimpleNamespace(forward=of_file["forward"], inverse=of_file["inverse"])
    state = torch.get_rng_state()
    with torch.inference_mode():  # in which there are no Jacobians
        _, found, same = (checked(Foreign(flow, (2,))) for flow in (normal, closure, glob))
    assert torch.equal(torch.get_rng_state(), state)
    assert {f.verdict for f in found.values() if f.check == "log-det"} == {"ok"}
    with pytest.raises(UserError, match=r"Linear: expected a flow .* flowtrain\.Foreign"):
        flowtrain.check(nn.Linear(2, 2), flows.reals(8))
    assert [(k, v.verdict) for k, v in found.items()] == [(k, v.verdict) for k, v in same.items()]
    assert normal.base_dist.scale.grad_fn is not None and module.training
    assert module.net[0].weight.dtype == torch.float32 and module.net[0].weight.requires_grad
    assert of_file["module"] is module


def test_the_figure_that_a_project_prints():
    """It agrees with the images, with the training images, or with neither."""
    flow = GLOWS["normflows"]()
    dark = flows.pictures(24)[8:] // 8

    def finding(figure, **options):
        found = checked(Foreign(flow, SHAPE, BINS, bits_per_dim=figure), **options)
        return found[FIGURE, "", IMAGES]

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
    """NaN is bad, one image has no standard error, and a function may raise."""
    for figure in (math.nan, lambda x: math.nan):
        assert (FIGURE, "", IMAGES) in bad(checked(of_images(Likely, bits_per_dim=figure)(), 2))
    for figure, count, train, said in (
        (8.0, 1, None, "a printed figure needs two test images or more"),
        (8.0, 2, flows.pictures(1), "a printed figure needs two training images or more"),
        (lambda x: x.gone, 8, None, "bits_per_dim: AttributeError"),
    ):
        with pytest.raises(UserError, match=said):
            checked(of_images(Likely, bits_per_dim=figure)(), count, train=train)


def test_the_figure_is_computed_where_the_file_has_the_flow():
    """A project's function has a flow on the CPU, say, and `--device` another one."""
    flow = flows.Coupling()
    model = ForeignModel(Foreign(flow, (2,), BINS))
    with device_without_float64() as device:
        model.to(device)
        assert (
            _own_figure(model, lambda x: float(flow.net[0].weight.is_cpu), torch.zeros(4, 2)) == 1
        )
        assert model.device == flow.net[0].weight.device == device


@pytest.mark.parametrize("library", GLOWS)
def test_the_true_figure_of_a_project_is_confirmed(library):
    found = checked(of_figure(nats=math.log(256))(library))
    assert found[FIGURE, "", IMAGES].value == 0


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_of_the_page(name, tmp_path):
    """Each file of docs/howto/foreign.md, saved and examined."""
    pytest.importorskip({"glow": "normflows", "maf": "nflows"}.get(name, "torch"))
    pytest.importorskip({"spline": "zuko", "inn": "FrEIA"}.get(name, "torch"))
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    data = "digits" if "num_bins" in EXAMPLES[name] else "two_moons"
    flow = NAMES.get(name, name)
    quick("doctor", f"{name}.py:{flow}", f"data.name={data}", "--num-images", 4, cwd=tmp_path)
    found = tmp_path / "runs" / "foreign" / f"{name}-{flow}" / "doctor.json"
    findings = json.loads(found.read_text())["findings"]
    assert {f["check"] for f in findings if f["verdict"] == "bad"} <= {"likelihood"}
