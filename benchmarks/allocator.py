"""glibc's malloc by default, and when it keeps freed memory (flowtrain/system/allocator.py):
seconds, page faults and peak memory.

Each figure comes from a process of its own, because malloc cannot go back. The two kinds take
turns.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import WORK, arguments, flowtrain_state, flowtrain_step, heading, images

from flowtrain.system.allocator import keep_freed_memory

KINDS = {"step fp32": 32, "step bf16": 32, "sampling 64": 64, "likelihood of 250": 250}
EARLY = 5  # calls after which the memory should have reached its peak


def work(kind: str) -> Callable[[], object]:
    state = flowtrain_state(
        WORK["S"], precision=kind.removeprefix("step ") if kind.startswith("step") else "fp32"
    )
    x = images(KINDS[kind])
    if kind.startswith("step"):
        return lambda: flowtrain_step(state, x)
    if kind == "sampling 64":
        z = state.flow.draw_latents(len(x), torch.Generator().manual_seed(0))
        return lambda: state.flow.decode(z)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.no_grad()(lambda: state.flow(x, noise))


def measure(kind: str, calls: int) -> dict[str, float]:
    run = work(kind)
    seconds, peaks = [], []
    for _ in range(3):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(calls):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt
    return {
        "seconds": statistics.median(seconds),
        "faults": faults / calls,
        "early": peaks[min(EARLY, calls) - 1],
        "peak": peaks[-1],
    }


def main() -> None:
    parser = arguments(__doc__, kind="", keep="")
    parser.add_argument("--calls", type=int, default=15, help="calls timed in each process")
    options = parser.parse_args()
    if options.kind:  # one measurement
        if options.keep == "yes" and not keep_freed_memory():
            sys.exit("this C library has no such setting")
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.kind, options.calls)))
        return
    heading("Memory that is freed: given back (glibc's default) or kept; S", options.threads)
    print(
        "| | ms, given back | kept | ratio | faults per call | kept | peak MiB | kept | its growth "
        "after call 5 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        found: dict[str, list[dict[str, float]]] = {"no": [], "yes": []}
        for _ in range(options.repeats):
            for keep, results in found.items():
                command = [
                    sys.executable,
                    __file__,
                    "--kind",
                    kind,
                    "--keep",
                    keep,
                    "--calls",
                    str(options.calls),
                ]
                done = subprocess.run(
                    [*command, "--threads", str(options.threads)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                results.append(json.loads(done.stdout.splitlines()[-1]))

        def median(keep: str, key: str, found: dict[str, list[dict[str, float]]] = found) -> float:
            return statistics.median(result[key] for result in found[keep])

        ratio = statistics.median(
            k["seconds"] / g["seconds"] for g, k in zip(found["no"], found["yes"], strict=True)
        )
        cells = [
            f"{1000 * median('no', 'seconds'):.0f}",
            f"{1000 * median('yes', 'seconds'):.0f}",
            f"{ratio:.2f}",
        ]
        cells += [f"{median(keep, key):.0f}" for key in ("faults", "peak") for keep in found]
        cells.append(f"{statistics.median(r['peak'] - r['early'] for r in found['yes']):.0f}")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    print()


if __name__ == "__main__":
    main()
