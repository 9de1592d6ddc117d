"""Flows of other libraries as a `Flow`, and `FILE.py:NAME` on a command line."""

import copy
from types import FunctionType, SimpleNamespace

import foreign_flows as flows
import pytest
import torch
from cli_helpers import quick
from fake_device import device_without_float64
from foreign_flows import BINS, GLOWS, LOG_PROBS, POINTS, SCALE, SHAPE
from torch import distributions, nn

from flowtrain.bijections.execution import call
from flowtrain.checkpoints.load import load_model
from flowtrain.errors import UserError
from flowtrain.evaluation.layers import Watching, layers_of
from flowtrain.flow.passes import largest_activation
from flowtrain.foreign.contract import Foreign
from flowtrain.foreign.file import is_foreign
from flowtrain.foreign.model import ForeignModel


@pytest.mark.parametrize("name", POINTS)
def test_the_density_is_that_of_the_library(name):
    flow = POINTS[name]()
    model = ForeignModel(Foreign(copy.deepcopy(flow), (2,))).eval().requires_grad_(False)
    x = flows.reals()
    found = model.log_prob(x)
    own = flow() if name.startswith("zuko") else flow
    if hasattr(own, "log_prob"):
        expected = own.log_prob(x)
    else:
        z, log_det = flow(x) if isinstance(flow, nn.Module) else flow.forward(x)
        expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(found, expected.reshape(len(x), -1).sum(1).detach())
    z = model.encode(x)
    torch.testing.assert_close(model.decode(z)[:, :, 0, 0], x, rtol=1e-3, atol=1e-3)
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double.log_prob(x).float(), found, rtol=1e-4, atol=1e-4)
    assert double.log_prob(x).dtype == torch.float64
    assert model.sample(3).shape == (3, 2, 1, 1)


def test_a_flow_whose_class_is_called_as_the_layers_of_its_library():
    flow = POINTS["normflows"]()
    flow.__class__ = type("Flow", (type(flow),), {})
    x = flows.reals()
    found = ForeignModel(Foreign(flow, (2,))).log_prob(x)
    torch.testing.assert_close(found, flow.log_prob(x))


@pytest.mark.parametrize("library", GLOWS)
def test_the_bits_are_those_of_the_map_of_the_levels(library):
    """With integers, log P(x) has the log-determinant of the map to the flow's input."""
    flow = GLOWS[library]()
    for scale, offset in ((None, 0.0), (2 * SCALE, -1.0)):
        model = ForeignModel(Foreign(flow, SHAPE, BINS, scale, offset)).eval()
        x = flows.pictures()
        noise = torch.rand(x.shape)
        v = offset + (x + noise) * (scale or SCALE)
        expected = LOG_PROBS[library](flow, v) + 64 * torch.tensor(scale or SCALE).log()
        torch.testing.assert_close(model(x, noise).total, expected, rtol=1e-5, atol=1e-3)
        assert torch.equal(model.decode(model.encode(x)), x)


@pytest.mark.parametrize("name", ["normflows", "nflows", "FrEIA"])
def test_layers_are_called_in_place(name):
    """A watched pass gives the same numbers, calls each layer once, and leaves no trace."""
    model = ForeignModel(Foreign(GLOWS[name](), SHAPE, BINS)).eval().requires_grad_(False)
    before = {id(m): dict(vars(m)) for m in model.modules()}
    x, calls = flows.pictures(), []

    def around(layer, own, direction, given, context):
        calls.append(layer)
        return call(own, direction, given, context)

    noise = torch.rand(x.shape)
    watched = model.to_latents(x, noise, Watching(model, around))
    for found, expected in zip(watched, model.to_latents(x, noise), strict=True):
        torch.testing.assert_close(found, expected)
    assert sorted(calls) == sorted(layers_of(model)) and len(calls) > 3
    assert {id(m): set(vars(m)) for m in model.modules()} == {k: set(v) for k, v in before.items()}


def same(x):
    return x


def maps(z=same, log_det=len, x=same):
    """An object whose methods give these functions of their input."""
    return SimpleNamespace(
        forward=lambda given: (z(given), log_det(given)), inverse=lambda given: (x(given), 0)
    )


