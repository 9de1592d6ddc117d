"""The demo on a shared machine: its time alone, and beside processes that compute all the time.

`python benchmarks/busy.py` takes as long as four demos or more. Nothing else should run.
flowtrain chooses the number of its threads, so OMP_NUM_THREADS is not passed on. The aim is three
times the time alone, beside as many busy processes as there are cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import busy, heading

from flowtrain.system.console import duration

AIM = 3.0
# The commands of `make demo`, in the folder of the run.
COMMANDS = [
    ["train", "--run-dir", "run"],
    ["evaluate", "run"],
    ["sample", "run", "--num-images", "100"],
    ["interpolate", "run", "--pairs", "10"],
]


def demo(settings: list[str]) -> dict[str, float]:
    """Runs the demo in an empty folder, and gives the seconds of each command."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words = [*command, *settings] if command[0] == "train" else command
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "flowtrain", *words],
                check=True,
                cwd=folder,
                env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
                stdout=subprocess.DEVNULL,
            )
            seconds[command[0]] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="how many others are busy"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for a shorter demo")
    options = parser.parse_args()
    heading(f"The demo alone, and beside busy processes: {options.processes}", os.cpu_count() or 1)
    alone = demo(options.settings)
    with busy(options.processes):
        beside = demo(options.settings)
    print("| command | alone | beside them | times |\n|---|---|---|---|")
    rows = {name: (alone[name], beside[name]) for name in alone}
    rows["the demo"] = sum(alone.values()), sum(beside.values())
    for name, (quiet, shared) in rows.items():
        print(f"| {name} | {duration(quiet)} | {duration(shared)} | {shared / quiet:.2f} |")
    quiet, shared = rows["the demo"]
    print(f"\n{'Within' if shared <= AIM * quiet else 'Over'} the aim of {AIM:g} times.")


if __name__ == "__main__":
    main()
