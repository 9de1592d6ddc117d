"""Files of others, also with a checksum that is right."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from coding_helpers import affine_flow, loaded, opened, smooth, stored
from helpers import images, memory_below

from flowtrain.checkpoints.load import LoadedModel
from flowtrain.errors import UserError
from flowtrain.pictures.lossless import encoded
from flowtrain.tools.archive import compress, strips
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.decompress import Opened

pytest.importorskip("constriction")

ROOM = 10**9  # bytes of memory


@pytest.fixture(scope="module")
def coded() -> tuple[LoadedModel, bytes]:
    """A model, and an archive of three streams and a stored image."""
    model = loaded(affine_flow((3, 8, 8), 32), shape=[3, 8, 8], levels=32, format=1)
    x = torch.cat([torch.full((1, 3, 8, 8), 31).byte(), smooth(70, (3, 8, 8)) // 16 + 8])
    prepared = compress.prepare(model, x)
    prepared.coder.stream = 24
    return model, compress.choose(prepared, "train", embed=True).data


def test_a_flipped_bit_anywhere_is_caught(coded, tmp_path):
    for data in (stored(), coded[1]):
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, bytes(damaged), ROOM)
        for length in (0, 3, 4, 7, 12, len(data) // 2, len(data) - 1):
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, data[:length], ROOM)


STREAM = {"images": 1, "carriers": 0, "carrier_bytes": 0, "chunks": [1]}
SHAPES = [[1, 8], [2, 8, 8], [1, 8, 0], [1, 8, 10**9], [1, 4, 8], [3, 8, 8], "x"]
STRIPS = [b"x", b"\x78", b"\x89PNG", zlib.compress(bytes(127)), zlib.compress(bytes(129))]
CRAFTED = [
    *({key: None} for key in ("shape", "levels", "names")),
    *({"shape": shape} for shape in SHAPES),
    *({"levels": levels} for levels in (1, 257, "x", [], 3)),
    *({"names": names} for names in (["a.png"], ["a", "b", "c"], 7, {"a": 1, "b": 2}, "test")),
    *({"names": [name, "b.png"]} for name in ("../a", "\ud800", "b.png/c.png", 5, None, [])),
    *({"names": "test", "count": count} for count in (1, 3, 10**12, -1, "x")),
    {"streams": [STREAM]},
    {"streams": 5},
    {"parts": [b"more"]},
    *({"strip": strip} for strip in STRIPS),
    {"strip": encoded(torch.zeros(1, 24, 8, dtype=torch.uint8), "PNG")},
]


@pytest.mark.parametrize("changes", CRAFTED, ids=lambda changes: ascii(changes)[:60])
def test_a_crafted_archive_is_one_error(changes, tmp_path):
    readable = "cannot be read" if "strip" in changes or "shape" in changes else "not a valid"
    with pytest.raises(UserError, match=f"not a valid archive|{readable}"):
        opened(tmp_path / "a", stored(**changes)).images(None)


@pytest.mark.parametrize("changes", [{"checked": 2**70}, {"sides": 8}], ids=str)
def test_a_crafted_archive_of_one_image_is_one_error(changes, tmp_path):
    x, sides = torch.zeros(1, 1, 2, 3, dtype=torch.uint8), b""
    if "sides" in changes:
        sides = archive.packed_sides(torch.tensor([4]), 8)
    claim = {"shape": [1, 2, 3], "levels": 17, "names": ["a.png"], **changes}
    sums = archive.checksum(x).to_bytes(4, "little")
    with pytest.raises(UserError, match="not a valid archive"):
        opened(tmp_path / "a", archive.pack(claim, [sums + sides, strips.strip(x)])).images(None)


def deflated(text: bytes) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15, zdict=archive.DICTIONARY)
    return deflate.compress(text) + deflate.flush()


def described(text: bytes, rest: bytes = b"") -> bytes:
    data = archive.MAGIC + len(text).to_bytes(4, "little") + text + rest
    return data + archive.digest(data)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff" * 20, zlib.compress(b"{}"), *map(deflated, (b"{", b"[" * 10**5, b"7"))],
    ids=range(6),
)
def test_a_description_that_is_none_is_one_error(text, tmp_path):
    with pytest.raises(UserError, match="not a valid archive"):
        opened(tmp_path / "a", described(text))


@pytest.mark.parametrize("lengths", [[8, 33], [8, 10**9], [4 * 10**12, 1], [4], [], None])
def test_parts_are_as_long_as_they_claim(lengths, tmp_path):
    """Before their number is used."""
    claim = {"shape": [1, 8, 8], "levels": 17, "names": "x", "count": 2, "lengths": lengths}
    data = described(deflated(json.dumps(claim).encode()), bytes(40))
    with pytest.raises(UserError, match="parts are longer|not one name for each|lengths"):
        opened(tmp_path / "a", data)


def repacked(data: bytes, change=lambda parts: parts, **changes) -> bytes:
    description, parts = archive.unpack(Path("old"), data, ROOM)
    return archive.pack({**description.model_dump(exclude_unset=True), **changes}, change(parts))


@pytest.mark.run  # takes long
def test_crafted_streams_are_one_error(coded, tmp_path):
    model, data = coded
    known = archive.unpack(Path(), data, ROOM)[0].model_dump(exclude_unset=True)
    first, *others = known["streams"]
    fewer = {**first, "images": first["images"] - 1, "chunks": first["chunks"][1:]}
    for changes in (
        {"stored": known["stored"] * 2},
        {"stored": known["stored"] * 2, "streams": [fewer, *others]},  # as many images as names
        {"stored": [*known["stored"], 10**6]},
        {"stored": [10**6]},
        {"streams": others},
        {"streams": [{**first, "chunks": [10**9]}, *others]},
        *({"streams": [{**first, "carriers": first["carriers"] + i}, *others]} for i in (-1, 1)),
        {"model": None},
        {"versions": {}},
        {"sides": 2},
        {"sides": 3},
    ):
        with pytest.raises(UserError, match="not a valid archive"):
            opened(tmp_path / "a", repacked(data, **changes))
    with pytest.raises(UserError, match="the model in it cannot be loaded"):
        cut = repacked(data, lambda parts: [*parts[:-1], parts[-1][:-5]])
        opened(tmp_path / "a", cut).load(None, False)
    size = len(archive.unpack(Path(), data, ROOM)[1][-2])
    flips = range(0, size, max(1, size // 12))
    for change in [
        *(lambda part, i=i: part[:i] + bytes([part[i] ^ 129]) + part[i + 1 :] for i in flips),
        lambda part: part[4:],
        lambda part: part[:-4],
        lambda part: part[1:],
        lambda part: b"",
    ]:
        changed = repacked(data, lambda parts, f=change: [*parts[:-2], f(parts[-2]), parts[-1]])
        with pytest.raises(UserError, match="does not reproduce"):
            opened(tmp_path / "a", changed).images(model)


@pytest.mark.parametrize("name", ["a" * 10**5, "\x1b[2J/" * 10**4, "a/" * 10**5])
def test_messages_about_an_archive_are_short(name, coded, tmp_path):
    claim = stored(names=[name, name + "b"], versions={"v" * 10**5: "w" * 10**5})
    needed = {"embedded": False, "path": name, "weights": "raw"}
    moved = repacked(coded[1], lambda parts: parts[:-1], model=needed)
    for data, words in ((claim, "not a valid archive"), (moved, "it needs the model")):
        with pytest.raises(UserError, match=words) as error:
            opened(tmp_path / "a", data).load(None, False)
        assert len(str(error.value)) < 500 + len(str(tmp_path)) and str(error.value).isprintable()


@pytest.mark.parametrize("piece", [1, 100, 127, 128, 129, 10**6])
def test_strips_are_inflated_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(strips, "PIECE", piece)
    x = images(2, (1, 8, 8), 17)
    found, pixels = torch.empty_like(x), x.numpy().tobytes()
    strips.unstrip(zlib.compress(pixels), found)
    assert torch.equal(found, x)
    for wrong in (*map(zlib.compress, map(bytes, (127, 129, 10**6))), zlib.compress(pixels)[:-1]):
        with pytest.raises(ValueError, match="not 128 bytes"):
            strips.unstrip(wrong, found)


@pytest.mark.run  # takes long
def test_small_files_are_not_inflated_to_large_ones(tmp_path, monkeypatch):
    bomb = zlib.compress(bytes(10**8), 9)
    with memory_below(1e7), pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "a", stored(strip=bomb)).images(None)
    long = stored(names=["a" * 10**5, "b"])
    monkeypatch.setattr(archive, "LONGEST_DESCRIPTION", 10**5)
    with pytest.raises(UserError, match="the names take"):
        stored(names=["a" * 10**5, "b"])
    with pytest.raises(UserError, match="does not end"):
        opened(tmp_path / "a", long)


def black(strips, count, height, width, **more) -> bytes:
    """An archive of black images."""
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    claim = {"shape": list(image.shape), "levels": 256, "names": "x", "count": count, **more}
    return archive.pack(claim, [archive.checksum(image).to_bytes(4, "little") * count, *strips])


def bomb(count=100_000) -> bytes:
    """2 MB that claim 1 GB, truthfully."""
    strip, rest = (zlib.compress(bytes(each * 10_000), 9) for each in (64, count % 64))
    return black([*[strip] * (count // 64), *[rest] * (count % 64 > 0)], count, 100, 100)


def test_an_archive_that_takes_too_much_memory_is_refused(tmp_path):
    """Before anything is inflated, and before the number of images is used."""
    data, path = bomb(), tmp_path / "bomb.fta"
    assert len(data) < 3e6
    said = r"takes 1,0\d\d MiB of memory, but --max-memory is 512"
    with memory_below(20 * len(data)), pytest.raises(UserError, match=said):
        opened(path, data, 2**29)
    with pytest.raises(UserError, match=rf"cannot be read: {len(data)} bytes, more than 1000000"):
        Opened(path, 10**6)
    names = stored(names=["a"] * 10**6, count=None)
    with pytest.raises(UserError, match="its description does not end within 1000000 bytes"):
        opened(path, names, memory=32 * 10**6)


PEAK = """
import re, sys
from pathlib import Path
import torch
from flowtrain.tools.archive.decompress import Opened
torch.set_num_threads(1)
status = Path("/proc/self/status")  # getrusage would begin with the peak of the parent
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
before = peak()
found = Opened(Path(sys.argv[1]), 2**34)
found.images(None)
print(peak() - before, found.description.memory)
"""


ARCHIVES = {
    "strips": lambda: bomb(20_000),
    "png": lambda: black([encoded(torch.zeros(1, 8000, 10_000).byte(), "PNG")], 1, 8000, 10_000),
    "tall": lambda: black([zlib.compress(bytes(16_383 * 5000))], 16_383, 1, 5000, tall=True),
}


@pytest.mark.run
@pytest.mark.parametrize("kind", ARCHIVES)
def test_unpacking_takes_the_memory_that_was_foreseen(kind, tmp_path):
    data = ARCHIVES[kind]()
    (tmp_path / "a.fta").write_bytes(data)
    words = [sys.executable, "-c", PEAK, tmp_path / "a.fta"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    taken, foreseen = map(int, done.stdout.split())
    assert 5e7 < taken < foreseen + 2 * len(data) + 2e7
