"""Sampling: seconds for 64 images, beside a forward pass of 64 images and the peers."""

from common import WORK, arguments, begin, flowtrain_state, images, in_turns, peers, table

IMAGES = 64


def main() -> None:
    options = arguments(__doc__, work="S").parse_args()
    work = WORK[options.work]
    begin(f"Sampling {IMAGES} images, {options.work}: {work}", options)
    flow = flowtrain_state(work).flow.eval().requires_grad_(False)
    x = images(IMAGES)
    contenders = {
        "flowtrain, forward pass": lambda: flow.log_prob(x),
        "flowtrain, sampling": lambda: flow.sample(IMAGES),
    }
    for name, peer in peers(work).items():
        contenders[f"{name}, sampling"] = lambda peer=peer: peer.sample(IMAGES)
    seconds = in_turns(contenders, options.repeats)
    table(
        seconds,
        {"to the forward pass": "flowtrain, forward pass", "to sampling": "flowtrain, sampling"},
    )


if __name__ == "__main__":
    main()
