"""Training: seconds of a full optimizer step, beside the floor (the conditioners' convolutions
alone) and the peers.
"""

import torch
from common import (
    WORK,
    arguments,
    begin,
    fastest_floor,
    flowtrain_state,
    flowtrain_step,
    images,
    in_turns,
    peers,
    table,
)


def main() -> None:
    options = arguments(__doc__, work="S").parse_args()
    work = WORK[options.work]
    x = images(work.batch_size)
    begin(f"Training step, {options.work}: {work}", options)
    contenders, floors = {}, {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layout, run = fastest_floor(work, dtype)
        floors[precision] = f"floor {precision} ({layout})"
        contenders[floors[precision]] = run
        state = flowtrain_state(work, precision=precision)
        contenders[f"flowtrain {precision}"] = lambda state=state: flowtrain_step(state, x)
    for name, peer in peers(work).items():
        contenders[name] = lambda peer=peer: peer.step(x)
    print()
    seconds = in_turns(contenders, options.repeats)
    table(
        seconds,
        {
            "to floor fp32": floors["fp32"],
            "to floor bf16": floors["bf16"],
            "to flowtrain fp32": "flowtrain fp32",
            "to flowtrain bf16": "flowtrain bf16",
        },
    )


if __name__ == "__main__":
    main()
