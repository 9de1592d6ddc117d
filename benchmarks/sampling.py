"""Sampling: seconds for 64 images, beside a forward pass of 64 images and the peers. Then the same
for the small configurations of flowtrain, some of which sample one entry after the other.

`--trained RUN` adds trained models, by both of their ways where they have two: Jacobi iteration
takes as many passes as the weights demand.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from common import WORK, arguments, begin, flowtrain_state, images, in_turns, peers, table

import flowtrain
from flowtrain.bijections.inverses import Iterating, iterates
from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import DataSet
from flowtrain.flow.flow import Flow, initialize

IMAGES = 64  # by default
CONFIGS = (
    *("glow_digits", "causal_digits", "glow_mnist_small", "causal_mnist_small"),
    *("glow_cifar_small", "causal_cifar_small", "tarflow_mnist_small", "tarflow_cifar_small"),
    "jet_cifar_small",
)


def flow_of(name: str) -> Flow:
    """The flow of a configuration of flowtrain, initialized from random images. Weights do not
    change how long anything takes.
    """
    config = load_config(find_config(name))
    data = DataSet(config.data)
    assert data.kind.num_bins is not None
    flow = build_flow(config, data.shape, data.kind.num_bins)
    x = torch.randint(data.kind.num_bins, (IMAGES, *data.shape), dtype=torch.uint8)
    initialize(flow, x, torch.rand(x.shape, dtype=flow.dtype))
    return flow.eval().requires_grad_(False)


def ways(name: str, flow: Flow, count: int) -> dict[str, Callable[[], object]]:
    """The ways in which a trained flow samples."""
    z = flow.draw_latents(count, torch.Generator().manual_seed(0))
    found: dict[str, Callable[[], object]] = {f"`{name}`, {flow.sampling}": lambda: flow.decode(z)}
    if iterates(flow.bijection):
        executor = Iterating(lambda share: None)
        found[f"`{name}`, Jacobi"] = lambda: flow.decode(z, executor=executor)
    return found


def main() -> None:
    parser = arguments(__doc__, work="S")
    parser.add_argument("--configs", nargs="*", default=CONFIGS, help="the configurations")
    parser.add_argument("--trained", nargs="*", default=[], help="trained models")
    parser.add_argument("--num-images", type=int, default=IMAGES, help="of each contender")
    options = parser.parse_args()
    count = options.num_images
    work = WORK[options.work]
    begin(f"Sampling {count} images, {options.work}: {work}", options)
    flow = flowtrain_state(work).flow.eval().requires_grad_(False)
    x = images(count)
    contenders = {
        "flowtrain, forward pass": lambda: flow.log_prob(x),
        "flowtrain, sampling": lambda: flow.sample(count),
    }
    for name, peer in peers(work).items():
        contenders[f"{name}, sampling"] = lambda peer=peer: peer.sample(count)
    seconds = in_turns(contenders, options.repeats)
    table(
        seconds,
        {"to the forward pass": "flowtrain, forward pass", "to sampling": "flowtrain, sampling"},
    )
    flows = {name: flow_of(name) for name in options.configs}
    print()
    others: dict[str, Callable[[], object]] = {
        f"`{name}`, {flow.sampling}": lambda flow=flow: flow.sample(count)
        for name, flow in flows.items()
    }
    for name in options.trained:
        others |= ways(Path(name).name, flowtrain.load(name), count)
    table(in_turns(others, options.repeats), {})


if __name__ == "__main__":
    main()
