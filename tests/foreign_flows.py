"""Sound flows of other libraries, small, with every parameter moved, and faults to put into them.

The image flows are of 1x8x8 images with 256 levels, and have a 1x1 convolution and an ActNorm.
"""

import collections
import dataclasses
import math
import types
import warnings

import pytest
import torch
from helpers import seeded
from torch import distributions, nn

from flowtrain.foreign.contract import Foreign

SHAPE, BINS = (1, 8, 8), 256
SCALE = 1 / BINS


def pictures(count=24, side=8):
    """Smooth images with some noise, uint8 `(count, 1, side, side)`."""
    generator = seeded()
    corners = torch.rand(count, 1, 2, 2, generator=generator)
    smooth = nn.functional.interpolate(corners, (side, side), mode="bilinear")
    noisy = 200 * smooth + 40 * torch.rand(smooth.shape, generator=generator)
    return noisy.to(torch.uint8)


def reals(count=50):
    return torch.randn(count, 2, generator=seeded()).clamp(-3, 3)  # a flow may be of angles


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


class Convolutions(nn.Sequential):
    """A network, which nflows calls with a context."""

    def __init__(self, inputs, outputs):
        first, last = nn.Conv2d(inputs, 6, 3, padding=1), nn.Conv2d(6, outputs, 3, padding=1)
        super().__init__(first, nn.ReLU(), last)

    def forward(self, x, context=None):
        return super().forward(x)


def library(name):
    """The package, after the seed of the weights."""
    torch.manual_seed(0)
    return pytest.importorskip(name, reason=f"{name} is not installed")


def moved(flow, scale=0.03):
    """The flow with its parameters moved, except for those that are no parameters."""
    generator = seeded()
    with torch.no_grad():
        for parameter in (p for p in flow.parameters() if p.requires_grad):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return flow.eval()


def trained(flow, log_prob, example, scale=0.03):
    """The flow after its first batch, with parameters moved."""
    flow.train()
    log_prob(example)
    return moved(flow, scale)


# --- images ---------------------------------------------------------------------------------------


def normflows_glow(logit=False, classes=0):
    nf = library("normflows")
    flows = [[nf.flows.GlowBlock(c, 6), nf.flows.Squeeze()] for c in (8, 4)]
    of_classes = (classes,) if classes else ()
    base = [nf.distributions.GlowBase(shape, *of_classes) for shape in ((8, 2, 2), (2, 4, 4))]
    if classes:
        base[0] = nf.distributions.AffineGaussian((8, 2, 2), (8, 1, 1), classes)
    transform = nf.transforms.Logit() if logit else None
    flow = nf.MultiscaleFlow(base, flows, [nf.flows.Merge()], transform, bool(classes))
    y = torch.arange(24) % classes if classes else None
    return trained(flow, lambda x: flow.log_prob(x, y), pictures() * SCALE)


def nflows_glow(logit=False):
    library("nflows")
    from nflows import distributions, flows, transforms

    mask = torch.tensor([1.0, 1, 0, 0])
    steps = [
        *([transforms.Logit()] if logit else []),
        transforms.SqueezeTransform(),
        transforms.ActNorm(4),
        transforms.OneByOneConvolution(4),
        transforms.AffineCouplingTransform(mask, Convolutions),
    ]
    flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([4, 4, 4]))
    return trained(flow, flow.log_prob, 0.25 + 0.5 * pictures() * SCALE)


def freia_glow(logit=False, side=8):
    freia = library("FrEIA")
    from FrEIA import modules

    flow = freia.framework.SequenceINN(1, side, side)
    if logit:
        flow.append(_freia_logit(modules.InvertibleModule))
    flow.append(modules.IRevNetDownsampling)
    flow.append(modules.ActNorm)
    flow.append(modules.Fixed1x1Conv, M=torch.randn(4, 4, generator=seeded()) + torch.eye(4))
    flow.append(modules.GLOWCouplingBlock, subnet_constructor=Convolutions)
    return trained(flow, flow, 0.25 + 0.5 * pictures(side=side) * SCALE)


