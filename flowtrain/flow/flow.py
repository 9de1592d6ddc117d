"""The model: dequantization, a bijection and a standard normal base density.

For images it gives a bound on the likelihood, and for points the likelihood itself.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Executor
from flowtrain.bijections.context import Context, Guided
from flowtrain.bijections.execution import FUSED, Initializing
from flowtrain.bijections.inverses import MatchingInverse
from flowtrain.bijections.orders import order_context, turn_each, turned
from flowtrain.bijections.ordinal import discrete_model
from flowtrain.bijections.precision import full_precision
from flowtrain.bijections.sphere import of_angles
from flowtrain.bijections.spline import whole_turns
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import (
    ClassContext,
    ClassPrior,
    LogProb,
    normal_log_prob,
    over_classes,
)
from flowtrain.flow.dequantize import Dequantizer, RealValued, draw_noise
from flowtrain.flow.image_context import ImageContext
from flowtrain.flow.inputs import Batch, Labels, as_tensor, checked_labels
from flowtrain.flow.kinds import Kind, bits_per_dim, kind_of
from flowtrain.flow.sides import mixture, over_sides, sides_of
from flowtrain.types import Shape

NO_SIGMA = "the model was not trained with Gaussian noise (dequantization.name: gaussian)"


class Flow(nn.Module):
    """A normalizing flow on images or on points.

    An image as stored has D entries with Q levels. Its likelihood has the bound (Theis et al. 2016;
    Ho et al. 2019)

        log P(x) >= E_u[log N(z; 0, I) + log|det| - log q(u|x)] - D log Q

    Real-valued data have a density, which is computed exactly:
    `log p(x) = log N(z; 0, I) + log|det|`. So is the likelihood of a bijection with `is_discrete`.
    With Gaussian noise, the same is the density of a noisy image.

    Args:
        bijection: Maps data `(B, C, H, W)` to latents `(B, D)`.
        dequantizer: Maps integers to reals, or leaves `RealValued` data as they are.
        shape: Shape of one image, `(C, H, W)`.
        class_prior: The part of a class-conditional model that depends on the class.
        image_context: The given part of an image. Likelihoods are then log P(x | context of x).
    """

    def __init__(
        self,
        bijection: Bijection,
        dequantizer: Dequantizer | RealValued,
        shape: Shape,
        class_prior: ClassPrior | ClassContext | None = None,
        image_context: ImageContext | None = None,
    ):
        super().__init__()
        self.dequantizer = dequantizer  # first, so that parameters are in the order of their use
        self.bijection = bijection
        self.class_prior = class_prior
        self.image_context = image_context
        self.shape = shape
        self.sides = 1  # the model is the mixture over so many sides of an image (`sides.py`)

    @property
    def num_bins(self) -> int | None:
        """Q: images have the values 0..Q-1. None for real-valued data."""
        return self.dequantizer.num_bins

    @property
    def kind(self) -> Kind:
        """The kind of data: images, noisy images, points, or points on a surface."""
        return kind_of(self.num_bins, self.latent_dims < self.dims, self.dequantizer.sigma)

    @property
    def exact(self) -> bool:
        """Whether the likelihood is exact: there is no noise, or it does not depend on it."""
        return self.kind.exact or self.bijection.is_discrete

    @property
    def sampling(self) -> str:
        """How samples are computed, in words. A sequential flow takes one entry after the other."""
        return "sequential" if self.bijection.inverse_is_sequential else "one pass"

    @property
    def initialization_images(self) -> int:
        """The number of images for `initialize`."""
        layers = [module for module in self.modules() if isinstance(module, Bijection)]
        return max(layer.initialization_images for layer in layers)

    @property
    def dims(self) -> int:
        """D, the number of entries of an image."""
        return math.prod(self.shape)

    @property
    def latent_dims(self) -> int:
        """The number of entries of a latent: D, or fewer for data on a surface."""
        return self.bijection.latent_dims(self.dims)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def classes(self) -> int:
        """The number of classes of a class-conditional model, or 0."""
        return 0 if self.class_prior is None else self.class_prior.classes

    @property
    def orders(self) -> int:
        """The number of orders in which the model has learned to read an image."""
        model = discrete_model(self.bijection)
        return 1 if model is None else model.conditioner.orders

    @property
    def unguided(self) -> str | None:
        """The reason why samples cannot be guided, or None."""
        if self.class_prior is None:
            return "the model is not class-conditional (model.classes is 0)"
        return self.class_prior.unguided

    def example(self) -> Tensor:
        """An example `(1, C, H, W)` that the flow takes, to measure a pass: zeros."""
        return torch.zeros(1, *self.shape, dtype=torch.uint8, device=self.device)

    def __repr__(self) -> str:
        """A description in five lines. `print(flow.bijection)` has every layer."""
        classes = f", {self.classes} classes" if self.classes else ""
        given = "" if self.image_context is None else f", given {self.image_context.words}"
        of = f", {mixture(self.sides)}" if self.sides > 1 else ""
        layers = [module for module in self.modules() if isinstance(module, Bijection)]
        names = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        parameters = sum(p.numel() for p in self.parameters())
        return (
            f"Flow of {'x'.join(map(str, self.shape))} with {self.kind.words}{classes}{given}\n"
            f"  likelihood: {'exact' if self.exact else self.kind.bound}{of}, in {self.kind.unit}\n"
            f"  sampling: {self.sampling}\n"
            f"  parameters: {parameters:,}, {self.dtype} on {self.device}\n"
            f"  layers: {len(layers)} ({names})"
        )

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """`|one - other|` of each entry, where whole turns of angles make no difference."""
        error = one - other
        return (error - whole_turns(error) if of_angles(self.bijection) else error).abs()

    def loss(self, log_prob: Tensor) -> Tensor:
        """The loss in `kind.unit`, from nats: for example bits per dimension of images."""
        return self.kind.loss(log_prob, self.dims)

    def to_latents(
        self, x: Tensor, noise: Tensor, executor: Executor = FUSED
    ) -> tuple[Tensor, Tensor]:
        """Latents `(B, D)`, and all terms of the bound except for the base density, `(B,)` in nats.

        `x`, `noise` and `executor` as in `forward`. The networks get no class.
        """
        v, log_det = self.dequantizer(x, noise.to(self.dtype), executor)
        conditioning = self.conditioning(len(x), context=self.context_of(x))
        z, flow_log_det = self.bijection.run(executor, "forward", v, conditioning)
        return z, log_det + flow_log_det

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        executor: Executor = FUSED,
        context: Tensor | None = None,
        side: int | None = None,
    ) -> LogProb:
        """The parts of the single-draw bound for integers `x` and uniform `noise`, `(B, C, H, W)`.

        A class-conditional model gives log P(x | class) with `labels` `(B,)`. Without them it gives
        log P(x), where all classes are equally likely. A model with an `image_context` gives
        log P(x | context), by default for the context of each image. `executor` calls the layers.
        With a `side`, the images are turned to it, and the model is of this side alone.
        """
        v, log_det = self.dequantizer(x, noise.to(self.dtype), executor)
        context = self.context_of(x) if context is None else context
        return self._log_prob_of(v, log_det, labels, context, executor, side)

    def _log_prob_of(
        self,
        v: Tensor,
        log_det: Tensor,
        labels: Tensor | None,
        context: Tensor | None = None,
        executor: Executor = FUSED,
        side: int | None = None,
    ) -> LogProb:
        """The parts of the bound for inputs `v` of the bijection, with the dequantizer's `log_det`.
        Networks that see the class take one pass for each class, if there are no labels. With
        several `sides`, each takes its own passes, unless `v` and `context` are turned to a `side`.
        """
        if self.sides > 1 and side is None:
            parts = []
            for k in range(self.sides):
                of_side = None if context is None else turned(context, k)
                parts.append(self._log_prob_of(turned(v, k), log_det, labels, of_side, executor, k))
            return over_sides(parts)
        if labels is None and isinstance(self.class_prior, ClassContext):
            classes = (torch.full((v.shape[0],), label) for label in range(self.classes))
            each = (self._log_prob_of(v, log_det, k, context, executor, side) for k in classes)
            return over_classes(list(each))
        sides = torch.full((len(v),), side) if side else None
        conditioning = self.conditioning(v.shape[0], labels, context, sides=sides)
        z, flow_log_det = self.bijection.run(executor, "forward", v, conditioning)
        log_det = log_det + flow_log_det
        if isinstance(self.class_prior, ClassPrior):
            return self.class_prior.with_base(z, log_det, labels)
        return LogProb(self.base_log_prob(z), log_det)

    def base_log_prob(self, z: Tensor) -> Tensor:
        """The log-density of latents `(B, D)` without a class, `(B,)` in nats: log N(z; 0, I)."""
        return normal_log_prob(z)

    def log_prob(
        self,
        x: Batch,
        generator: torch.Generator | None = None,
        labels: Labels | None = None,
        draws: int = 1,
        context: Tensor | None = None,
    ) -> Tensor:
        """A bound on log P(x), `(B,)` in nats, from one draw of the dequantization noise.

        Several draws give the importance-weighted bound, the log of their mean probability (Burda
        et al. 2016), which is nearer to log P(x). With Gaussian noise the result is the log-density
        of noisy images, and the mean over draws.

        Args:
            x: Integers in 0..Q-1, or reals of real-valued data, `(B, C, H, W)`. It is not changed.
                NumPy arrays and lists of PIL images will do (`as_tensor`).
            generator: Draws the dequantization noise. With a CPU generator, the noise of an image
                does not depend on the batch size.
            labels: Classes `(B,)` for log P(x | class). Without them the result is log P(x).
            draws: Number of draws of the noise.
            context: Integers `(B, C', H', W')` for log P(x | context), by default `context_of(x)`.

        Raises:
            ValueError: An argument does not fit the model, a value is outside 0..Q-1, there are
                several `draws` of an exact likelihood, or the flow is in half precision.
        """
        x = self._checked(x)
        if draws < 1 or (draws > 1 and self.exact):
            why = "the likelihood is exact" if draws > 1 else "at least 1 is needed"
            raise ValueError(f"draws: {draws}, where {why}")
        labels = self._checked_labels(labels, len(x))
        if context is not None:
            context = self._checked_context(context, len(x))
        noise = draw_noise((len(x), draws, *self.shape), generator, x.device)
        with full_precision(x):  # the autocast of a caller would cost likelihood
            bounds = [self(x, u, labels, context=context).total for u in noise.unbind(dim=1)]
        return self.kind.over_draws(torch.stack(bounds))

    def log_density(
        self, y: Tensor, labels: Labels | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The log-density of dequantized images `y` in [0, 1), `(B, C, H, W)`, minus D log Q.

        It is `(B,)` in nats, and differentiable with respect to `y`. Its mean probability over the
        cell of an image's levels is P(x), P(x | class) with `labels` `(B,)`, or P(x | context) with
        the `context` that a model with an `image_context` needs, as in `decode`. Raises
        `ValueError` for real-valued data, or for other labels or another context.
        """
        if isinstance(self.dequantizer, RealValued):
            raise ValueError("real-valued data are not dequantized: use log_prob")
        labels = self._checked_labels(labels, len(y))
        context = self._checked_context(context, len(y))
        with full_precision(y):
            return self._log_prob_of(*self.dequantizer.from_unit(y), labels, context).total

    def bits_per_dim(
        self, x: Batch, generator: torch.Generator | None = None, draws: int = 1
    ) -> Tensor:
        """The bound of `log_prob` in bits per dimension, `(B,)`: `-log P(x) / (D log 2)`.

        Raises `ValueError` for real-valued data and for Gaussian noise: a density has no bits.
        """
        if self.kind.no_bits is not None:
            raise ValueError(f"{self.kind.no_bits}: use log_prob")
        return bits_per_dim(self.log_prob(x, generator, draws=draws), self.dims)

    @torch.no_grad()
    def encode(self, x: Batch, executor: Executor | None = None) -> Tensor:
        """The latent at the middle of each image's bin, `(B, D)`.

        There is no randomness, so `decode` gives `x` back, with `context_of(x)` for a model with an
        `image_context`. A causal flow computes one entry after the other for that, so it takes as
        long as `decode`. With another `executor` it is one pass, exact up to rounding.
        """
        x = self._checked(x)
        v = self.dequantizer.middle(x, self.dtype)
        conditioning = self.conditioning(len(x), context=self.context_of(x))
        with full_precision(v):  # the autocast of a caller would make it inexact
            return self.bijection.run(executor or MatchingInverse(), "forward", v, conditioning)[0]

    @torch.no_grad()
    def decode(
        self,
        z: Tensor | np.ndarray,
        labels: Labels | None = None,
        executor: Executor = FUSED,
        guidance: float | None = None,
        denoise: bool = False,
        context: Tensor | None = None,
        sides: Tensor | None = None,
    ) -> Tensor:
        """Latents `(B, D)` to images, uint8 `(B, C, H, W)`, or to reals.

        Args:
            z: The latents.
            labels: Classes `(B,)` that the networks see. By default they see none, as in `encode`.
            executor: Calls the layers.
            guidance: The weight of classifier-free guidance (`Guided`). 0 changes nothing.
            denoise: Whether to take one step of `denoised` after it.
            context: Integers `(B, C', H', W')`, which a model with an `image_context` needs.
            sides: From which side `(B,)` each image is computed, by default from its first one.

        Raises:
            FloatingPointError: The result is not finite.
            ValueError: The model has no guidance (`unguided`) or no Gaussian noise, or it needs
                other latents, other labels or another context.
        """
        if denoise and self.dequantizer.sigma is None:  # before the work of the inverse
            raise ValueError(f"denoise: {NO_SIGMA}")
        z = torch.as_tensor(z, dtype=self.dtype, device=self.device)
        if z.shape[1:] != (self.latent_dims,) or not len(z):
            raise ValueError(f"expected latents (B, {self.latent_dims}), got {tuple(z.shape)}")
        labels = self._checked_labels(labels, len(z))
        context = self._checked_context(context, len(z))
        if context is not None and sides is not None:
            context = turn_each(context.clone(), sides)
        conditioning = self.conditioning(len(z), labels, context, guidance, sides)
        with full_precision(z):
            v, _ = self.bijection.run(executor, "inverse", z, conditioning)
            if denoise:
                v = self.denoised(v, labels, context)
        x = self.dequantizer.to_data(v).contiguous()
        return x if sides is None else turn_each(x, sides, back=True)

    def denoised(
        self, v: Tensor, labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """The mean of the image without noise, given noisy ones `v`, inputs of the flow.

        It is one step, `v + sigma^2 grad log p(v)` (Tweedie's formula, Robbins 1956; TarFlow, Zhai
        et al. 2024, section 3.3), exact where p is the density of noisy images. The density is
        given the classes `labels` `(B,)` or the `context`, without guidance. Raises `ValueError` if
        the noise is not Gaussian.
        """
        sigma = self.dequantizer.sigma
        if sigma is None:
            raise ValueError(f"denoise: {NO_SIGMA}")
        with full_precision(v), torch.inference_mode(False), torch.enable_grad():
            v = v.detach().clone().requires_grad_()  # a tensor of inference mode takes no gradient
            log_prob = self._log_prob_of(v, v.new_zeros(len(v)), labels, context).total
            (score,) = torch.autograd.grad(log_prob.sum(), v)
        return v.detach() + sigma**2 * score

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        labels: Labels | None = None,
        guidance: float | None = None,
        denoise: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """`n` images from the model, uint8 `(n, C, H, W)`, or points.

        `temperature` scales the standard deviation of the base density. A class-conditional model
        samples the classes in `labels` `(n,)`, or by default all classes in turn. `guidance`,
        `denoise` and `context` as in `decode`.
        """
        labels = self.classes_in_turn(n) if labels is None else labels
        noise = self.draw_latents(n, generator)
        latents = self.latents_of_classes(temperature * noise, labels)
        sides = sides_of(noise, self.sides)
        return self.decode(latents, labels, FUSED, guidance, denoise, context, sides)

    @torch.no_grad()
    def sample_with_log_prob(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        labels: Labels | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The result of `sample`, then its `log_prob`, `(n,)` in nats, by the same generator."""
        labels = self.classes_in_turn(n) if labels is None else labels
        x = self.sample(n, temperature, generator, labels, context=context)
        return x, self.log_prob(x, generator, labels, context=context)

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` standard normal latents, `(n, D)`, of which the first do not depend on `n`."""
        where = self.device if generator is None else generator.device
        rows = torch.empty(n, self.latent_dims, dtype=torch.float32, device=where)
        for i in range(n):
            rows[i].normal_(generator=generator)
        return rows.to(self.device, self.dtype)

    def latents_of_classes(self, noise: Tensor, labels: Labels | None = None) -> Tensor:
        """Standard normal draws `(B, D)` as latents of the classes `labels`, by default of all
        classes in turn. Raises `ValueError` for labels that the model does not have.
        """
        labels = self.classes_in_turn(len(noise)) if labels is None else labels
        if labels is None:
            return noise
        labels = checked_labels(labels, self.classes, len(noise)).to(self.device)
        assert self.class_prior is not None
        return self.class_prior.latents_of_classes(noise.to(self.device), labels)

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """The latents `(B, D)` as one tensor `(B, C, H, W)` for each level, the finest first.

        A model of vectors has one level, `(B, D)`.
        """
        return self.bijection.split_latents(z)

    def classes_in_turn(self, n: int) -> Tensor | None:
        """The labels `(n,)` of `n` samples: all classes in turn, or None if there are none."""
        return torch.arange(n) % self.classes if self.classes else None

    def context_of(self, x: Tensor) -> Tensor | None:
        """The context of integers `x` `(B, C, H, W)`, if there is one: uint8 `(B, C', H', W')`."""
        return None if self.image_context is None else self.image_context.of(x)

    def conditioning(
        self,
        count: int,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        guidance: float | None = None,
        sides: Tensor | None = None,
    ) -> Context | None:
        """The context of the bijection's networks for B = `count` examples: their classes `labels`
        `(B,)`, a `context` of integers `(B, C', H', W')`, or their `sides` `(B,)` as `orders`.
        Raises `ValueError` for a weight of `guidance` if there is none.
        """
        if guidance is not None and self.unguided:
            raise ValueError(f"guidance: {self.unguided}")
        if self.image_context is not None and context is not None:
            return self.image_context.scaled(context.to(self.device), self.dtype)
        if self.class_prior is None:
            if sides is None or self.orders == 1:
                return None
            return order_context(sides, self.orders).to(self.device, self.dtype)
        of_class = self.class_prior.context(labels, count)
        if of_class is None:
            return None
        of_class = of_class.to(self.device, self.dtype)
        return Guided(of_class, torch.zeros_like(of_class), guidance) if guidance else of_class

    def require_no_context(self, what: str) -> None:
        """Raises `UserError` that begins with `what` for a model with an `image_context`."""
        if self.image_context is not None:
            raise UserError(
                f"{what}: not possible for a model of images given {self.image_context.words} "
                f"(model.context)"
            )

    def _checked_context(self, context: Tensor | None, count: int) -> Tensor | None:
        if self.image_context is not None:
            return self.image_context.checked(context, count).to(self.device)
        if context is not None:
            raise ValueError("the model has no image_context: it is of images by themselves")
        return None

    def _checked_labels(self, labels: Labels | None, count: int) -> Tensor | None:
        if labels is None:
            return None
        return checked_labels(labels, self.classes, count).to(self.device)

    def _checked(self, batch: Batch) -> Tensor:
        x = as_tensor(batch, self.shape, self.num_bins)
        self.dequantizer.check(x)
        if self.dtype.itemsize < 4:
            raise ValueError(f"the flow is in {self.dtype}, and likelihoods need float32 or wider")
        return x.to(self.device)


@torch.no_grad()
def initialize(flow: Flow, x: Tensor, noise: Tensor) -> None:
    """Data-dependent initialization: one pass in which each new layer is set from its input.

    Raises `UserError` for latents of another shape, whose likelihood would lack entries.
    """
    z, _ = flow.to_latents(x, noise, Initializing())
    if z.shape != (expected := (len(x), flow.latent_dims)):
        raise UserError(f"model.name: it has latents of shape {tuple(z.shape)}, not {expected}")
