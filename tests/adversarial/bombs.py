"""Small files that would take much time or memory, each given to a command in a process of its own:
`PYTHONPATH=tests python tests/adversarial/bombs.py` prints a JSON object with the faults and a
table in Markdown.

The table has the size of the file, the exit code, the seconds of computing and the MiB at the peak.
The last row is what python takes with torch and flowtrain imported.
"""

import io
import json
import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import children
import damage
import sound
from children import MIB
from fuzz import LAST, LINES

from flowtrain.system import capacity
from flowtrain.tools.archive import format as archive_format
from flowtrain.tools.archive.strips import strip_length

SECONDS, MEMORY = 60, 8 * 1024  # of a command, which is ended then
LARGEST = 1024  # MiB at the peak
DEEP = 100_000  # levels
ZLIB = 15  # deflated data with a checksum


@dataclass
class Bomb:
    """A file `name`, how its content is made, the command that reads it, and its exit code."""

    name: str
    make: Callable[[], bytes]
    words: list[str]
    code: int = 2


def bombs(files: Path) -> dict[str, Bomb]:
    dry = ["train", "--dry-run", "--config", "c.yaml"]
    packed = ["decompress", "a.fta", "--out", "out"]
    decode = ["decode", "run", "z.npz", "--out", "out"]
    evaluate = ["evaluate", "colour", "--data", "x.npz", "--json", "-"]
    show = ["interpolate", "run", "--images", "x.png", "pictures/grey.png", "--out", "i.png"]
    table_of = ["attributes", "colour", "--csv", "t.csv"]
    compare, sample = ["compare", "run", "run"], ["sample", LAST, "--num-images", "1"]

    def configured(section: str, **values: object) -> Bomb:
        return Bomb(LAST, lambda: _configured(files, section, values), sample)

    return {
        "YAML: 9^29 values by aliases": Bomb("c.yaml", _aliases, dry),
        "YAML: 8^11 values in `--set`": Bomb("c.yaml", bytes, [*dry, "--set", _flow_aliases()]),
        "YAML: 100,000 levels": Bomb("c.yaml", lambda: b"a: " + b"[" * DEEP, dry),
        "YAML: 100 MB": Bomb("c.yaml", lambda: b"# " + b"x" * 10**8, dry),
        "YAML: `model.width` of 10^25": Bomb("c.yaml", lambda: b"model: {width: 1e25}", dry),
        "archive: images of 5.5 GB, with `--max-memory 1024`": Bomb(
            "a.fta", lambda: _archive(*_of_zeros(111)), [*packed, "--max-memory", "1024"]
        ),
        "archive: images of 100 GB": Bomb("a.fta", lambda: _archive(*_of_zeros(2001)), packed),
        "archive: a description of 5.5 GB": Bomb(
            "a.fta", lambda: _archive(_deflated(b" " * MIB, 5500), [bytes(4)]), packed
        ),
        "archive: an image of 192 bytes that inflates to 5.5 GB": Bomb(
            "a.fta", lambda: _archive(*_long_strip()), packed
        ),
        "archive: a description of 100,000 levels": Bomb(
            "a.fta", lambda: _archive(_deflated(b"[" * DEEP, 1), [bytes(4)]), packed
        ),
        "npz: a header that claims 100 GB": Bomb("x.npz", lambda: _npz(_member(10**11)), evaluate),
        "npz: the zip claims 100 GB, too": Bomb("x.npz", _lying_npz, evaluate),
        "npz: inflates to as much as the memory": Bomb(
            "x.npz", lambda: _deflated_npz(capacity.total() // MIB), evaluate
        ),
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
        "summary.json: 1 GB": Bomb("run/summary.json", lambda: bytes(2**30), compare),
        "no file, only `--version`": Bomb("nothing", bytes, ["--version"], code=0),
    }


def _deflated(piece: bytes, times: int, **format: object) -> bytes:
    """A piece that is repeated, deflated as in archives, or in another format of zlib."""
    packer = zlib.compressobj(9, **(format or {"wbits": -15, "zdict": archive_format.DICTIONARY}))
    first, second = (packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + second * (times - 1) + packer.flush()
    if format.get("wbits") != ZLIB:
        return packed
    check = 1
    for _ in range(times):
        check = zlib.adler32(piece, check)
    return packed[:-4] + check.to_bytes(4, "big")


# --- YAML -----------------------------------------------------------------------------------------


def _aliases() -> bytes:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)]
    return "".join(["a0: &a0 [x, x]\n", *lines]).encode()