def _freia_logit(base):
    class Logit(base):
        def forward(self, x, c=(), rev=False, jac=True):
            y = torch.sigmoid(x[0]) if rev else x[0]
            log_det = -(y.log() + torch.log1p(-y)).flatten(1).sum(1)
            return ((y,), -log_det) if rev else ((torch.logit(y),), log_det)

        def output_dims(self, dims):
            return dims

    return Logit


GLOWS = {"normflows": normflows_glow, "nflows": nflows_glow, "FrEIA": freia_glow}
# The log-density of inputs of the flow by the means of the library alone.
LOG_PROBS = {
    "normflows": lambda flow, v: flow.log_prob(v, None),
    "nflows": lambda flow, v: flow.log_prob(v),
    "FrEIA": lambda flow, v: _of_latent(*flow(v)),
    "zuko": lambda flow, v: flow().log_prob(v.flatten(1)),
}


def _of_latent(z, log_det):
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) + log_det


# --- real values ----------------------------------------------------------------------------------


def normflows_points():
    nf = library("normflows")
    layers = []
    for _ in range(2):
        layers += [nf.flows.AffineCouplingBlock(network(1, 2)), nf.flows.Permute(2, mode="swap")]
        layers += [nf.flows.ActNorm(2), nf.flows.AutoregressiveRationalQuadraticSpline(2, 1, 6)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), layers)
    return trained(flow, flow.log_prob, reals(), 0.1)


def nflows_points():
    library("nflows")
    from nflows import distributions, flows, transforms

    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    steps = [spline(2, 8, tails="linear"), transforms.RandomPermutation(2), transforms.LULinear(2)]
    steps += [transforms.BatchNorm(2), transforms.MaskedAffineAutoregressiveTransform(2, 8)]
    flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([2]))
    return trained(flow, flow.log_prob, reals(), 0.1)


def freia_points():
    library("FrEIA")
    from FrEIA import framework, modules

    options = {"subnet_constructor": network}
    nodes = [framework.InputNode(2, name="input")]
    nodes.append(framework.Node(nodes[-1], modules.RNVPCouplingBlock, options))
    nodes.append(framework.Node(nodes[-1], modules.PermuteRandom, {"seed": 1}))
    nodes.append(framework.OutputNode(nodes[-1]))
    return moved(framework.GraphINN(nodes), 0.1)


def zuko_of(name, **options):
    zuko = library("zuko")
    return getattr(zuko.flows, name)(2, **options).eval()


def transformed_normal():
    base = distributions.Normal(torch.zeros(2), torch.ones(2))
    steps = [distributions.AffineTransform(torch.tensor([0.1, 0.2]), torch.tensor([2.0, 0.5]))]
    steps += [distributions.SigmoidTransform(), distributions.AffineTransform(-4.0, 8.0)]
    return distributions.TransformedDistribution(base, steps)


class Scaled:
    """The plain contract, by an object that is no module."""

    def __init__(self):
        self.log_scale = torch.tensor([0.3, -0.2])

    def forward(self, x):
        return x * self.log_scale.exp(), self.log_scale.sum()

    def inverse(self, z):
        return z * (-self.log_scale).exp(), -self.log_scale.sum()


class InPlace(Scaled):
    """It changes its input."""

    def forward(self, x):
        return x.mul_(self.log_scale.exp()), self.log_scale.sum()

    def inverse(self, z):
        return z.div_(self.log_scale.exp()), -self.log_scale.sum()


class Here(Scaled, nn.Module):
    """It moves to no device without values, as a module of TorchScript."""

    def __init__(self):
        nn.Module.__init__(self)
        super().__init__()

    def _apply(self, fn, recurse=True):
        if fn(torch.zeros(())).is_meta:
            raise AssertionError("param must be a Parameter")
        return super()._apply(fn, recurse)


