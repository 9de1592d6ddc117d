"""Gives damaged and crafted files to commands, each in a process of its own with a limit of time
and of memory: `PYTHONPATH=tests python tests/adversarial/fuzz.py --cases 1000`.

A case is a format and a number, such as `archive:17`, and the same each time. `--only archive:17`
runs it alone, shows the command and what it printed, and keeps its files.

What fails: an exit code other than 0 and 2 (or 1 where the documentation says so), a traceback, a
message of more than six lines, the limits, a damaged file that passes for a sound one, and an
unpacked image with other pixels.

Prints one JSON object: per format the cases that were tried, refused and accepted, the largest
time and memory; and the faults.
"""

import argparse
import hashlib
import io
import json
import random
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import children
import damage
import numpy as np
import sound
import torch
import yaml
from catalogue import sets
from children import Outcome
from PIL import Image
from sound import TRAIN, Sound

from flowtrain.pictures.grid import to_8bit
from flowtrain.tools.archive import format as archive_format

SECONDS = 20  # per case
MEMORY = 1024  # MiB per case, besides what python with torch and flowtrain takes
LINES = 6  # of a message
# The reasons that a command may give for exit code 1.
DOCUMENTED = ("not finite", "non_finite", "damaged or diverged")


@dataclass
class Case:
    """words: The command.
    refused: Whether nothing but exit code 2 will do.
    fault: What is wrong with the result of a command that accepted the file; empty if nothing is.
    """

    words: list[str]
    refused: bool = False
    fault: Callable[[Outcome], str] = lambda outcome: ""


# --- checkpoints ----------------------------------------------------------------------------------

LAST = "run/checkpoints/last.safetensors"
OTHER = "other/checkpoints/last.safetensors"


def checkpoint(draw: random.Random, files: Sound, folder: Path) -> Case:
    data = files.bytes(LAST)
    raw = draw.random() < 0.3
    made = damage.of_bytes(draw, data, files.bytes(OTHER)) if raw else crafted(draw, data)
    shutil.copytree(files.folder / "run", folder / "run")
    (folder / LAST).write_bytes(made)
    few = ["--num-images", "4"]
    new = [*TRAIN, "--run-dir", "new"]
    words = draw.choices(
        [
            ["evaluate", LAST, *few, "--json", "-"],
            ["sample", LAST, "--num-images", "2", "--out", "s.png"],
            ["interpolate", LAST, "--pairs", "1", "--steps", "3", "--out", "i.png"],
            ["compress", LAST, "--split", "test", "--num-images", "3", "--out", "x.fta"],
            [*TRAIN, "--run-dir", "run"],
            [*new, "--resume", LAST],
            [*new, "--init-from", LAST],
            ["report", LAST, "--num-images", "2", "--out", "r.html"],
            ["doctor", LAST, "--num-images", "2"],
        ],
        [4, 4, 4, 2, 4, 4, 2, 0.3, 0.3],
    )[0]
    return Case(words, refused=raw and made not in (data, files.bytes(OTHER)))


def crafted(draw: random.Random, data: bytes) -> bytes:
    """A checkpoint with other content and a right checksum."""
    header, body = parts_of(data)
    meta = header["__metadata__"]
    kind = draw.random()
    if kind < 0.55:
        described = json.loads(meta["flowtrain"])
        section = draw.choice([None, None, "progress", "config", "config", "data"])
        if section is None:
            described = damage.of_value(draw, described)
        else:
            described[section] = damage.of_value(draw, described[section])
        meta["flowtrain"] = damage.dumped(described)
    elif kind < 0.65:
        text = meta["flowtrain"].encode()
        meta["flowtrain"] = damage.of_bytes(draw, text, text).decode(errors="replace")
    elif kind < 0.75:
        body = _tensor_of_extremes(draw, header, body)
    else:
        _edit_tensors(draw, header)
    return sealed(header, body)


