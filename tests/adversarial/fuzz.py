"""Gives damaged and crafted files to commands, each in a process of its own with a limit of time
and of memory: `PYTHONPATH=tests python tests/adversarial/fuzz.py --cases 1000`.

A case is a format and a number, such as `archive:17`, and the same each time. `--only archive:17`
runs it alone, shows the command and what it printed, and keeps its files.

What fails: an exit code other than 0 and 2 (or a documented 1), a traceback, a
message of more than six lines, the limits, and a damaged file with a checksum that is accepted.

Prints one JSON object: per format the cases that were tried, refused and accepted, the largest
time and memory; and the faults.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import children
import damage
import sound
from catalogue import sets
from children import Outcome
from sound import ON_FOLDER, TRAIN

SECONDS = 20  # per case
MEMORY = 1024  # MiB per case, besides what python with torch and flowtrain takes
LINES = 6  # of a message
# The reasons that a command may give for exit code 1.
DOCUMENTED = ("not finite", "non_finite", "damaged or diverged")
LAST = "run/checkpoints/last.safetensors"


@dataclass
class Format:
    names: list[str]  # patterns of the sound files of which one is damaged
    commands: dict[str, float]  # those that read it, with their weights; `FILE` is its path
    share: int = 1  # of the cases
    at: str = ""  # path of the file, by default its own
    refused: bool = False  # whether damaged bytes without a new checksum are always refused
    accepted: bool = True  # whether a sound file is always accepted


NEW = f"{shlex.join(TRAIN)} --run-dir new"
SMALL = [*sets(model__name="glow", model__levels=2, model__steps=1, model__width=8)]
SMALL += sets(train__num_steps=1, train__batch_size=8, train__accumulate=1)
CONFIGURED = f"train --config c.yaml --run-dir new {shlex.join(SMALL)}"
FOLDER = f"{shlex.join(ON_FOLDER)} --run-dir new"
NPZ = shlex.join(sets(data__name="npz", data__path="x.npz", train__num_steps=1))
FORMATS = {
    "checkpoint": Format(
        [LAST, "other/checkpoints/last.safetensors"],
        {
            "evaluate FILE --num-images 4 --json -": 4,
            "sample FILE --num-images 2 --out s.png": 4,
            "interpolate FILE --pairs 1 --steps 3 --out i.png": 4,
            "compress FILE --split test --num-images 3 --out x.fta": 2,
            f"{shlex.join(TRAIN)} --run-dir run": 4,
            f"{NEW} --resume FILE": 4,
            f"{NEW} --init-from FILE": 2,
            "report FILE --num-images 2 --out r.html": 0.3,
            "doctor FILE --num-images 2": 0.3,
        },
        share=5,
        at=LAST,
        refused=True,
    ),
    "archive": Format(
        ["embedded.fta", "apart.fta"],
        {
            "decompress FILE --out out --max-memory 300": 4,
            "decompress FILE --out out --max-memory 300 --model run": 1,
        },
        share=5,
        refused=True,
    ),
    "npz": Format(
        ["x.npz", "other.npz"],
        {"evaluate colour --data FILE --json -": 7, f"{NEW} {NPZ} --set data.validation=2": 3},
        share=3,
        at="x.npz",
    ),
    "config": Format(
        ["run/config.yaml"], {CONFIGURED: 1, f"{CONFIGURED} --dry-run": 1}, 3, "c.yaml"
    ),
    "run": Format(
        ["run/metrics.jsonl", "run/summary.json", "run/config.yaml", "run/evaluate-test.json"],
        {
            "compare run other --json c.json": 3,
            "compare other run": 3,
            f"{shlex.join(TRAIN)} --run-dir run": 3,
            "report run --num-images 2": 1,
        },
        share=3,
    ),
    "lock": Format(["run/.lock"], {f"{shlex.join(TRAIN)} --run-dir run": 1}),
    "picture": Format(
        ["pictures/*.*"],
        {
            "interpolate run --images FILE pictures/grey.png --out i.png": 1,
            "compress run FILE --out x.fta": 1,
            "compress colour FILE --out x.fta": 1,
            "evaluate colour --data pictures --json -": 1,
            FOLDER: 1,
        },
        share=3,
        accepted=False,
    ),
    "cache": Format(["cache/**/*.*"], {FOLDER: 1}),
    "latents": Format(
        ["z.npz", "other-z.npz"],
        {"decode run FILE --out out": 1, "decode run FILE --out out.npz": 1},
        share=2,
    ),
    "attributes": Format(
        ["attributes.npz", "other-attributes.npz"],
        {
            "interpolate run --along one --pairs 2 --steps 3 --out i.png": 1,
            "attributes run --to-class 2 --name two": 1,
        },
        share=2,
        at="run/attributes.npz",
    ),
    "points": Format(["points.npz", "points.npy"], {"encode moons --images FILE --out e.npz": 1}),
    "table": Format(
        ["table.csv"],
        {
            f"attributes colour --csv FILE --images pictures{more}": 1
            for more in ("", " --orthogonal", " --method logistic")
        },
    ),
    "mask": Format(
        ["mask.png", "pictures/colour.png"],
        {
            "inpaint colour --image pictures/colour.png --mask mask.png --num-images 1 --steps 8 "
            "--out out.npz": 1
        },
    ),
}


def attempt(name: str, files: Path, folder: Path) -> tuple[list[str], Outcome, str]:
    """Runs a case in a new folder: its command, what came of it, and its fault, if it has one."""
    format_, draw = FORMATS[name.partition(":")[0]], random.Random(name)
    found = [path for each in format_.names for path in sorted(files.glob(each)) if path.is_file()]
    file, other = draw.sample(found, 2) if len(found) > 1 else found * 2
    chance = draw.random()
    data = damage.crafted(draw, file, damaged=chance > 0.05) if chance < 0.6 else None
    crafted = data is not None  # sealed again
    if data is None:
        data = damage.of_bytes(draw, file.read_bytes(), other.read_bytes())
    command = draw.choices(list(format_.commands), list(format_.commands.values()))[0]
    path = format_.at or str(file.relative_to(files))
    words = [word if word != "FILE" else path for word in shlex.split(command)]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files, folder)
    (folder / path).write_bytes(data)
    outcome = children.run(words, folder, SECONDS, MEMORY)
    fault = fault_of(words, outcome)
    unchanged = data in (file.read_bytes(), other.read_bytes())
    if crafted and chance <= 0.05 and format_.accepted and outcome.code == 2:
        fault = "a sound file was refused"
    elif format_.refused and outcome.code == 0 and not crafted and not unchanged:
        fault = fault or "a damaged file was accepted"
    return words, outcome, fault


def fault_of(words: list[str], outcome: Outcome) -> str:
    said = outcome.err.strip()
    if outcome.code < 0:
        return f"ended by signal {-outcome.code}"
    if "Traceback" in said:
        return "a traceback"
    if "Warning:" in said:
        return "a warning of Python"
    if outcome.code and len(said[said.rfind("flowtrain:") :].splitlines()) > LINES:
        return "a long message"
    documented = words[0] == "doctor" or any(reason in said for reason in DOCUMENTED)
    if outcome.code in (0, 2) or outcome.code == 1 and documented:
        return ""
    return f"exit code {outcome.code}"


def names_of(cases: int, first: int) -> list[str]:
    """Cases of all formats by their shares, numbered from `first`, in an order that mixes them."""
    shares = [name for name in FORMATS for _ in range(FORMATS[name].share)]
    random.Random(0).shuffle(shares)
    return [f"{shares[i % len(shares)]}:{first + i}" for i in range(cases)]


def fuzz(names: list[str], files: Path, folder: Path) -> dict[str, object]:
    counts: dict[str, Counter] = {kind: Counter() for kind in FORMATS}
    faults: dict[str, list[str]] = {}  # cases that failed in the same way
    for name in names:
        words, outcome, fault = attempt(name, files, folder / "case")
        count = counts[name.partition(":")[0]]
        codes = {2: "refused", 0: "accepted"}
        count.update(["tried", codes.get(outcome.code, "failed")])
        count["seconds"] = max(count["seconds"], round(outcome.seconds, 1))
        count["mib"] = max(count["mib"], round(outcome.peak))
        if count["tried"] % 100 == 0:
            print(name, file=sys.stderr)
        if fault:
            print(f"{name}: {fault}", file=sys.stderr)
            last = outcome.err.strip().rpartition("\n")[2][-300:]
            faults.setdefault(f"{words[0]}: {fault}: {last}", []).append(name)
    return {"formats": counts, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--only", metavar="CASE")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    children.prepare()
    sound.make(folder / "sound")
    if options.only:
        words, outcome, fault = attempt(options.only, folder / "sound", folder / "case")
        print(f"cd {folder / 'case'}", "flowtrain " + shlex.join(words), sep="\n")
        print(outcome.out, outcome.err, outcome, fault or "no fault", sep="\n")
        return
    result = fuzz(names_of(options.cases, options.first), folder / "sound", folder)
    shutil.rmtree(folder)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