class Sparse(nn.Module):
    """Its matrix is sparse."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.tensor([[2.0, 0.0], [0.0, 1.0]]).to_sparse())

    def forward(self, x):
        return (self.matrix @ x.T).T, math.log(2)

    def inverse(self, z):
        return torch.stack([z[:, 0] / 2, z[:, 1]], dim=1), -math.log(2)


class Swapped:
    """Its log-det is an integer."""

    def forward(self, x):
        return x.flip(1), torch.tensor(0)

    def inverse(self, z):
        return z.flip(1), torch.tensor(0)


class Mixture(nn.Module):
    """A density without latents: `log_prob` and `sample`."""

    def __init__(self, dims=2):
        super().__init__()
        self.dims = dims
        self.means = nn.Parameter(torch.tensor([-1.0, 2.0]))

    def log_prob(self, x):
        each = -0.5 * (x[:, None] - self.means[:, None]).square() - 0.5 * math.log(2 * math.pi)
        return each.sum(2).logsumexp(1) - math.log(2)

    def sample(self, n):
        return self.means[torch.arange(n) % 2, None] + torch.randn(n, self.dims)


class OfIntegers(nn.Module):
    """Exact probabilities of images of integers, without noise."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(0, 1, BINS))

    def log_prob(self, x):
        return self.logits.log_softmax(0)[x.long()].flatten(1).sum(1)

    def sample(self, n):
        return distributions.Categorical(logits=self.logits).sample((n, *SHAPE)).float()


class Noisy:
    """`log_prob` of images in [0, 1) adds the noise to them. The density of an entry y is 2 y."""

    def log_prob(self, v):
        y = v + SCALE * torch.rand_like(v)
        return (2 * y).log().flatten(1).sum(1) - 64 * math.log(BINS)

    def sample(self, n):
        return torch.rand(n, *SHAPE).sqrt()


class Dequantized(nn.Module):
    """A flow of 1x8x8 images that adds the noise itself. It takes integers, as in SurVAE flows
    (Nielsen et al. 2020), or images in [0, 1), as in y0ast/Glow-PyTorch.
    """

    def __init__(self, of_integers, bins=BINS):
        super().__init__()
        self.of_integers, self.bins = of_integers, bins
        self.log_scale = nn.Parameter(0.1 * torch.randn(SHAPE, generator=seeded()))

    def forward(self, v):
        y = v + torch.rand_like(v) * (1 if self.of_integers else SCALE)
        y = y * SCALE if self.of_integers else y
        log_det = self.log_scale.sum() - 64 * math.log(self.bins)
        return (y - 0.5) * self.log_scale.exp(), log_det.expand(len(v))

    def inverse(self, z):
        y = z * (-self.log_scale).exp() + 0.5
        log_det = 64 * math.log(self.bins) - self.log_scale.sum()
        return (y * BINS).floor() if self.of_integers else y, log_det.expand(len(z))


class Estimated(Scaled):
    """A log-det with an unbiased estimate of its error, or a biased one."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        z, log_det = super().forward(x)
        return z, log_det + self.bias + 0.3 * torch.randn_like(x[:, 0])

    def inverse(self, z):
        x, log_det = super().inverse(z)
        return x, log_det - self.bias - 0.3 * torch.randn_like(z[:, 0])


def normflows_residual():
    nf = library("normflows")
    layers = []
    for _ in range(2):
        net = nf.nets.LipschitzMLP([4, 16, 4], init_zeros=False, lipschitz_const=0.9)
        layers += [nf.flows.Residual(net), nf.flows.ActNorm(4)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), layers)
    return trained(flow, flow.log_prob, torch.randn(50, 4, generator=seeded()))


class Coupling(nn.Module):
    """Of points. Its network has tensors of the kind that `change` makes."""

    def __init__(self, change=lambda net: net):
        super().__init__()
        self.net = change(network(1, 2))

    def shift_and_scale(self, a):
        shift, log_scale = self.net(a).chunk(2, dim=1)
        return shift, log_scale.tanh()

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        shift, log_scale = self.shift_and_scale(a)
        return torch.cat([a, (b + shift) * log_scale.exp()], dim=1), log_scale.sum(1)

    def inverse(self, z):
        a, b = z.chunk(2, dim=1)
        shift, log_scale = self.shift_and_scale(a)
        return torch.cat([a, b * (-log_scale).exp() - shift], dim=1), -log_scale.sum(1)


def old_weight_norm(net):
    """Its weights are computed, with a history of gradients, and are no parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(net[0])
    return net


