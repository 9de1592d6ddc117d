"""`flowtrain doctor` on flows of other libraries: sound ones, and faults in three libraries."""

import json
import math
import re
import textwrap

import foreign_flows as flows
import pytest
import torch
from cli_helpers import quick
from foreign_flows import BINS, CONVOLUTION, COUPLING, GLOWS, LOG_PROBS, SCALE, SHAPE
from helpers import REPOSITORY

import flowtrain
from flowtrain.errors import UserError
from flowtrain.foreign.contract import Foreign
from flowtrain.tools.doctor.findings import IMAGES

pytestmark = pytest.mark.run

DIMS = math.prod(SHAPE)
PAGE = (REPOSITORY / "docs" / "howto" / "foreign.md").read_text()
BLOCKS = re.findall(r"^    # (\w+)\.py\n((?:(?:    .*)?\n)+?)(?=\S)", PAGE, re.MULTILINE)
EXAMPLES = {name: textwrap.dedent(text) for name, text in BLOCKS}
NAMES = {"distribution": "affine", "own": "scale"}  # of the flow, if it is not the file's


def checked(contract, count=8):
    """The findings as `{(check, layer, inputs): finding}`."""
    images = contract.num_bins is not None
    x = flows.pictures(count, contract.shape[-1]) if images else flows.reals(count)
    return {(f.check, f.layer, f.inputs): f for f in flowtrain.check(contract, x)}


def bad(found):
    """The bad findings. An untrained flow is worse than a uniform coder, as it should be."""
    return {key: f for key, f in found.items() if f.verdict == "bad" and f.check != "likelihood"}


@pytest.mark.parametrize("name", [*flows.IMAGES, *flows.POINTS])
def test_a_sound_flow(name):
    """Nothing is bad, and every layer of the library is checked."""
    images = name in flows.IMAGES
    contract = flows.IMAGES[name]() if images else Foreign(flows.POINTS[name](), (2,))
    found = checked(contract)
    assert bad(found) == {}
    checks = {check for check, _, _ in found}
    assert {"log-det", "other examples, evaluation", "parameters that change"} <= checks
    assert ("noise below its entropy" in checks) == images
    layers = {layer for check, layer, _ in found if check == "log-det"}
    assert len(layers) > 1 or name in ("density", "zuko, GMM")


def bits_of(library, flow, nats=0.0, unit=1.0):
    """The project's own bits/dim, whose terms for the bins are `nats`, in `unit` bits."""

    def bits_per_dim(x):
        v = (x + torch.rand(x.shape)) * SCALE
        return (nats - LOG_PROBS[library](flow, v) / DIMS) / math.log(2) * unit

    return bits_per_dim


def of_figure(**options):
    def build(library):
        flow = GLOWS[library]()
        return Foreign(flow, SHAPE, BINS, bits_per_dim=bits_of(library, flow, **options))

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
        *(with_fault(half_precision), "digits of the log-det"),
        "{coupling}: they are torch.float16",
    ),
}


@pytest.mark.parametrize("library", GLOWS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, library):
    build, check, words = FAULTS[fault]
    found = bad(checked(build(library)))
    sentences = [f"{f.layer}: {f.reason}" for f in found.values() if f.check == check]
    words = words.format(convolution=CONVOLUTION[library], coupling=COUPLING[library])
    assert any(words in sentence for sentence in sentences), found
    if "bits/dim" in check:
        assert {key[0] for key in found} == {check}
    else:
        assert all(key[0] != "the project's bits/dim" for key in found)


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


class Likely(flows.Scaled):
    """Probabilities that add up to more than 1."""

    def forward(self, x):
        return x, 0 * x.flatten(1).sum(1) + 200

    def inverse(self, z):
        return z, 0 * z.flatten(1).sum(1) - 200


@pytest.mark.parametrize(
    "build, contract, check, words",
    [
        (flows.normflows_points, ("log_prob", more(1)), "log_prob", "it is not the base"),
        (flows.Mixture, ("log_prob", more(0.5)), "integral", ""),
        (flows.Scaled, ("inverse", of_inverse), "log-det of the inverse", "it has the sign of the"),
        (Likely, None, "noise below its entropy", "impossible: their entropy is 8 bits/dim"),
    ],
)
def test_other_faults(build, contract, check, words):
    flow = build()
    if contract is not None:
        flows.altered(flow, *contract)
    of_images = isinstance(flow, Likely)
    found = bad(checked(Foreign(flow, *((SHAPE, BINS) if of_images else ((2,),)))))
    assert any(key[0] == check and words in f.reason for key, f in found.items()), found


def test_a_figure_that_raises():
    contract = Foreign(flows.Mixture(), (1, 8, 8), BINS, flat=True, bits_per_dim=lambda x: x.gone)
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