NET = nn.Linear(1, 1)


class Global(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :1], x[:, 1:] + NET(x[:, :1])], dim=1), 0

    def inverse(self, z):
        return z, 0


def lazy():
    return flows.Coupling(lambda net: nn.Sequential(nn.LazyLinear(2)))


def of_contexts():
    return flows.library("zuko").flows.GMM(2, context=3)


def of_numbers():
    step = distributions.AffineTransform(0.5, 2.0)
    return distributions.TransformedDistribution(distributions.Normal(0.0, 1.0), [step])


@pytest.mark.parametrize(
    "flow, words",
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear: no inverse"),
        (object(), r"no forward\(x\) -> z, log_det"),
        (maps(lambda x: {}["no such thing"]), "forward: KeyError: 'no such thing'"),
        (maps(lambda x: x[:, :1]), r"latents of shapes \[\(1,\)\]"),
        (maps(log_det=same), r"log_det has shape \(2, 2\), expected \(2,\)"),
        (maps(x=lambda z: z[:, :1]), "inverse: ValueError: shape"),
        (SimpleNamespace(log_prob=lambda x: x.sum(1), sample=lambda n: [][n]), ": IndexError"),
        (of_numbers, r"sample: ValueError: shape \(2,\), expected \(2, 2\)"),
        (of_contexts, "GMM: its parts: AttributeError"),
        (lazy, "a lazy layer has no weights yet"),
        (Global(), "Global.forward: it reads the global variable NET, a module with parameters"),
    ],
)
def test_what_is_no_flow(flow, words):
    flow = flow() if isinstance(flow, FunctionType) else flow
    with pytest.raises(UserError, match=words):
        ForeignModel(Foreign(flow, (2,)))


def test_a_flow_that_is_elsewhere_stays_there():
    """On its own device, where the trial runs."""
    x = flows.reals()
    flow = flows.Coupling()
    expected = ForeignModel(Foreign(copy.deepcopy(flow), (2,))).log_prob(x).detach()
    with device_without_float64() as device:
        model = ForeignModel(Foreign(flow.to(device), (2,)))
        assert model.device == device
        torch.testing.assert_close(model.log_prob(x).detach().cpu(), expected)


def test_densities_of_positive_values():
    for make in (distributions.LogNormal, distributions.Beta):
        # Libraries may turn validation off for the whole process.
        each = make(torch.ones(2), torch.ones(2), validate_args=True)
        flow = distributions.Independent(each, 1, validate_args=True)
        x = torch.tensor([[0.2, 0.7]])
        model = ForeignModel(Foreign(flow, (2,)))
        torch.testing.assert_close(model.log_prob(x), flow.log_prob(x))
        assert largest_activation(model) > 0  # by an example of the domain, without zeros


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shape": (8, 8)}, "shape"),
        ({"shape": 8}, "shape: 8, expected"),
        ({"shape": (1, 8 / 1, 8)}, "shape"),
        ({"num_bins": 1}, "num_bins"),
        ({"num_bins": 256.0}, "num_bins"),
        ({"num_bins": None, "offset": 1.0}, "give num_bins"),
        ({"alpha": 0.6}, "alpha"),
        ({"alpha": 0.05, "scale": 1.0}, "alpha"),
        ({"alpha": 0.05, "adds_noise": True}, "alpha"),
        ({"num_bins": None, "adds_noise": True}, "give num_bins"),
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"offset": float("inf")}, "offset"),
    ],
)
def test_contracts_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        Foreign(**{"flow": flows.Scaled(), "shape": SHAPE, "num_bins": BINS, **options})