def batch_norm(net):
    return nn.Sequential(net[0], nn.BatchNorm1d(8), *net[1:])


class Around:
    """An object that is no module around one, which is in training mode."""

    def __init__(self, module):
        self.parts = {"flow": module}

    def forward(self, x):
        return self.parts["flow"](x)

    def inverse(self, z):
        return self.parts["flow"].inverse(z)


class Kept(Coupling):
    """It keeps a tensor, and one in another object, which are no buffers."""

    def __init__(self):
        super().__init__()
        self.factor = torch.tensor([[0.5]])
        self.more = types.SimpleNamespace(factor=torch.tensor([[2.0]]))

    def shift_and_scale(self, a):
        return super().shift_and_scale(self.more.factor.matmul(self.factor) * a)


class Halves(Coupling):
    """Latents in a list."""

    def forward(self, x):
        z, log_det = super().forward(x)
        return [z[:, :1], z[:, 1:, None]], log_det

    def inverse(self, z):
        return super().inverse(torch.cat([z[0], z[1][:, :, 0]], dim=1))


def of_closures(module):
    return types.SimpleNamespace(
        forward=lambda x: module(x), inverse=lambda z, own=module: own.inverse(z)
    )


Weights = collections.namedtuple("Weights", "matrix net")


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """An object without a dictionary. Its tensor and its module are in a named tuple."""

    weights: Weights

    def forward(self, x):
        z, log_det = self.weights.net(x)
        return z @ self.weights.matrix, log_det

    def inverse(self, z):
        return self.weights.net.inverse(z @ self.weights.matrix.T)


def in_slots():
    angle = torch.tensor(0.3)
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    return Slots(Weights(rotation, Coupling(batch_norm)))


def trained_normal():
    log_scale = torch.zeros(2, requires_grad=True)
    base = distributions.Normal(torch.zeros(2, requires_grad=True), log_scale.exp())
    return distributions.TransformedDistribution(base, distributions.AffineTransform(0.5, 2.0))


def nflows_cached():
    library("nflows")
    from nflows import distributions, flows, transforms

    steps = [transforms.LULinear(2, using_cache=True), transforms.RandomPermutation(2)]
    return flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([2]))


def nflows_nested():
    """Its last layer calls its first one."""
    library("nflows")
    from nflows import distributions, flows, transforms

    cdf = transforms.PiecewiseRationalQuadraticCDF(2, num_bins=4)
    transform = transforms.CompositeCDFTransform(transforms.Sigmoid(learn_temperature=True), cdf)
    return flows.Flow(transform, distributions.StandardNormal([2])).eval()


def logistic():
    base = distributions.Uniform(torch.zeros(2), torch.ones(2))
    return distributions.TransformedDistribution(base, distributions.SigmoidTransform().inv)


HIDDEN = {"transforms": 2, "hidden_features": [8]}
POINTS = {
    "normflows": normflows_points,
    "nflows": nflows_points,
    "FrEIA": freia_points,
    "zuko, MAF": lambda: zuko_of("MAF", **HIDDEN),
    "zuko, NCSF": lambda: zuko_of("NCSF", **HIDDEN),  # of angles
    "zuko, GMM": lambda: zuko_of("GMM"),
    "torch": transformed_normal,
    "plain": Scaled,
    "density": Mixture,
}
IMAGES = {
    "normflows": lambda: Foreign(normflows_glow(), SHAPE, BINS),
    "normflows, logit": lambda: Foreign(normflows_glow(logit=True), SHAPE, BINS),
    "normflows, classes": lambda: Foreign(normflows_glow(classes=3), SHAPE, BINS),
    "nflows": lambda: Foreign(nflows_glow(), SHAPE, BINS, offset=-0.5),
    "FrEIA": lambda: Foreign(freia_glow(), SHAPE, BINS, scale=1 / 128, offset=-1),
    "zuko": lambda: Foreign(zuko_glow(logit=True), SHAPE, BINS, flat=True),
    "zuko, alpha": lambda: Foreign(zuko_glow(), SHAPE, BINS, alpha=0.05, flat=True),
    "noise of a flow of integers": lambda: Foreign(
        Dequantized(True), SHAPE, BINS, scale=1.0, adds_noise=True
    ),
    "noise of a flow": lambda: Foreign(Dequantized(False), SHAPE, BINS, adds_noise=True),
}
# Flows with tensors that are neither parameters nor buffers, with modules in other objects, with
# latents in a list, or with other habits.
OWN = {
    "latents in a list": Halves,
    "old weight_norm": lambda: Coupling(old_weight_norm),
    "trained normal": trained_normal,
    "nflows, cached": nflows_cached,
    "nflows, nested": nflows_nested,
    "inverse transform": logistic,
    "zuko, distribution": lambda: zuko_of("MAF", **HIDDEN)(),
    "closures": lambda: of_closures(Coupling()),
    "object around a module": lambda: Around(Coupling(batch_norm)),
    "slots and a named tuple": in_slots,
    "in place": InPlace,
    "sparse matrix": Sparse,
    "on one device": Here,
    "integer log-det": Swapped,
}
ESTIMATES = {"residual": normflows_residual, "estimated": Estimated}


