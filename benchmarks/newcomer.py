"""The first ten minutes of a new user: runs commands of the README, and prints a timeline.

`python benchmarks/newcomer.py` clones the repository, makes a virtual environment, and runs there
the examples of the README, from top to bottom. `--busy 2` keeps two processes busy meanwhile.
`--packages-here` lets the new environment see the packages of this one, because a download of torch
may take longer than all the rest.
"""

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import busy

REPOSITORY = Path(__file__).resolve().parents[1]
SHOWN = 15  # lines of the output of a command that fails


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="busy processes beside it")
    parser.add_argument("--packages-here", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flowtrain-newcomer-") as folder, busy(options.busy):
        print(f"{os.cpu_count()} cores, {options.busy} busy processes beside\n")
        print("| from | seconds | command |\n|---|---|---|", flush=True)
        clone, environment = Path(folder) / "flowtrain", Path(folder) / "venv"
        timeline = Timeline()
        timeline.run(f"git clone {REPOSITORY} flowtrain", Path(folder))
        timeline.run(f"{sys.executable} -m venv {environment}", Path(folder))
        if options.packages_here:
            (packages,) = environment.glob("lib/python*/site-packages")
            (packages / "here.pth").write_text("\n".join(site.getsitepackages()))
        timeline.path = f"{environment / 'bin'}:{os.environ['PATH']}"
        for line in commands((clone / "README.md").read_text(encoding="utf-8")):
            timeline.run(line, clone)


def commands(readme: str) -> list[str]:
    """The story of the README, after the installation with its extras. A browser is left out."""
    story = readme.partition("## By example")[2].partition("## ")[0]
    found = re.findall(r"^    (flowtrain .*?)(?:\s{2,}#.*)?$", story, re.MULTILINE)
    return ["pip install .[compress]", *(line for line in found if " explore " not in line)]


class Timeline:
    """Runs commands, and prints when each started and how long it took."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.path = os.environ["PATH"]

    def which(self, program: str) -> str:
        return shutil.which(program, path=self.path) or program

    def run(self, command: str, folder: Path) -> None:
        """Ends the program where the command fails, with the end of its output."""
        begun = time.monotonic()
        # What this program was started with is not what a newcomer has.
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [self.which(command.split()[0]), *command.split()[1:]],
            cwd=folder,
            env={**kept, "PATH": self.path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        minutes, seconds = divmod(round(begun - self.started), 60)
        took = time.monotonic() - begun
        shown = command.replace(str(folder), ".").replace(str(folder.parent), "..")
        print(f"| {minutes}:{seconds:02} | {took:.1f} | `{shown}` |", flush=True)
        if done.returncode != 0:
            print("\n".join(done.stdout.splitlines()[-SHOWN:]))
            raise SystemExit(f"{command}: exit code {done.returncode}")


if __name__ == "__main__":
    main()
