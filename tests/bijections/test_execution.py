"""How the layers of containers are called: in order, fused, with progress."""

import pytest
import torch
from helpers import perturb, ready, seeded, tiny_flow

from flowtrain import bijections as b
from flowtrain.bijections.context import Guided, unguided
from flowtrain.bijections.execution import call
from flowtrain.bijections.fused import FusedLinear, fuse
from flowtrain.bijections.inverses import MatchingInverse, WithProgress
from flowtrain.bijections.memory import executor_of
from flowtrain.evaluation.layers import Watching
from flowtrain.nets.convolution import GlowNet
from flowtrain.nets.masked import MaskedDenseNet


def autoregressive():
    return b.MaskedAutoregressive(MaskedDenseNet(4, 2, 8, 1), b.AffineTransform())


def test_layers_are_called_in_the_order_of_the_direction():
    inner = b.Sequential(b.ActNorm((4,)), b.Inverse(autoregressive()))
    chain = ready(b.Sequential(b.Flatten((4,)), inner))
    calls = []

    def around(name, layer, direction, given, context):
        calls.append((type(layer).__name__, direction))
        return call(layer, direction, given, context)

    recording = Watching(chain, around)
    x = torch.randn(2, 4, generator=seeded())
    z, _ = chain.run(recording, "forward", x)
    forward = [("Flatten", "forward"), ("ActNorm", "forward"), ("MaskedAutoregressive", "inverse")]
    assert calls == forward
    torch.testing.assert_close(chain.run(MatchingInverse(), "forward", x)[0], z)
    calls.clear()
    chain.run(recording, "inverse", z)
    swap = {"forward": "inverse", "inverse": "forward"}
    assert calls == [(name, swap[direction]) for name, direction in reversed(forward)]


@pytest.mark.parametrize("layer", [b.Conv1x1, b.Conv1x1LU])
def test_neighbours_are_fused_and_inverses_computed_once_a_call(layer, monkeypatch):
    """`test_contract` compares them with the layers one after the other."""
    layers = [b.Squeeze()]
    for _ in range(3):
        coupling = b.Coupling(2, GlowNet(2, 4, 5), b.AffineTransform())
        layers += [b.ActNorm((4, 1, 1)), layer(4), coupling]
    chain = ready(perturb(b.Sequential(*layers)))
    assert sum(isinstance(part, FusedLinear) for part in fuse(chain.opened(), "forward")) == 3
    before, calls = layer.inverse_weights.__func__, []
    counted = classmethod(lambda cls, layers: calls.append(len(layers)) or before(cls, layers))
    monkeypatch.setattr(layer, "inverse_weights", counted)
    chain.inverse(torch.randn(3, 4, 2, 3, generator=seeded()))
    assert calls == [3]


def test_other_neighbours_are_not_fused():
    vector = b.Sequential(b.ActNorm((4,)), b.Flatten((4,)))
    apart = b.Sequential(b.ActNorm((4, 1, 1)), b.Squeeze(), b.Conv1x1(16), b.ActNorm((16, 1, 1)))
    for chain in (vector, apart):
        assert fuse(ready(chain).opened(), "forward") == list(chain.layers)


def test_a_container_is_as_sequential_as_its_parts():
    layer = autoregressive()
    for chain, sequential, untraceable in (
        (b.Sequential(b.Flatten((4,)), layer), True, ["inverse"]),
        (b.Sequential(b.Inverse(layer)), False, ["forward"]),
        (b.Sequential(layer, b.Inverse(layer)), True, ["forward", "inverse"]),
        (b.Multiscale([b.Sequential(layer)], [b.Sequential()], [(4, 1, 1)]), True, ["inverse"]),
        (b.Sequential(b.Flatten((4,))), False, []),
    ):
        assert chain.inverse_is_sequential == sequential
        assert chain.untraceable_directions() == untraceable


def test_training_has_no_guidance():
    guided = Guided(torch.ones(2, 3), torch.zeros(2, 3), 1.5).to("cpu")
    assert unguided(None) is None and unguided(guided.given) is guided.given
    with pytest.raises(TypeError, match="for samples alone"):
        executor_of("checkpoint").chain([b.Reverse()], "forward", torch.ones(2, 1, 2, 2), guided)


def test_a_sequential_inverse_notes_how_far_it_is():
    shares = []
    for name in ("causal", "glow"):
        flow = tiny_flow(name)
        z = flow.draw_latents(3, seeded())
        noted = flow.decode(z, executor=WithProgress(shares.append))
        assert torch.equal(noted, flow.decode(z))
    assert shares == [done / 16 for done in range(1, 17)]  # Glow takes one pass