FILE = """
import torch
from flowtrain import Foreign

class Scale:
    def forward(self, x):
        return 2 * x, x[0].numel() * torch.tensor(2.0).log()
    def inverse(self, z):
        return z / 2, -z[0].numel() * torch.tensor(2.0).log()

bare = Scale()
flow = Foreign(bare, (1, 8, 8), 17, offset=-0.5)

def made():
    return flow

def fails():
    raise OSError("no weights")

class Light(torch.nn.Module):
    def forward(self, x):
        if len(x) > 2:
            raise KeyError("too many")
        return x, 0
    def inverse(self, z):
        return z, 0

light = Foreign(Light(), (1, 8, 8), 17)

class Flat(Light):
    def forward(self, x):
        return x.flatten(1).squeeze(), 0
    def inverse(self, z):
        return z.view(-1, 1, 8, 8), 0

flat = Foreign(Flat(), (1, 8, 8), 17)

def exits():
    raise SystemExit(0)

positive = Foreign(torch.distributions.Independent(
    torch.distributions.LogNormal(torch.zeros(2), torch.ones(2), validate_args=True), 1
), (2,))

def beside():
    import settings
    return settings.flow
"""


@pytest.mark.run
def test_commands_take_a_flow_of_a_file(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "settings.py").write_text("from own import flow")
    (tmp_path / "link.py").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").write_text(FILE)
    for name, *words in (
        ("evaluate", "own.py:flow"),
        ("evaluate", "own.py:made"),
        ("evaluate", "link.py:beside"),
        ("ood", "own.py:flow", "--data", "noise"),
        ("sample", "own.py:flow"),
        ("report", "own.py:flow"),
        # The mesh around the points leaves the domain of this density.
        ("sample", "own.py:positive", "--set", "data.name=two_moons"),
    ):
        done = quick(name, *words, "--num-images", 8, cwd=tmp_path).ok()
        assert f"running the code of {words[0].partition(':')[0]}" in done.err
    run = tmp_path / "runs" / "foreign" / "own-flow"
    assert (run / "evaluate-test.json").exists()
    page = (run / "report.html").read_text()
    assert "A flow of other code, <code>own.py:flow</code>" in page and "8 of 8</strong>" in page
    assert 'id="configuration"' not in page
    done = quick("sample", "own.py:positive", cwd=tmp_path)
    done.failed(2, "cannot be evaluated by own.py:positive")


@pytest.mark.run
def test_files_that_give_no_flow(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    (tmp_path / "raises.py").write_text("x = 1\nimport no_such_package\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "moves.py").write_text("import os\nos.chdir('..')\n")
    for name, words in {
        "gone.py:flow": "gone.py: no such file",
        "own.py": "own.py: give the name of a flow in it: own.py:NAME",
        "own.py:flw": "own.py has no flw; did you mean flow?",
        "own.py:bare": "is a Scale; expected flowtrain.Foreign(",
        "own.py:fails": f"OSError: no weights ({tmp_path}/own.py, line 18)",
        "own.py:exits": f"own.py:exits: SystemExit: 0 ({tmp_path}/own.py, line ",
        "raises.py:flow": f"no_such_package' ({tmp_path}/raises.py, line 2)",
        "wrong.py:flow": "wrong.py: SyntaxError: invalid syntax (wrong.py, line 1)",
        "moves.py:flow": "moves.py has no flow",
    }.items():
        quick("doctor", name, cwd=tmp_path).failed(2, words)
    for code, said, *words in (
        (2, "--weights ema", "doctor", "own.py:flow", "--weights", "ema"),
        (2, "data of shape (2, 1, 1)", "doctor", "own.py:flow", "data.name=two_moons"),
        (1, f"'too many' ({tmp_path}/own.py, line 23)", "evaluate", "own.py:light"),
        (1, "Flat: IndexError", "evaluate", "own.py:flat", "--num-images", 1),
    ):
        quick(*words, cwd=tmp_path).failed(code, said)
    loaded = load_model(str(tmp_path / "own.py:flow"), torch.device("cpu"))
    with pytest.raises(UserError, match="without a checkpoint"):
        loaded.alone()


def test_an_archive_cannot_name_code(tmp_path):
    """A path that exists is a checkpoint, whatever its name."""
    (tmp_path / "own.py:flow").touch()
    assert not is_foreign(str(tmp_path / "own.py:flow")) and is_foreign("own.py:flow")
    (tmp_path / "run.py").mkdir()
    assert not is_foreign(str(tmp_path / "run.py"))
