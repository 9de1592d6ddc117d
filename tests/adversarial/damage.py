"""How a file is damaged or crafted: functions of a seeded generator and of a sound file.

`of_bytes` damages any file. `crafted` takes it apart, damages a part, and seals it again with right
lengths and checksums.
"""

import ast
import contextlib
import copy
import hashlib
import io
import json
import random
import re
import string
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import yaml

from flowtrain.tools.archive import format as archive_format

DEEP = "@deep@"  # becomes lists of thousands of levels
NUMBERS = [0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**32, 2**53, 2**63, 10**30, 10**400]
NUMBERS += [0.5, -0.0, 1e-300, 1e300, float("inf"), float("nan")]
VALUES = [None, True, False, "", "x", [], {}, [[]], {"": {}}, [0], [None], {"name": "x"}, DEEP]
VALUES += ["9" * 5000, "x" * 100_000, "\0", "\ud800", "\n\n\n\n\n\n\n\n", "%s{}\x1b[31m", "a\0b"]
VALUES += ["/dev/zero", "..", "../../x", "/", "fifo", "os.path", "antigravity", "1e5", "nan", "-x"]
VALUES += ["F16", "I64", "BOOL", "|u1", "<f8", "|O", "<U99", "<M8", '"', " 1", "1.0", "a\nb"]
FLOATS = [float("nan"), float("inf"), 3e38, -3e38, 1e-42, 0.0, 1e10]


def of_bytes(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """Damaged bytes. `other` is a file of the same kind, for splices."""
    return draw.choice(WAYS)(draw, data, other)


def _flip(draw, data, other):
    changed = bytearray(data or b"x")
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[_place(draw, changed)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(draw, data, other):
    return data[: draw.choice([0, 1, 8, _place(draw, data), len(data) - 1])]


def _exchange(draw, data, other):
    """A part, which may be empty, is removed, filled, repeated or replaced."""
    at, length = _place(draw, data), draw.choice([0, 1, 4, 8, 100, 10_000, len(data)])
    part = data[at : at + length]
    fill = draw.choice([b"\0", b"\xff", b"9", b" "]) * len(part)
    new = [b"", fill, part[:10_000] * draw.choice([2, 3, 100])]
    new.append(draw.randbytes(draw.choice([1, 4, 100])))
    return data[:at] + draw.choice(new) + data[at + length :]


def _splice(draw, data, other):
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _number(draw, data, other):
    """A number in text is replaced, or a binary one."""
    places = list(re.finditer(rb"\d+", data[:20_000]))
    if places and draw.random() < 0.5:
        match = draw.choice(places)
        number = str(draw.choice(NUMBERS)).encode()
        return data[: match.start()] + number + data[match.end() :]
    size = draw.choice([2, 4, 8])
    whole = draw.choice([0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1))])
    number = whole.to_bytes(size, draw.choice(["little", "big"]), signed=True)
    if draw.random() < 0.3:
        number = struct.pack("<f", draw.choice(FLOATS))
    at = _place(draw, data) // len(number) * len(number)
    return data[:at] + number + data[at + len(number) :]


WAYS = [_flip, _flip, _truncate, _splice, *[_exchange] * 4, _number, _number]


def _place(draw: random.Random, data: bytes) -> int:
    """Often near the beginning or the end, where headers are."""
    last = max(len(data) - 1, 0)
    kind = draw.random()
    if kind < 0.3:
        return min(int(draw.expovariate(1 / 64)), last)
    if kind < 0.4:
        return max(last - int(draw.expovariate(1 / 64)), 0)
    return draw.randint(0, last)