def _flow_aliases() -> str:
    value = "&a0 [x, x]"
    for i in range(1, 12):
        value = f"&a{i} [{value}, {', '.join([f'*a{i - 1}'] * 7)}]"
    return f"seed={value}"


# --- archives -------------------------------------------------------------------------------------


def _archive(packed: bytes, parts: list[bytes]) -> bytes:
    start = archive_format.MAGIC + len(packed).to_bytes(4, "little")
    data = b"".join([start, packed, *parts])
    return data + archive_format.digest(data)


def _described(parts: list[bytes], images: int, shape: list[int]) -> tuple[bytes, list[bytes]]:
    described = {"shape": shape, "levels": 256, "names": "test", "count": images}
    text = json.dumps({**described, "lengths": [len(part) for part in parts[:-1]]})
    return _deflated(text.encode(), 1), parts


def _of_zeros(count: int) -> tuple[bytes, list[bytes]]:
    """Images of 48 MiB in strips."""
    each = strip_length(4096)
    strip = _deflated(bytes(MIB), 48 * each, wbits=ZLIB)
    return _described([bytes(4 * count), *[strip] * (count // each)], count, [3, 4096, 4096])


def _long_strip() -> tuple[bytes, list[bytes]]:
    return _described([bytes(4), _deflated(bytes(MIB), 5500, wbits=ZLIB)], 1, [3, 8, 8])


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


# --- npz ------------------------------------------------------------------------------------------

SHAPE = (32, 32, 3)


def _member(size: int, values: bytes = b"") -> bytes:
    """An array whose header claims about so many bytes."""
    shape = size // math.prod(SHAPE), *SHAPE
    return damage.npy({"descr": "|u1", "fortran_order": False, "shape": shape, "values": values})


def _npz(member: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("x_train.npy", member)
    return made.getvalue()


def _claimed_names(files: Path, kind: str = "<U25", there: bytes = bytes(99)) -> bytes:
    """A file of latents with 10^9 names, of which a few are there."""
    arrays = damage.of_npz((files / "z.npz").read_bytes())
    header = {"descr": kind, "fortran_order": False, "shape": (10**9,)}
    return damage.npz(arrays | {"names.npy": {**header, "values": there}})


def _columns() -> bytes:
    names = b"".join(b",%07d" % i for i in range(2**22 - 10))
    return b"file" + names + b"\n"


def _claiming(data: bytes, size: int, packed: int) -> bytes:
    """A zip of one member whose directory claims these sizes, in the fields of ZIP64."""
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    extra = struct.pack("<HHQQ", 1, 16, size, packed)
    directory, tail = bytearray(data[start:end]), bytearray(data[end:])
    directory[20:28] = b"\xff" * 8
    directory[30:32] = len(extra).to_bytes(2, "little")
    tail[12:16] = (len(directory) + len(extra)).to_bytes(4, "little")
    return data[:start] + directory + extra + tail


def _lying_npz() -> bytes:
    header = _member(10**11)
    size = 10**11 // math.prod(SHAPE) * math.prod(SHAPE)
    return _claiming(_npz(header), len(header) + size, len(header))


def _deflated_npz(mib: int) -> bytes:
    """A member that is deflated, with sizes that are right, and another checksum."""
    size = mib * MIB // math.prod(SHAPE) * math.prod(SHAPE)
    header = _member(size)
    packed = _stored(header) + _deflated(bytes(MIB), mib, wbits=-15)
    data = bytearray(_npz(packed))
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        place = data.index(mark) + at
        data[place : place + 2] = zipfile.ZIP_DEFLATED.to_bytes(2, "little")
    return _claiming(bytes(data), len(header) + size, len(packed))


def _stored(content: bytes) -> bytes:
    """A block of deflate that is not the last one."""
    length = len(content)
    return b"\0" + struct.pack("<HH", length, length ^ 0xFFFF) + content


# --- pictures -------------------------------------------------------------------------------------


def _png(side: int, rows: int, *extra: list[bytes]) -> bytes:
    """A blank grey PNG of `side` x `side`, of which only some rows are there."""
    body = _deflated(bytes(1 + side), rows, wbits=ZLIB) if rows else zlib.compress(b"")
    header = [b"IHDR", [side, side, 8, 0, 0, 0, 0]]
    return damage.png([header, *extra, [b"IDAT", body], [b"IEND", b""]])


def _png_with_text() -> bytes:
    return _png(8, 8, [b"zTXt", b"x\0\0" + _deflated(bytes(MIB), 1000, wbits=ZLIB)])


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
