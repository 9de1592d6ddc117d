"""Sampling: seconds for 64 images, beside a forward pass of 64 images and the peers. Then the same
of a causal flow, which samples one entry after the other.
"""

from common import SHAPE, WORK, arguments, begin, flowtrain_state, images, in_turns, peers, table

from flowtrain import config as configuration
from flowtrain.checkpoints.build import build_flow
from flowtrain.flow.flow import Flow, initialize

IMAGES = 64
CAUSAL = {"name": "causal", "width": 192, "blocks": 8, "components": 5}


def causal_flow() -> Flow:
    """As it starts, apart from the least squares. Weights do not change how long anything takes."""
    described = {"data": {"name": "cifar10"}, "model": CAUSAL, "train": {"num_steps": 1}}
    flow = build_flow(configuration.parse(described), SHAPE, 256)
    x = images(IMAGES)
    initialize(flow, x, x.new_zeros(x.shape, dtype=flow.dtype))
    return flow.eval().requires_grad_(False)


def main() -> None:
    options = arguments(__doc__, work="S").parse_args()
    work = WORK[options.work]
    begin(f"Sampling {IMAGES} images, {options.work}: {work}; and {CAUSAL}", options)
    flow = flowtrain_state(work).flow.eval().requires_grad_(False)
    causal = causal_flow()
    x = images(IMAGES)
    contenders = {
        "flowtrain, forward pass": lambda: flow.log_prob(x),
        "flowtrain, sampling": lambda: flow.sample(IMAGES),
    }
    for name, peer in peers(work).items():
        contenders[f"{name}, sampling"] = lambda peer=peer: peer.sample(IMAGES)
    contenders["causal, forward pass"] = lambda: causal.log_prob(x)
    contenders["causal, sampling"] = lambda: causal.sample(IMAGES)
    seconds = in_turns(contenders, options.repeats)
    table(
        seconds,
        {"to the forward pass": "flowtrain, forward pass", "to sampling": "flowtrain, sampling"},
    )


if __name__ == "__main__":
    main()
