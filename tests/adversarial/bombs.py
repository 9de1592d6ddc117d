"""Small files that would take much time or memory, each given to a command in a process of its own:
`PYTHONPATH=tests python tests/adversarial/bombs.py` prints a JSON object with the faults, and a row
for each file: its size, the command, the exit code, the seconds of computing and the MiB at the
peak, beyond what python takes with torch and flowtrain imported.

Other formats have such tests in `make test`: configurations, archives and data.
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
DEEP = 100_000  # levels
LARGE = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
# Accepted: the largest picture below Pillow's limit.
SOUND = {"PNG: 13,000 x 13,000"}


def bombs(files: Path) -> Iterator[tuple[str, str, bytes, list[str]]]:
    """What it is, a name of a file and its content, and the command that reads it."""
    dry = ["train", "--dry-run", "--config", "c.yaml"]
    decode = ["decode", "run", "z.npz", "--out", "out"]
    show = ["interpolate", "run", "--images", "x.png", "pictures/grey.png", "--out", "i.png"]
    table_of = ["attributes", "colour", "--csv", "t.csv"]
    sample = ["sample", LAST, "--num-images", "1"]
    sound_parts = damage.of_checkpoint((files / LAST).read_bytes())

    def checkpoint(**changed: object) -> bytes:
        """A checkpoint with other parts and a right checksum."""
        return damage.checkpoint(sound_parts | changed)

    yield "YAML: 8^11 values in `--set`", "c.yaml", b"", [*dry, "--set", _aliases()]
    yield "YAML: 100,000 levels", "c.yaml", b"a: " + b"[" * DEEP, dry
    digits = b"train: {budget: '" + b"1" * 60_000 + b"x'}"
    yield "YAML: a duration of 60,000 digits", "c.yaml", digits, dry
    yield "YAML: `model.width` of 10^25", "c.yaml", b"model: {width: 1e25}", dry
    names = _claimed_names(files)
    yield "latents: an array of names that claims 100 GB", "z.npz", names, decode
    yield "latents: 10^9 names of no bytes", "z.npz", _claimed_names(files, "<U0", b""), decode
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
        described = damage.of_checkpoint((files / LAST).read_bytes())["described"]
        kept = {} if "name" in values else described["config"][section]
        described["config"][section] = kept | values
        yield f"checkpoint: {section} of {values}", LAST, checkpoint(described=described), sample
    deep = checkpoint(described=damage.DEEP)
    yield "checkpoint: a description of 5,000 levels", LAST, deep, sample
    header = (2**40).to_bytes(8, "little") + (files / LAST).read_bytes()[8:]
    yield "checkpoint: a header of 1 TB", LAST, header, sample
    tensor = checkpoint(tensors={"model.x": LARGE})
    yield "checkpoint: a tensor of 4 TB", LAST, tensor, sample
    rows = b"[" * DEEP + b"\n"
    yield "metrics.jsonl: 100,000 levels", "run/metrics.jsonl", rows, ["compare", "run", "run"]


def _deflated(piece: bytes, times: int) -> bytes:
    """A piece that is repeated, in zlib's format."""
    packer = zlib.compressobj(9)
    first, second = (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + second * (times - 1) + packer.flush()
    check = 1
    for _ in range(times):
        check = zlib.adler32(piece, check)
    return packed[:-4] + check.to_bytes(4, "big")


def _aliases() -> str:
    value = "&a0 [x, x]"
    for i in range(1, 12):
        value = f"&a{i} [{value}, {', '.join([f'*a{i - 1}'] * 7)}]"
    return f"seed={value}"


def _claimed_names(files: Path, kind: str = "<U25", there: bytes = bytes(99)) -> bytes:
    """A file of latents with 10^9 names, of which a few are there."""
    arrays = damage.of_npz((files / "z.npz").read_bytes())
    header = {"descr": kind, "fortran_order": False, "shape": (10**9,)}
    return damage.npz(arrays | {"names.npy": {**header, "values": there}})


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