def _tensor_of_extremes(draw, header, body):
    name = draw.choice([key for key in header if key != "__metadata__"])
    start, stop = header[name]["data_offsets"]
    size = {"F32": 4, "I64": 8}.get(header[name]["dtype"], 1)
    values = [float("nan"), float("inf"), 3e38, -3e38, 1e-42, 0.0, 1e10]
    item = {
        4: struct.pack("<f", draw.choice(values)),
        8: struct.pack("<q", draw.choice([-1, 0, 2**62, -(2**63)])),
        1: draw.choice([b"\0", b"\1", b"\2", b"\xff"]),
    }[size]
    at = start + size * draw.randrange(max((stop - start) // size, 1))
    if draw.random() < 0.5:  # the whole tensor
        return body[:start] + item * ((stop - start) // size) + body[stop:]
    return body[:at] + item + body[at + size :]


def _edit_tensors(draw, header):
    """Names, types, shapes and offsets."""
    names = [key for key in header if key != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    kind = draw.randrange(7)
    if kind == 0:
        header[name], header[other] = header[other], header[name]
    elif kind == 1:
        new = draw.choice([name + "x", "x", "", "model.", name.replace("model", "ema"), "\0" * 9])
        header[new] = header.pop(name)
    elif kind == 2:
        header[name]["dtype"] = draw.choice(
            ["F16", "I32", "F64", "I64", "BOOL", "F4", "X", 1, None]
        )
    elif kind == 3:
        shape = header[name]["shape"]
        header[name]["shape"] = draw.choice([shape[::-1], [1, *shape], [0], [], [2**62, 4], [-1]])
    elif kind == 4:
        header[name] = dict(header[other])
    elif kind == 5:
        parts = draw.choice([("optimizer",), ("ema",), ("model",), ("ema", "optimizer")])
        for key in [key for key in names if key.split(".")[0] in parts]:
            del header[key]
    else:
        header[name] = damage.of_value(draw, header[name])


def parts_of(data: bytes) -> tuple[dict, bytes]:
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def sealed(header: dict, body: bytes) -> bytes:
    """A safetensors file with the checksum that it should have, where it can have one."""
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["checksum"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + body
    mark = b'"checksum":"'
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(mark + b"0" * 64, mark + digest, 1)


# --- archives -------------------------------------------------------------------------------------

ARCHIVES = ["embedded.fta", "apart.fta"]


def archive(draw: random.Random, files: Sound, folder: Path) -> Case:
    name, other = draw.sample(ARCHIVES, 2)
    data = files.bytes(name)
    raw = draw.random() < 0.25
    if raw:
        made, levels = damage.of_bytes(draw, data, files.bytes(other)), files.levels
    else:
        made, levels = _crafted_archive(draw, files.folder / name)
    (folder / "a.fta").write_bytes(made)
    shutil.copytree(files.folder / "run", folder / "run")
    words = ["decompress", "a.fta", "--out", "out", "--max-memory", "300"]
    if draw.random() < 0.2:
        words += ["--model", "run"]

    def fault(outcome: Outcome) -> str:
        known = {_pixels(file) for each in ARCHIVES for file in files.unpacked(each)}
        found = [_pixels(file) for file in folder.rglob("out/**/*.png")]
        same_values = levels == files.levels
        return "wrong pixels" if same_values and not known.issuperset(found) else ""

    return Case(words, raw and made not in map(files.bytes, ARCHIVES), fault)


def _pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def _crafted_archive(draw: random.Random, path: Path) -> tuple[bytes, object]:
    """An archive with other content and a right checksum, and the levels that it says."""
    described, parts = sound.archive_parts(path)
    described["lengths"] = [len(part) for part in parts[:-1]]
    kind = draw.random()
    if kind < 0.3:
        place = draw.randrange(len(parts))
        parts[place] = damage.of_bytes(draw, parts[place], draw.choice(parts))
        described["lengths"] = [len(part) for part in parts[:-1]]
    elif kind < 0.9:
        described = damage.of_value(draw, described)
    text = damage.dumped(described).encode()
    if kind > 0.9:
        text = damage.of_bytes(draw, text, text)
    deflate = zlib.compressobj(9, wbits=-15, zdict=archive_format.DICTIONARY)
    packed = deflate.compress(text) + deflate.flush()
    data = b"".join([archive_format.MAGIC, len(packed).to_bytes(4, "little"), packed, *parts])
    levels = described.get("levels") if isinstance(described, dict) else None
    return data + archive_format.digest(data), None if kind > 0.9 else levels


# --- npz ------------------------------------------------------------------------------------------


def npz(draw: random.Random, files: Sound, folder: Path) -> Case:
    name, other = draw.sample(["x.npz", "other.npz"], 2)
    data = files.bytes(name)
    raw = draw.random() < 0.5
    made = damage.of_bytes(draw, data, files.bytes(other)) if raw else _crafted_npz(draw, data)
    (folder / "x.npz").write_bytes(made)
    (folder / "colour").symlink_to(files.folder / "colour")
    named = sets(data__name="npz", data__path="x.npz")
    if draw.random() < 0.7:
        words = ["evaluate", "colour", "--data", "x.npz", "--json", "-"]
    else:
        words = [*TRAIN, "--run-dir", "new", *named, *sets(train__num_steps=1, data__validation=2)]
    wanted = files.bits_per_dim[name]

    def fault(outcome: Outcome) -> str:
        if not raw or words[0] == "train" or made == files.bytes(other):
            return ""
        found = json.loads(outcome.out)["bits_per_dim"]
        with zipfile.ZipFile(io.BytesIO(made)) as there, zipfile.ZipFile(io.BytesIO(data)) as own:
            same_names = there.namelist() == own.namelist()
        return f"{found} bits/dim, not {wanted}" if same_names and found != wanted else ""

    return Case(words, fault=fault)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as there:
        return {name: there.read(name) for name in there.namelist()}


def _crafted_npz(draw: random.Random, data: bytes) -> bytes:
    """Other members with right checksums, or other fields of the zip."""
    if draw.random() < 0.3:
        return _zip_field(draw, data)
    members = members_of(data)
    name = draw.choice(list(members))
    kind = draw.random()
    if kind < 0.3:
        members[name] = damage.of_bytes(draw, members[name], draw.choice(list(members.values())))
    elif kind < 0.7:
        members[name] = _npy(draw)
    elif kind < 0.8:
        members[draw.choice(["x.npy", "x_test.npy", "y_test.npy", "../x.npy", " "])] = _npy(draw)
    elif kind < 0.9:
        del members[name]
    else:
        members = {key: members[draw.choice(list(members))] for key in members}
    return _zipped(draw, members)


def _zipped(draw: random.Random, members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(made, "w", method) as there:
        for key, content in members.items():
            there.writestr(key, content)
    return made.getvalue()


def _npy(draw: random.Random) -> bytes:
    """An array whose header says something else than it holds."""
    header = {
        "descr": draw.choice(
            ["|u1", "|u1", "|u1", "<f8", "|O", "<U99", "|b1", "", "<M8", [("a", "|u1")]]
        ),
        "fortran_order": draw.choice([False, False, True, 2]),
        "shape": draw.choice(
            [(24, 8, 8, 3), (24, 8, 8, 3), (24, 8, 8, 3), (24, 8, 8), (24, 3, 8, 8), (4608,), ()]
            + [(0, 8, 8, 3), (24, 0, 8, 3), (10**6, 10**6), (2**62, 8, 8), (-1, 8, 8, 3)]
            + [(24, 8, 8, 2), (24,) * 40, (24.0, 8, 8)]
        ),
    }
    text = repr(header).encode()
    if draw.random() < 0.2:
        text = damage.of_bytes(draw, text, text)
    length = draw.choice([len(text), len(text), len(text), 0, 65535])
    version = draw.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"])
    size = length.to_bytes(2 if version[0] == 1 else 4, "little")
    values = draw.randbytes(draw.choice([4608, 4608, 4608, 24, 0, 10**6]))
    return b"\x93NUMPY" + version + size + text + values


def _zip_field(draw: random.Random, data: bytes) -> bytes:
    """A field of a local header, of the directory or of its end."""
    marks = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22}
    mark = draw.choice(list(marks))
    at = data.index(mark) + 4 + draw.randrange(0, marks[mark] - 4, 2)
    size = draw.choice([2, 4])
    number = draw.choice([0, 1, 8, 12, 14, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, len(data)])
    return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]


# --- latents, attributes, points ------------------------------------------------------------------


def latents(draw: random.Random, files: Sound, folder: Path) -> Case:
    name, raw = _damaged_arrays(draw, files, sound.LATENTS, folder / "z.npz")
    (folder / "run").symlink_to(files.folder / "run")
    out = draw.choice(["images", "x.npz"])

    def fault(outcome: Outcome) -> str:
        known = [_arrays(files.folder / f"{each}.images.npz") for each in sound.LATENTS]
        if out != "x.npz":
            found = [_pixels(file) for file in sorted(folder.glob("images/**/*.png"))]
            return "" if not raw or found in map(_pictures_of, known) else "wrong pixels"
        same = [all(map(np.array_equal, _arrays(folder / out), arrays)) for arrays in known]
        return "wrong pixels or names" if raw and not any(same) else ""

    return Case(["decode", "run", "z.npz", "--out", out], fault=fault)


def _arrays(path: Path) -> list[np.ndarray]:
    """The images and the names in what `decode` wrote."""
    with np.load(path) as file:
        return [file["images"], file["names"]]


def _pictures_of(arrays: list[np.ndarray]) -> list[bytes]:
    """The pixels of PNG files of images with 17 levels, in the order of the names."""
    images, names = arrays
    order = sorted(range(len(names)), key=lambda i: str(names[i]))
    return [to_8bit(torch.from_numpy(images[i]), 17).numpy().tobytes() for i in order]


def attributes(draw: random.Random, files: Sound, folder: Path) -> Case:
    shutil.copytree(files.folder / "run", folder / "run")
    _, raw = _damaged_arrays(draw, files, sound.ATTRIBUTES, folder / "run" / "attributes.npz")
    words = draw.choice([sound.ALONG, ["attributes", "run", "--to-class", "2", "--name", "two"]])

    def fault(outcome: Outcome) -> str:
        known = [_pixels(files.folder / f"{each}.png") for each in sound.ATTRIBUTES]
        checked = raw and words == sound.ALONG
        return "another path" if checked and _pixels(folder / "i.png") not in known else ""

    return Case(words, fault=fault)


def points(draw: random.Random, files: Sound, folder: Path) -> Case:
    name = draw.choice(["points.npz", "points.npy"])
    path = folder / name
    if name == "points.npz":
        _damaged_arrays(draw, files, [name, "x.npz"], path)
    else:
        data = files.bytes(name)
        made = draw.choice([damage.of_bytes(draw, data, data), _npy(draw), _edited_npy(draw, data)])
        path.write_bytes(made)
    (folder / "moons").symlink_to(files.folder / "moons")
    return Case(["encode", "moons", "--images", name, "--out", "z.npz"])


def _damaged_arrays(
    draw: random.Random, files: Sound, names: list[str], path: Path
) -> tuple[str, bool]:
    """Writes one of two .npz files with damage to `path`: its name, and whether it can pass for
    nothing but a sound one.
    """
    name, other = draw.sample(names, 2)
    data = files.bytes(name)
    raw = draw.random() < 0.4
    if raw:
        made = damage.of_bytes(draw, data, files.bytes(other))
    elif draw.random() < 0.2:
        made = _zip_field(draw, data)
    else:
        made = _edited_npz(draw, data)
    path.write_bytes(made)
    return name, raw


def _edited_npz(draw: random.Random, data: bytes) -> bytes:
    """One array or more is another one, with a right checksum, or has another name."""
    members = members_of(data)
    if draw.random() < 0.2:
        name, other = draw.choice(list(members)), draw.choice(list(members))
        members[name] = damage.of_bytes(draw, members[name], members[other])
        return _zipped(draw, members)
    for _ in range(draw.choice([1, 1, 2])):
        name, other = draw.choice(list(members)), draw.choice(list(members))
        kind = draw.random()
        if kind < 0.8:
            members[name] = _edited_npy(draw, members[name])
        elif kind < 0.87 and len(members) > 1:
            del members[name]
        elif kind < 0.94:
            members[name] = members[other]
        else:
            members[draw.choice(["x.npy", "../x.npy", "level9.npy", " "])] = members[name]
    return _zipped(draw, members)


def _edited_npy(draw: random.Random, data: bytes) -> bytes:
    """An array with other values, of another shape or of another type, which says so."""
    array = np.load(io.BytesIO(data), allow_pickle=True)  # made here
    kind = draw.random()
    if kind < 0.5 and array.dtype.kind in "fiuU" and array.size:
        array = array.copy()
        at = ... if draw.random() < 0.3 else draw.randrange(array.size)
        texts = ["", ".", "..", "/", "../x", "a/b", "x" * 300, "x" * 10_000, "\ud800", "a\0b", "-x"]
        texts += ["a/" * 2000 + "a"]
        if array.dtype.kind == "U":
            array = array.astype("U10000") if draw.random() < 0.2 else array.astype("U80")
            value = draw.choice([*texts, *array.flat])
        elif array.dtype.kind == "f":
            value = draw.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, 0, 1e10, -1, 100])
        else:
            value = draw.choice([0, 1, -1, 2, 2**31, 2**63 - 1, -(2**63)])
        with np.errstate(all="ignore"):
            array.flat[at] = np.asarray(value).astype(array.dtype)
    elif kind < 0.8:
        changed = [array[None], array[..., None], array.ravel(), array.T, np.stack([array, array])]
        if array.ndim:
            changed += [array[:0], array[:1], np.concatenate([array, array]), array[..., :1]]
        array = draw.choice([*changed, np.empty((0, *array.shape)), np.array(0)])
    else:
        types = ["f8", "f2", ">f4", "i8", "u1", "?", "S9", "U9", "c8", "M8[s]", "i4,f4", "O"]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                array = array.astype(draw.choice(types))
            except (ValueError, TypeError):
                array = array.astype("S9")
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


# --- tables ---------------------------------------------------------------------------------------


def table(draw: random.Random, files: Sound, folder: Path) -> Case:
    """A CSV table of images and their attributes."""
    data = files.bytes("table.csv")
    made = damage.of_bytes(draw, data, data)
    (folder / "t.csv").write_bytes(made if draw.random() < 0.4 else _edited_table(draw, data))
    (folder / "pictures").symlink_to(files.folder / "pictures")
    shutil.copytree(files.folder / "colour", folder / "colour")
    words = ["attributes", "colour", "--csv", "t.csv", "--images", "pictures"]
    return Case(words + draw.choice([[], ["--orthogonal"], ["--method", "logistic"]]))


def _edited_table(draw: random.Random, data: bytes) -> bytes:
    rows = [line.split(",") for line in data.decode().splitlines()]
    cells = ["", " ", " 1", "2", "-1", "true", "nan", "1e400", "٣", "1.0", "\0", '"', '"x', "a\nb"]
    cells += ["../pictures/grey.png", "/dev/zero", "..", "x" * 200_000, "é", "-x", "file", "even"]
    for _ in range(draw.choice([1, 1, 2, 4])):
        row = draw.choice(rows)
        kind = draw.random()
        if kind < 0.5:
            row[draw.randrange(len(row))] = draw.choice(cells)
        elif kind < 0.65:
            row.append(draw.choice(cells))
        elif kind < 0.75 and len(row) > 1:
            row.pop()
        elif kind < 0.85:
            rows.append(list(row))
        elif len(rows) > 1:
            rows.remove(row)
    text = draw.choice(["\n", "\n", "\r\n", "\r", "\n\n"]).join(",".join(row) for row in rows)
    text = text.replace(",", draw.choice([",", ",", ",", ";", "\t", ",,", ", "]))
    coding = draw.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"])
    return text.encode(coding, errors="replace")


# --- configurations -------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[2] / "configs"


def config(draw: random.Random, files: Sound, folder: Path) -> Case:
    text = draw.choice(sorted(CONFIGS.glob("*_digits.yaml"))).read_text()
    text = draw.choice([text, files.bytes("run/config.yaml").decode()])
    if draw.random() < 0.3:
        made = damage.of_bytes(draw, text.encode(), text.encode())
    elif draw.random() < 0.3:
        made = _yaml_syntax(draw, text).encode()
    else:
        made = _yaml(damage.of_value(draw, yaml.safe_load(text)))
    (folder / "c.yaml").write_bytes(made)
    # What makes a command take long is not damage.
    small = sets(model__name="glow", model__levels=2, model__steps=1, model__width=8)
    short = sets(train__num_steps=1, train__batch_size=8, train__accumulate=1)
    words = ["train", "--config", "c.yaml", "--run-dir", "new", *small, *short]
    return Case(words + draw.choice([[], ["--dry-run"]]))


def _yaml(value) -> bytes:
    text = yaml.safe_dump(value, sort_keys=False)
    return text.replace(damage.DEEP, "[" * 1000 + "]" * 1000).encode(errors="surrogatepass")


def _yaml_syntax(draw: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    bombs = [f"b{i + 1}: &b{i + 1} [" + ", ".join([f"*b{i}"] * 9) + "]\n" for i in range(12)]
    extra = draw.choice(
        [
            ["b0: &b0 [x, x]\n", *bombs],
            ["a: &a {b: *a}\n"],
            ["seed: !!python/object/apply:os.mkdir [executed]\n"],
            ["<<: {seed: 1}\n"],
            ["? [a, b]\n: 1\n"],
            ["\t- x\n"],
            ["---\n"],
            ["seed: 1\nseed: 2\n"],
            ["seed: 0b1\n", "train: {lr: .inf}\n"],
            ["model: {width: 0x7fffffff}\n"],
            ["data: {path: 2001-99-99}\n"],
            ["%YAML 9.9\n"],
            ["a: " + "[" * 300 + "\n"],
            ["a: |\n" + "  x\n" * 30_000],
            ["&" + "a" * 5000 + " x: *b\n"],
        ]
    )
    at = draw.randint(0, len(lines))
    return "".join(lines[:at] + extra + lines[at:])


# --- run directories ------------------------------------------------------------------------------


def run_files(draw: random.Random, files: Sound, folder: Path) -> Case:
    names = ["metrics.jsonl", "metrics.jsonl", "summary.json", "config.yaml", "evaluate-test.json"]
    name = draw.choice([*names, ".lock"])
    run = shutil.copytree(files.folder / "run", folder / "run")
    path = run / name
    data = path.read_bytes() if path.exists() else b"123"
    if draw.random() < 0.4 or name == ".lock":
        path.write_bytes(damage.of_bytes(draw, data, data))
    elif name == "config.yaml":
        path.write_bytes(_yaml(damage.of_value(draw, yaml.safe_load(data))))
    elif name == "metrics.jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        place = draw.randrange(len(rows))
        rows[place] = damage.of_value(draw, rows[place])
        if draw.random() < 0.3:
            draw.shuffle(rows)
        path.write_text("".join(damage.dumped(row) + "\n" for row in rows))
    else:
        path.write_text(damage.dumped(damage.of_value(draw, json.loads(data))))
    (folder / "other").symlink_to(files.folder / "other")
    words = draw.choices(
        [
            ["compare", "run", "other", "--json", "c.json"],
            ["compare", "other", "run"],
            [*TRAIN, "--run-dir", "run"],
            ["report", "run", "--num-images", "2"],
        ],
        [3, 3, 3, 1],
    )[0]
    return Case(words)


def cache(draw: random.Random, files: Sound, folder: Path) -> Case:
    """The cache of a folder of images."""
    shutil.copytree(files.folder / "cache", folder / "cache")
    path = draw.choice(sorted(file for file in (folder / "cache").rglob("*.*") if file.is_file()))
    data = path.read_bytes()
    if path.name == "index.json" and draw.random() < 0.6:  # others begin with a digest
        path.write_text(damage.dumped(damage.of_value(draw, json.loads(data))))
    elif path.suffix == ".npy" and draw.random() < 0.5:
        path.write_bytes(_npy(draw))
    else:
        path.write_bytes(damage.of_bytes(draw, data, data))
    return Case([*sound.on_folder(files.folder / "pictures"), "--run-dir", "new"])


# --- pictures -------------------------------------------------------------------------------------


def picture(draw: random.Random, files: Sound, folder: Path) -> Case:
    pictures = shutil.copytree(files.folder / "pictures", folder / "pictures")
    name, other = draw.sample(sorted(sound.PICTURES), 2)
    data = files.bytes(f"pictures/{name}")
    raw = draw.random() < 0.6 or not name.endswith(".png")
    made = damage.of_bytes(draw, data, files.bytes(f"pictures/{other}"))
    (pictures / name).write_bytes(made if raw else _png_chunk(draw, data))
    file = f"pictures/{name}"
    words = draw.choice(
        [
            ["interpolate", "run", "--images", file, "pictures/grey.png", "--out", "i.png"],
            ["compress", "run", file, "--out", "x.fta"],
            ["compress", "colour", file, "--out", "x.fta"],
            ["evaluate", "colour", "--data", "pictures", "--json", "-"],
            [*sound.on_folder(pictures), "--run-dir", "new"],
        ]
    )
    for model in ("run", "colour"):
        shutil.copytree(files.folder / model, folder / model)
    sound_pixels = [_pixels(files.folder / "pictures" / each) for each in (name, other)]

    def fault(outcome: Outcome) -> str:
        checked = raw and name.endswith(".png") and words[0] in ("compress", "interpolate")
        return "wrong pixels" if checked and _pixels(pictures / name) not in sound_pixels else ""

    return Case(words, fault=fault)


def mask(draw: random.Random, files: Sound, folder: Path) -> Case:
    """A mask of missing pixels, or the image that misses them."""
    names = ["mask.png", "pictures/colour.png"]
    damaged, other = draw.sample(names, 2)
    data = files.bytes(damaged)
    raw = draw.random() < 0.6
    made = damage.of_bytes(draw, data, files.bytes(other)) if raw else _png_chunk(draw, data)
    (folder / "pictures").mkdir()
    for name in names:
        (folder / name).write_bytes(made if name == damaged else files.bytes(name))
    (folder / "colour").symlink_to(files.folder / "colour")
    few = ["--num-images", "1", "--steps", "8", "--out", "x.npz"]

    def fault(outcome: Outcome) -> str:
        known = [_pixels(files.folder / name) for name in names]
        return "wrong pixels" if raw and _pixels(folder / damaged) not in known else ""

    return Case(["inpaint", "colour", "--image", names[1], "--mask", names[0], *few], fault=fault)


def _png_chunk(draw: random.Random, data: bytes) -> bytes:
    """Another chunk, or other content, with a right checksum."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = draw.randrange(len(chunks))
    kind, content = chunks[place]
    if kind == b"IHDR" and draw.random() < 0.7:
        fields = list(struct.unpack(">IIBBBBB", content))
        which = draw.randrange(7)
        large = [0, 1, 7, 9, 2**15, 2**24, 2**31 - 1, 2**32 - 1]
        fields[which] = draw.choice(large if which < 2 else [0, 1, 2, 3, 4, 5, 6, 8, 16, 255])
        content = struct.pack(">IIBBBBB", *fields)
    elif draw.random() < 0.3:
        kind = draw.choice([b"PLTE", b"tRNS", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"eXIf", b"gAMA"])
        bomb = zlib.compress(bytes(10**7))
        content = draw.choice([content, b"", b"x\0\0" + bomb, draw.randbytes(100)])
        place = draw.randrange(1, len(chunks))
        chunks.insert(place, (kind, content))
    else:
        content = damage.of_bytes(draw, content or b"x", content or b"x")
    chunks[place] = kind, content
    out = data[:8]
    for kind, content in chunks:
        sum_ = zlib.crc32(kind + content)
        out += len(content).to_bytes(4, "big") + kind + content + sum_.to_bytes(4, "big")
    return out


# --- all of them ----------------------------------------------------------------------------------

# The formats, each with its share of the cases.
FORMATS: dict[str, tuple[int, Callable[[random.Random, Sound, Path], Case]]] = {
    "checkpoint": (5, checkpoint),
    "archive": (5, archive),
    "npz": (3, npz),
    "config": (3, config),
    "run": (3, run_files),
    "picture": (3, picture),
    "cache": (1, cache),
    "latents": (2, latents),
    "attributes": (2, attributes),
    "points": (1, points),
    "table": (1, table),
    "mask": (1, mask),
}


@dataclass
class Count:
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    seconds: float = 0.0
    mib: float = 0.0


def names_of(cases: int, first: int, formats: Sequence[str] = tuple(FORMATS)) -> list[str]:
    """Cases of formats by their shares, numbered from `first`, in an order that mixes them."""
    shares = [name for name in formats for _ in range(FORMATS[name][0])]
    random.Random(0).shuffle(shares)
    count = dict.fromkeys(FORMATS, first)
    found = []
    for i in range(cases):
        name = shares[i % len(shares)]
        found.append(f"{name}:{count[name]}")
        count[name] += 1
    return found


def attempt(name: str, files: Sound, folder: Path) -> tuple[Case, Outcome, str]:
    """Runs a case in a new folder: the case, what came of it, and its fault, if it has one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kind = name.partition(":")[0]
    case = FORMATS[kind][1](random.Random(name), files, folder)
    outcome = children.run(case.words, folder, SECONDS, MEMORY)
    return case, outcome, fault_of(case, outcome)


def fault_of(case: Case, outcome: Outcome) -> str:
    said = outcome.err.strip()
    if outcome.code < 0:
        return f"ended by signal {-outcome.code}"
    if "Traceback" in said:
        return "a traceback"
    if "Warning:" in said:
        return "a warning of Python"
    if outcome.code and len(said[said.rfind("flowtrain:") :].splitlines()) > LINES:
        return "a long message"
    if outcome.code == 0:
        return "a damaged file was accepted" if case.refused else case.fault(outcome)
    if outcome.code == 1 and case.words[0] == "doctor":
        return ""
    if outcome.code == 1 and any(reason in said for reason in DOCUMENTED):
        return ""
    return "" if outcome.code == 2 else f"exit code {outcome.code}"


def fuzz(names: list[str], files: Sound, folder: Path) -> dict[str, object]:
    counts = {kind: Count() for kind in FORMATS}
    faults: dict[str, list[str]] = {}  # cases that failed in the same way
    stop = threading.Event()  # by Ctrl-C, after the case that runs
    signal.signal(signal.SIGINT, lambda signum, frame: stop.set())
    for name in names:
        if stop.is_set():
            break
        case, outcome, fault = attempt(name, files, folder / "case")
        count = counts[name.partition(":")[0]]
        count.tried += 1
        count.refused += outcome.code == 2
        count.accepted += outcome.code == 0
        count.seconds = max(count.seconds, round(outcome.seconds, 1))
        count.mib = max(count.mib, round(outcome.peak))
        if count.tried % 100 == 0:
            print(name, file=sys.stderr)
        if fault:
            print(f"{name}: {fault}", file=sys.stderr)
            last = outcome.err.strip().rpartition("\n")[2][-300:]
            faults.setdefault(f"{case.words[0]}: {fault}: {last}", []).append(name)
    return {"formats": {kind: vars(count) for kind, count in counts.items()}, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--only", metavar="CASE")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    children.prepare()
    files = sound.make(folder / "sound")
    if options.only:
        case, outcome, fault = attempt(options.only, files, folder / "case")
        print(f"cd {folder / 'case'}", "flowtrain " + shlex.join(case.words), sep="\n")
        print(outcome.out, outcome.err, outcome, fault or "no fault", sep="\n")
        return
    result = fuzz(names_of(options.cases, options.first, options.formats), files, folder)
    shutil.rmtree(folder)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
