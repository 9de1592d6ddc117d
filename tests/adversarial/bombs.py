"""Small files that would take much time or memory, each given to a command in a process of its own:
`PYTHONPATH=tests python tests/adversarial/bombs.py` prints a JSON object with the faults, and a row
for each file: its size, the command, the exit code, the seconds of computing and the MiB at the
peak, beyond what python takes with torch and flowtrain imported.

Other such files have tests in `make test`: configurations, archives, latents, runs and data.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import children
import damage
import sound
from children import MIB
from fuzz import LAST, fault_of

SECONDS, MEMORY = 60, 8 * 1024  # of a command, which is ended then
LARGEST = 512  # MiB at the peak
# Accepted: the largest picture below Pillow's limit.
SOUND = {"PNG: 13,000 x 13,000"}


def bombs(files: Path) -> Iterator[tuple[str, str, bytes, list[str]]]:
    """What it is, a name of a file and its content, and the command that reads it."""
    show = ["interpolate", "run", "--images", "x.png", "pictures/grey.png", "--out", "i.png"]
    table_of = ["attributes", "colour", "--csv", "t.csv"]
    sample = ["sample", LAST, "--num-images", "1"]
    parts = damage.of_checkpoint((files / LAST).read_bytes())
    digits, dry = b"train: {budget: '" + b"1" * 60_000 + b"x'}", ["train", "--dry-run"]
    yield "YAML: a duration of 60,000 digits", "c.yaml", digits, [*dry, "--config", "c.yaml"]
    yield "CSV: 8 million lines", "t.csv", (b"file,x\n" + b"a,1\n" * 2**23)[: 2**25], table_of
    yield "CSV: 4 million columns", "t.csv", _columns(), table_of
    yield "CSV: a value of 32 MB", "t.csv", b"file,x\na," + b"1" * (2**25 - 10), table_of
    yield "CSV: 64 MB", "t.csv", b"file,x\n" + b"a,1\n" * 2**24, table_of
    yield "PNG: 2^31 x 2^31", "x.png", _png(2**31 - 1, 0), show
    yield "PNG: 50,000 x 50,000", "x.png", _png(50_000, 50_000), show
    yield "PNG: 13,000 x 13,000", "x.png", _png(13_000, 13_000), show
    text = [b"zTXt", b"x\0\0" + _deflated(bytes(MIB), 1000)]
    yield "PNG: a text of 1 GB", "x.png", _png(8, 8, text), show
    for section, values in (
        ("model", {"name": "nice", "couplings": 10**9}),
        ("model", {"name": "nice", "couplings": 10**6}),
        ("model", {"width": 10**25}),
        ("model", {"width": 10**6}),
        ("model", {"classes": 2**16}),
        ("train", {"batch_size": 10**30}),
        ("dequantization", {"name": "variational", "width": 10**6}),
    ):
        config = parts["described"]["config"]
        kept = {} if "name" in values else config[section]
        described = {**parts["described"], "config": {**config, section: kept | values}}
        crafted = damage.checkpoint(parts | {"described": described})
        yield f"checkpoint: {section} of {values}", LAST, crafted, sample


def _deflated(piece: bytes, times: int) -> bytes:
    """A piece that is repeated, in zlib's format."""
    packer = zlib.compressobj(9)
    first, second = (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + second * (times - 1) + packer.flush()
    check = 1
    for _ in range(times):
        check = zlib.adler32(piece, check)
    return packed[:-4] + check.to_bytes(4, "big")


def _columns() -> bytes:
    return b"file" + b"".join(b",%07d" % i for i in range(2**22 - 10)) + b"\n"


def _png(side: int, rows: int, *extra: list[bytes]) -> bytes:
    """A blank grey PNG of `side` x `side`, of which only some rows are there."""
    body = _deflated(bytes(1 + side), rows) if rows else zlib.compress(b"")
    header = [b"IHDR", [side, side, 8, 0, 0, 0, 0]]
    return damage.png([header, *extra, [b"IDAT", body], [b"IEND", b""]])


def explode(files: Path, folder: Path) -> dict[str, list[object]]:
    rows, faults = [], []
    for what, name, content, words in bombs(files):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for each in ("run", "colour", "pictures"):
            shutil.copytree(files / each, folder / each)
        size = (folder / name).write_bytes(content)
        del content  # which the command would share
        done = children.run(words, folder, SECONDS, MEMORY)
        rows.append([what, size, words[0], done.code, round(done.seconds, 1), round(done.peak)])
        wrong = done.code != (0 if what in SOUND else 2) or done.peak > LARGEST
        if wrong or fault_of(words, done):
            faults.append(f"{what}: {done}")
    return {"rows": rows, "faults": faults}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bombs-") as folder:
        children.prepare()
        sound.make(Path(folder) / "sound")
        print(json.dumps(explode(Path(folder) / "sound", Path(folder) / "case")))


if __name__ == "__main__":
    main()
