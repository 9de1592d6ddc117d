"""Small files that would take much time or memory, each given to a command in a process of its own:
`PYTHONPATH=tests python tests/adversarial/bombs.py` prints a JSON object with the faults and a
table in Markdown. Other formats have such tests in `make test`: configurations, archives and data.

The table has the size of the file, the exit code, the seconds of computing and the MiB at the peak.
The last row is what python takes with torch and flowtrain imported.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import children
import damage
import sound
from children import MIB
from fuzz import LAST, LINES

SECONDS, MEMORY = 60, 8 * 1024  # of a command, which is ended then
LARGEST = 1024  # MiB at the peak
DEEP = 100_000  # levels


@dataclass
class Bomb:
    """A file `name`, how its content is made, the command that reads it, and its exit code."""

    name: str
    make: Callable[[], bytes]
    words: list[str]
    code: int = 2


def bombs(files: Path) -> dict[str, Bomb]:
    dry = ["train", "--dry-run", "--config", "c.yaml"]
    decode = ["decode", "run", "z.npz", "--out", "out"]
    show = ["interpolate", "run", "--images", "x.png", "pictures/grey.png", "--out", "i.png"]
    table_of = ["attributes", "colour", "--csv", "t.csv"]
    compare, sample = ["compare", "run", "run"], ["sample", LAST, "--num-images", "1"]

    def configured(section: str, **values: object) -> Bomb:
        return Bomb(LAST, lambda: _configured(files, section, values), sample)

    return {
        "YAML: 8^11 values in `--set`": Bomb("c.yaml", bytes, [*dry, "--set", _aliases()]),
        "YAML: 100,000 levels": Bomb("c.yaml", lambda: b"a: " + b"[" * DEEP, dry),
        "YAML: `model.width` of 10^25": Bomb("c.yaml", lambda: b"model: {width: 1e25}", dry),
        "latents: an array of names that claims 100 GB": Bomb(
            "z.npz", lambda: _claimed_names(files), decode
        ),
        "latents: 10^9 names of no bytes": Bomb(
            "z.npz", lambda: _claimed_names(files, "<U0", b""), decode
        ),
        "CSV: 8 million lines": Bomb(
            "t.csv", lambda: (b"file,x\n" + b"a,1\n" * 2**23)[: 2**25], table_of
        ),
        "CSV: 4 million columns": Bomb("t.csv", _columns, table_of),
        "CSV: a value of 32 MB": Bomb(
            "t.csv", lambda: b"file,x\na," + b"1" * (2**25 - 10), table_of
        ),
        "CSV: 64 MB": Bomb("t.csv", lambda: b"file,x\n" + b"a,1\n" * 2**24, table_of),
        "PNG: 2^31 x 2^31": Bomb("x.png", lambda: _png(2**31 - 1, 0), show),
        "PNG: 50,000 x 50,000": Bomb("x.png", lambda: _png(50_000, 50_000), show),
        "PNG: 13,000 x 13,000, less than Pillow's limit": Bomb(
            "x.png", lambda: _png(13_000, 13_000), show, code=0
        ),
        "PNG: a text of 1 GB": Bomb("x.png", _png_with_text, show),
        "checkpoint: `model.couplings` of 10^9": configured("model", name="nice", couplings=10**9),
        "checkpoint: `model.couplings` of 10^6": configured("model", name="nice", couplings=10**6),
        "checkpoint: `model.width` of 10^25": configured("model", width=10**25),
        "checkpoint: `model.width` of 10^6": configured("model", width=10**6),
        "checkpoint: `model.classes` of 65,536": configured("model", classes=2**16),
        "checkpoint: `train.batch_size` of 10^30": configured("train", batch_size=10**30),
        "checkpoint: `dequantization.width` of 10^6": configured(
            "dequantization", name="variational", width=10**6
        ),
        "checkpoint: a description of 5,000 levels": Bomb(
            LAST, lambda: _checkpoint(files, described=damage.DEEP), sample
        ),
        "checkpoint: a header of 1 TB": Bomb(
            LAST, lambda: (2**40).to_bytes(8, "little") + (files / LAST).read_bytes()[8:], sample
        ),
        "checkpoint: a tensor of 4 TB": Bomb(
            LAST, lambda: _checkpoint(files, tensors={"model.x": LARGE}), sample
        ),
        "metrics.jsonl: 100,000 levels": Bomb(
            "run/metrics.jsonl", lambda: b"[" * DEEP + b"\n", compare
        ),
        "no file, only `--version`": Bomb("nothing", bytes, ["--version"], code=0),
    }


def _deflated(piece: bytes, times: int) -> bytes:
    """A piece that is repeated, in zlib's format."""
    packer = zlib.compressobj(9)
    first, second = (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + second * (times - 1) + packer.flush()
    check = 1
    for _ in range(times):
        check = zlib.adler32(piece, check)
    return packed[:-4] + check.to_bytes(4, "big")


# --- YAML -----------------------------------------------------------------------------------------


def _aliases() -> str:
    value = "&a0 [x, x]"
    for i in range(1, 12):
        value = f"&a{i} [{value}, {', '.join([f'*a{i - 1}'] * 7)}]"
    return f"seed={value}"


# --- checkpoints ----------------------------------------------------------------------------------

LARGE = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}