def zuko_glow(logit=False):
    """On vectors, with a linear map in place of a 1x1 convolution."""
    zuko = library("zuko")
    from torch.distributions import SigmoidTransform
    from zuko import distributions, lazy, transforms

    mixing = torch.eye(64) + 0.05 * torch.randn(64, 64, generator=seeded())
    flow = lazy.Flow(
        [
            *([lazy.UnconditionalTransform(SigmoidTransform).inv] if logit else []),
            lazy.UnconditionalTransform(transforms.LULinearTransform, mixing),
            zuko.flows.coupling.GeneralCouplingTransform(64, hidden_features=[8]),
        ],
        lazy.UnconditionalDistribution(
            distributions.DiagNormal, torch.zeros(64), torch.ones(64), buffer=True
        ),
    )
    return moved(flow)


def altered_part(flow, name, method, change):
    """Replaces results of the distribution that a zuko flow makes in each call, or of a part."""

    def forward(own, self, *args):
        distribution = own(*args)
        parts = [distribution, *distribution.transform.transforms]
        altered(next(part for part in parts if type(part).__name__ == name), method, change)
        return distribution

    altered(flow, "forward", forward)


# --- faults ---------------------------------------------------------------------------------------


def find(flow, name):
    """The first module of the flow whose class has this name."""
    return next(m for m in flow.modules() if type(m).__name__ == name)


def altered(module, method, change):
    """Replaces the results of a method: `change(own, self, *args)`, where own is the method. It is
    in a subclass, because a copy of the module must have it too.
    """
    cls = type(module)
    own = getattr(cls, method)

    def changed(self, *args, **kwargs):
        return change(lambda *a, **k: own(self, *a, **k), self, *args, **kwargs)

    module.__class__ = type(cls.__name__, (cls,), {method: changed})


FORWARD = {"normflows": "inverse", "nflows": "forward", "FrEIA": "forward"}  # data to latents
INVERSE = {"normflows": "forward", "nflows": "inverse", "FrEIA": "rev"}
CONVOLUTION = {"normflows": "Invertible1x1Conv", "nflows": "OneByOneConvolution"}
CONVOLUTION["FrEIA"] = "Fixed1x1Conv"
COUPLING = {"normflows": "AffineCouplingBlock", "nflows": "AffineCouplingTransform"}
COUPLING["FrEIA"] = "GLOWCouplingBlock"


def altered_results(module, method, change):
    """`change(z, log_det)` of a method. FrEIA has z in a tuple, and `rev` for the inverse."""

    def changed(own, self, *args, **kwargs):
        z, log_det = own(*args, **kwargs)
        if method == "rev" and not kwargs.get("rev"):
            return z, log_det
        new, log_det = change(z[0] if isinstance(z, tuple) else z, log_det)
        return (new,) if isinstance(z, tuple) else new, log_det

    altered(module, "forward" if method == "rev" else method, changed)


def altered_log_det(library, module, change):
    """Replaces the log-det of a layer in both directions."""
    for method in {FORWARD[library], INVERSE[library]} - {"rev"}:
        altered_results(module, method, lambda z, log_det: (z, change(log_det)))
