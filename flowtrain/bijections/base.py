"""The contract of an invertible layer, and functions that many layers need."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flowtrain.bijections.context import Context

Direction = Literal["forward", "inverse"]


class Executor(Protocol):
    """Calls the layers of a flow. See `execution.py`, and for training `memory.py`."""

    def call(
        self, layer: "Bijection", direction: Direction, x: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """Calls one layer that is not made of others."""

    def chain(
        self,
        layers: Sequence["Bijection"],
        direction: Direction,
        x: Tensor,
        context: Context | None,
    ) -> tuple[Tensor, Tensor]:
        """Calls layers, listed from data to latents, and adds up their log-determinants."""


class Bijection(nn.Module):
    """An invertible map of one example's tensor: `forward` from data to latents, and `inverse`.

    Both return the result and `log_det`, the log of the absolute Jacobian determinant **of the
    direction just computed**, in nats, per example, shape `(B,)`. An example's result may not
    depend on the rest of its batch. A conditional layer hands its `context`, `(B, C', H, W)` or
    `(B, E)` or two of them (`context.py`), to `apply_conditioner`.

    All other defaults suit a layer that computes both directions from its parameters alone. A
    function for a single consumer is a `functools.singledispatch` function there.
    """

    inverse_is_sequential: bool = False  # whether the inverse computes one entry after the other
    # The values of `train.precision` for which `reconstruct` saves memory and is right.
    reversible_in: Sequence[str] = ("fp32", "bf16")
    has_network: bool = False  # whether networks take most of its time
    # Whether it maps centred images x + u with levels x by the distributions of the levels. The
    # likelihood is then the same for all u.
    is_discrete: bool = False
    of_angles: bool = False  # whether it maps angles, to which whole turns make no difference
    initialization_images: int = 64  # for `initialize`; fewer determine the coarsest level badly

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def run(
        self, executor: Executor, direction: Direction, x: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs this layer, or the layers that it is made of, in a direction by `executor`."""
        return executor.call(self, direction, x, context)

    def untraceable_directions(self) -> list[Direction]:
        """The directions with data-dependent loops, or loops over entries, for a compiler."""
        return []

    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        """Sets the layer from its input on the first batch. Most layers have nothing to set."""

    def tensors(self) -> list[Tensor]:
        """The tensors in the computation that need a gradient: by default the parameters."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reconstruct(
        self, z: Tensor, context: Context | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The input `x` of an output `z`, as a leaf of autograd, and `forward(x)` with its graph.

        This serves backward passes that have kept outputs only. `z` is another leaf: parts that `z`
        and `x` share may be computed from `z`, whose gradient then counts as one of `x`.
        """
        with torch.no_grad():
            # Detached, because the compiler would take a view of z for a part of its graph.
            x = self.inverse(z.detach(), context)[0]
        return x.requires_grad_(), *self(x, context)

    def latent_dims(self, dims: int) -> int:
        """The number of latent entries for `dims` entries: fewer for data on a surface."""
        return dims

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """`z` `(B, D)` as the latents of each level, `(B, C, H, W)`, coarsest last; or `[z]`."""
        return [z]


class DataDependentInit(Bijection):
    """A layer that `set_from` sets from the first batch, which the buffer `initialized` records.

    Until then both directions raise `RuntimeError`.
    """

    initialized: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("initialized", torch.tensor(False))
        self._known_initialized = False  # spares a device synchronization per call

    def set_from(self, x: Tensor) -> None:
        """Sets the layer from its input `x` on the first batch, without gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Context | None = None) -> None:
        if not self.initialized:
            self.set_from(x)
            self.initialized.fill_(True)

    def require_initialized(self) -> None:
        if not self._known_initialized:
            if not self.initialized:
                raise RuntimeError(
                    f"{type(self).__name__} is not initialized: call "
                    f"flowtrain.flow.initialize(flow, x, noise) first"
                )
            self._known_initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Compiled code cannot look it up after a rollback.
        self._known_initialized = not self.initialized.is_meta and bool(self.initialized)


class Transform(nn.Module):
    """An increasing map of single entries, whose parameters a conditioner predicts.

    Both directions return the entries, `(B, C, ...)`, and the log-derivatives **of the direction
    just computed**, of the same shape. The parameters have shape `(B, P C, ...)`: the first
    parameter of all C entries, then the second, and so on.
    """

    parameters_per_entry: int  # P
    inverse_is_untraceable: bool = False  # see `untraceable_directions`

    if TYPE_CHECKING:  # torch declares that a call returns Any

        def __call__(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]: ...

    def parameters_by_entry(self, parameters: Tensor) -> Tensor:
        """`(B, P C, ...)` to `(B, P, C, ...)`."""
        unflattened: Tensor = parameters.unflatten(1, (self.parameters_per_entry, -1))
        return unflattened

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def stacked(layers: Sequence[nn.Module], name: str) -> Tensor:
    """One parameter or buffer of several layers: K times `(...)` to `(K, ...)`."""
    return torch.stack([getattr(layer, name) for layer in layers])


def sum_per_example(values: Tensor) -> Tensor:
    """Sum over everything but the batch: `(B, ...)` to `(B,)`."""
    return values.sum(dim=tuple(range(1, values.ndim)))


def bounded(values: Tensor, limit: float) -> Tensor:
    """`limit * tanh(values / limit)`, which keeps log-scales from blowing up either direction."""
    return limit * torch.tanh(values / limit)


def unbounded(values: Tensor, limit: float) -> Tensor:
    """The inverse of `bounded`, for values clipped to 0.99 of the limit."""
    return limit * torch.atanh((values / limit).clamp(-0.99, 0.99))