def _configured(files: Path, section: str, values: dict[str, object]) -> bytes:
    """A checkpoint with these keys in its configuration."""
    described = damage.of_checkpoint((files / LAST).read_bytes())["described"]
    kept = {} if "name" in values else described["config"][section]
    described["config"][section] = kept | values
    return _checkpoint(files, described=described)


def _checkpoint(files: Path, **changed: object) -> bytes:
    """A checkpoint with other parts and a right checksum."""
    return damage.checkpoint(damage.of_checkpoint((files / LAST).read_bytes()) | changed)


# --- latents and tables ---------------------------------------------------------------------------


def _claimed_names(files: Path, kind: str = "<U25", there: bytes = bytes(99)) -> bytes:
    """A file of latents with 10^9 names, of which a few are there."""
    arrays = damage.of_npz((files / "z.npz").read_bytes())
    header = {"descr": kind, "fortran_order": False, "shape": (10**9,)}
    return damage.npz(arrays | {"names.npy": {**header, "values": there}})


def _columns() -> bytes:
    names = b"".join(b",%07d" % i for i in range(2**22 - 10))
    return b"file" + names + b"\n"


# --- pictures -------------------------------------------------------------------------------------


def _png(side: int, rows: int, *extra: list[bytes]) -> bytes:
    """A blank grey PNG of `side` x `side`, of which only some rows are there."""
    body = _deflated(bytes(1 + side), rows) if rows else zlib.compress(b"")
    header = [b"IHDR", [side, side, 8, 0, 0, 0, 0]]
    return damage.png([header, *extra, [b"IDAT", body], [b"IEND", b""]])


def _png_with_text() -> bytes:
    return _png(8, 8, [b"zTXt", b"x\0\0" + _deflated(bytes(MIB), 1000)])


# --- all of them ----------------------------------------------------------------------------------


def explode(files: Path, folder: Path) -> dict[str, list[str]]:
    """The rows of the table, and the bombs that did harm."""
    rows = ["| bomb | bytes | command | exit code | seconds | MiB at the peak |"]
    rows.append("|---|---|---|---|---|---|")
    faults = []
    for name, bomb in bombs(files).items():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for each in ("run", "colour", "pictures"):
            shutil.copytree(files / each, folder / each)
        (folder / bomb.name).write_bytes(bomb.make())
        size = (folder / bomb.name).stat().st_size
        done = children.run(bomb.words, folder, SECONDS, MEMORY)
        figures = f"{done.code} | {done.seconds:.1f} | {done.peak:,.0f}"
        rows.append(f"| {name} | {size:,} | `{bomb.words[0]}` | {figures} |")
        wrong = done.code != bomb.code or done.peak > LARGEST or len(done.err.splitlines()) > LINES
        if wrong or "Traceback" in done.err or "Warning:" in done.err:
            faults.append(f"{name}: {done}")
    return {"table": rows, "faults": faults}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bombs-") as folder:
        children.prepare()
        sound.make(Path(folder) / "sound")
        print(json.dumps(explode(Path(folder) / "sound", Path(folder) / "case")))


if __name__ == "__main__":
    main()