def of_value(draw: random.Random, value):
    """A nested value, as JSON has it and with bytes, with one or two edits somewhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2])):
        value = _edited(draw, value)
    return value


def _edited(draw, value):
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return draw.choice(VALUES)
    container, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.45:
        container[key] = _extreme(draw, container[key])
    elif kind < 0.6:
        del container[key]
    elif kind < 0.7:
        there, name = draw.choice(places)
        container[key] = copy.deepcopy(there.get(name) if isinstance(there, dict) else 0)
    elif kind < 0.8:
        container[key] = [copy.deepcopy(container[key])] * draw.choice([1, 2, 1000])
    elif isinstance(container, dict):
        name = draw.choice(["", "x", key + "x", "../x.npy", "x" * 300, "\0", *string.ascii_letters])
        container[name] = container[key] if kind < 0.9 else container.pop(key)
    else:
        container.insert(key, draw.choice([*VALUES, *NUMBERS]))
    return value


def _extreme(draw, value):
    """Often of the same type, which gets further than another one."""
    if isinstance(value, bytes):
        return of_bytes(draw, value, value)
    if isinstance(value, str) and draw.random() < 0.3:
        return of_bytes(draw, value.encode(), value.encode()).decode(errors="replace")
    if isinstance(value, bool) or not isinstance(value, int | float) or draw.random() < 0.3:
        return draw.choice([*VALUES, *NUMBERS])
    if draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 2])
    return draw.choice(NUMBERS)


def _places(value):
    """`(container, key)` of everything inside a nested value."""
    if isinstance(value, dict | list):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(each)


def crafted(draw: random.Random, path: Path, damaged: bool = True) -> bytes | None:
    """The file with a part that is damaged, or only taken apart and put together again. None if it
    is bytes that cannot be taken apart.
    """
    unpack, pack = KINDS.get(path.suffix, (bytes.decode, str.encode))
    try:
        parts = unpack(path.read_bytes())
    except ValueError:
        return None
    while True:
        with contextlib.suppress(Exception):  # what cannot be written
            return pack(of_value(draw, parts) if damaged else parts)


def dumped(value) -> str:
    """JSON, which may be deeper than `json` can write."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)


def of_checkpoint(data: bytes) -> dict:
    """The description, the table of tensors, and their bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:end])
    described = json.loads(tensors.pop("__metadata__")["flowtrain"])
    return {"described": described, "tensors": tensors, "bytes": data[end:]}


def checkpoint(parts: dict) -> bytes:
    """A safetensors file with a right checksum."""
    meta = {"flowtrain": dumped(parts["described"]), "checksum": "0" * 64}
    text = dumped({"__metadata__": meta, **parts["tensors"]}).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + parts["bytes"]
    mark = b'"checksum":"'
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(mark + b"0" * 64, mark + digest, 1)


def of_archive(data: bytes) -> dict:
    described, parts = archive_format.unpack(Path("a.fta"), data, 2**28)
    content = described.model_dump(exclude={"lengths"}, exclude_none=True)
    return {"described": json.loads(json.dumps(content)), "parts": parts}


def archive(content: dict) -> bytes:
    described, parts = content["described"], content["parts"]
    if isinstance(described, dict):
        described.setdefault("lengths", [len(part) for part in parts[:-1]])
    deflate = zlib.compressobj(9, wbits=-15, zdict=archive_format.DICTIONARY)
    packed = deflate.compress(dumped(described).encode()) + deflate.flush()
    data = b"".join([archive_format.MAGIC, len(packed).to_bytes(4, "little"), packed, *parts])
    return data + archive_format.digest(data)


def of_npy(data: bytes) -> dict:
    end = 10 + int.from_bytes(data[8:10], "little")
    return {**ast.literal_eval(data[10:end].decode()), "values": data[end:]}


def npy(array: dict) -> bytes:
    header = {key: tuple(v) if key == "shape" else v for key, v in array.items() if key != "values"}
    text = repr(header).encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + array["values"]


def of_npz(data: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as there:
        return {name: of_npy(there.read(name)) for name in there.namelist()}


def npz(arrays: dict) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as there:
        for name, array in arrays.items():
            there.writestr(name, npy(array))
    return made.getvalue()


def of_png(data: bytes) -> list:
    """The chunks, the numbers of the header apart."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    chunks[0][1] = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    return chunks


def png(chunks: list) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        content = struct.pack(">IIBBBBB", *content) if isinstance(content, list) else content
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        out += len(content).to_bytes(4, "big") + kind + content + check
    return out


def _yaml(value) -> bytes:
    text = yaml.safe_dump(value, sort_keys=False)
    return text.replace(DEEP, "[" * 1000 + "]" * 1000).encode(errors="surrogatepass")


# By the end of a file's name: the functions that take it apart and put it together.
KINDS: dict[str, tuple[Callable, Callable[..., bytes]]] = {
    ".safetensors": (of_checkpoint, checkpoint),
    ".fta": (of_archive, archive),
    ".npz": (of_npz, npz),
    ".npy": (of_npy, npy),
    ".png": (of_png, png),
    ".yaml": (yaml.safe_load, _yaml),
    ".json": (json.loads, lambda value: dumped(value).encode()),
    ".jsonl": (
        lambda data: [json.loads(line) for line in data.splitlines()],
        lambda rows: "".join(dumped(row) + "\n" for row in rows).encode(),
    ),
    ".csv": (
        lambda data: [line.split(",") for line in data.decode().splitlines()],
        lambda rows: "\n".join(",".join(map(str, row)) for row in rows).encode(),
    ),
}
