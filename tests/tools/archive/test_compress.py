"""Archives: every image comes back bit for bit, and everything else is one clear error."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import sets
from cli_helpers import FOLDER, quick, tree
from coding_helpers import affine_flow, picture, smooth, stored
from helpers import a_config, images
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel, load_model, model_hash
from flowtrain.cli.base import require_folder
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import encoded, file_sizes
from flowtrain.tools.archive import compress, strips
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.codec import Codec
from flowtrain.tools.archive.coder import probe
from flowtrain.tools.archive.decompress import Opened
from flowtrain.tools.archive.inputs import ordinary_sizes

pytest.importorskip("constriction")

ROOM = 10**9  # bytes of memory


@functools.cache
def runs() -> dict[str, Path]:
    """Two small Glows that know what digits look like; not to be written to."""
    for name, steps in (("run", 200), ("other", 1)):
        words = [
            *sets(model__steps=2, model__width=16, train__lr=5e-3, train__num_steps=steps),
            "--run-dir",
            name,
        ]
        quick("train", *words, cwd=FOLDER).ok()
    return {name: FOLDER / name for name in ("run", "other")}


@pytest.fixture(scope="module")
def model():
    return load_model(str(runs()["run"]), torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(model):
    return DataSet(model.config.data).split("train").take(slice(0, 500))


def made(model, x: torch.Tensor, names="train", plain=None, **options) -> compress.Compressed:
    """With the flow, however much it takes, unless `plain` is given."""
    return compress.choose(compress.prepare(model, x), names, plain=plain, **options)


def opened(path, data: bytes, memory: int | None = None) -> Opened:
    path.write_bytes(data)
    return Opened(path, memory)


@pytest.mark.parametrize("count", [1, 2, 500])
def test_archives_of_few_and_many(model, digits, count, tmp_path):
    x = digits[:count]
    sizes = ordinary_sizes(x, 17)
    assert {"PNG", "WEBP"} <= sizes.keys()
    result = made(model, x, plain=None if count == 500 else strips.strips(x))
    assert len(result.data) < 1.05 * sizes["PNG"]
    assert result.stored + result.carriers + result.coded == count
    assert (result.coded > 450) == (count == 500)
    found = opened(tmp_path / "a", result.data)
    assert torch.equal(found.images(model if found.streams else None), x)
    if count == 500:
        values = result.coded * model.flow.dims
        assert result.net_bits / values == pytest.approx(result.bound_bits / values, abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.run  # takes long
def test_a_small_archive_is_no_larger_than_png(count, shape):
    x = smooth(count, shape)
    parts = [bytes(4 * count), *strips.strips(x)]
    names = [f"{i}.png" for i in range(count)]
    data = archive.pack({"shape": shape, "levels": 256, "names": names}, parts)
    assert len(data) < 1.03 * sum(file_sizes(x, 256, "PNG").tolist())


def test_images_that_the_model_knows_nothing_about_are_stored(model, digits, tmp_path):
    x = torch.cat([images(4, (1, 8, 8), 17), digits[:100]])
    said: list[int] = []

    @contextlib.contextmanager
    def stage(title):
        yield lambda done, total: said.append(done)

    result = made(model, x, "some", stage=stage)
    assert result.stored == 4 and result.coded > 80
    assert said[-1] == 100  # carriers and all
    assert torch.equal(opened(tmp_path / "a", result.data).images(model), x)


def test_what_is_stored_is_no_larger_than_any_tall_picture(model, digits, tmp_path):
    """Archives with short strips can be unpacked, too."""
    x = digits[:200]
    short = [strips.strip(part) for part in x.split(64)]
    tall = strips.strips(x)
    assert (len(short), len(tall)) == (4, 1)
    pictures = x.movedim(1, 0).flatten(1, 2)
    assert len(tall[0]) <= min(len(encoded(pictures, "WEBP", slow)) for slow in (False, True))
    sizes = ordinary_sizes(x, 256)
    assert sum(map(len, tall)) <= min(sizes[name] for name in ("tall PNG", "tall WEBP method 6"))
    prepared = compress.prepare(model, x)
    for parts, flag in ((short, None), (tall, True)):
        data = compress._pack(prepared, "train", [], parts, b"")
        found = opened(tmp_path / "a", data)
        assert found.description.model_dump(exclude_unset=True).get("tall") == flag
        assert torch.equal(found.images(None), x)


def test_many_images_are_packed_in_bounded_time(monkeypatch):
    """The slow method is for few images alone."""
    slowly = []

    def noting(image, name, slow=False):
        slowly.append(slow)
        return b"P"

    monkeypatch.setattr(strips, "encoded", noting)
    strips.strips(torch.zeros(334, 1, 28, 28, dtype=torch.uint8))
    assert any(slowly)
    slowly.clear()
    strips.strips(torch.zeros(335, 1, 28, 28, dtype=torch.uint8))
    assert slowly and not any(slowly)


def test_a_tall_strip_fits_a_webp():
    for height in (1, 28, 127, 128, 255, 256, 5000, 16383):
        length = strips.tall_length(height)
        assert length * height <= strips.LONGEST and length >= strips.strip_length(height)
        assert length == strips.strip_length(height) or length >= 2 * strips.STRIP


def of_size(size: int, prepared: compress.Prepared) -> list[bytes]:
    """Strips with which an archive takes about so many bytes."""
    return [bytes(size - len(compress._pack(prepared, "train", [], [b""], b"")))]


def test_the_smaller_of_both_ways_is_taken(model, digits, tmp_path):
    x = digits[compress.prepare(model, digits[:90]).promising]
    prepared = compress.prepare(model, x)
    flow = compress.choose(prepared, "train").data
    for size, tried, wins in (
        (len(flow) + 20, True, True),
        (len(flow) - 20, True, False),
        (2000, False, False),
    ):
        said: list[compress.Forecast] = []
        result = compress.choose(
            prepared,
            "train",
            plain=of_size(size, prepared),
            announce=said.append,
        )
        assert (len(said), result.coded > 0) == (tried, wins)
        assert len(result.data) <= min(len(flow), size + 10)
    assert made(model, x[:3]).stored == 3  # all of them would be carriers
    few = made(model, x[:10], plain=strips.strips(x[:10]))
    assert few.stored == 10
    assert torch.equal(opened(tmp_path / "a", few.data).images(None), x[:10])


def test_an_embedded_model_is_counted(model, digits):
    prepared = compress.prepare(model, digits[:90])
    plain = of_size(2 * len(compress.choose(prepared, "train").data), prepared)
    assert compress.choose(prepared, "train", plain=plain).coded > 0
    said: list[compress.Forecast] = []
    result = compress.choose(
        prepared,
        "train",
        plain=plain,
        embed=True,
        announce=said.append,
    )
    assert said == [] and result.stored == 90


@functools.cache
def embedding() -> bytes:
    """With the model in it, and three streams."""
    model = load_model(str(runs()["run"]), torch.device("cpu"))
    x = DataSet(model.config.data).split("train").take(slice(0, 120))
    return made(model, x, embed=True, stream_size=40).data


def test_threads_and_streams_change_no_byte(model, digits, tmp_path):
    made_ = set()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made_.add(made(model, digits[:120], stream_size=40).data)
    assert len(made_) == 1
    found = opened(tmp_path / "a", made_.pop())
    assert len(found.streams) == 3
    assert torch.equal(found.images(model), digits[:120])


def test_colours_of_few_levels_come_back(tmp_path):
    flow = affine_flow((3, 8, 8), 32)
    meta = {"config": a_config().resolved()}
    file = checkpoint_format.Checkpoint(Path("affine.safetensors"), meta, {})
    model = LoadedModel(flow.eval().requires_grad_(False), a_config(), "raw", file)
    x = smooth(70, (3, 8, 8)) // 16 + 8
    result = made(model, x, stream_size=35)
    assert result.coded > 30
    found = opened(tmp_path / "a", result.data)
    assert (len(found.streams), found.levels, found.description.shape) == (2, 32, (3, 8, 8))
    assert torch.equal(found.images(model), x)


def test_weights_that_are_not_finite_are_named(model, digits):
    for word in ("conditioner", "weight", "log_scale", "shift"):
        flow = copy.deepcopy(model.flow)
        found = next(
            p for name, p in [*flow.named_parameters(), *flow.named_buffers()] if word in name
        )
        found.view(-1)[0] = math.nan
        with pytest.raises(FloatingPointError, match="not finite|singular"):
            compress.prepare(dataclasses.replace(model, flow=flow), digits[:10])


def test_a_flipped_bit_anywhere_is_caught(model, digits, tmp_path):
    for data in (
        made(model, digits[:1], ["a.png"], plain=strips.strips(digits[:1])).data,
        made(model, digits[:90]).data,
    ):
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, bytes(damaged), ROOM)
        for length in (0, 3, 4, 7, 12, len(data) // 2, len(data) - 1):
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, data[:length], ROOM)


def moved(model: LoadedModel, by: float) -> LoadedModel:
    """The model with one number changed, and the same description."""
    flow = copy.deepcopy(model.flow)
    next(p for name, p in flow.named_parameters() if "conditioner" in name).view(-1)[0] += by
    return dataclasses.replace(model, flow=flow)


def with_probe_of(model, part: bytes) -> bytes:
    """The first part of an archive, with the probe of another model."""
    size = archive.IDENTITY.size
    identity = archive.Identity.read(part[-size:])
    return part[:-size] + identity._replace(probe=probe(Codec(model.flow))).written()


def test_numerics_that_do_not_reproduce_are_an_error(model, digits, tmp_path):
    found = opened(tmp_path / "a", made(model, digits[:100]).data)
    other = moved(model, 0.2)
    found.description.versions["torch"] = "0.1"
    with pytest.raises(UserError, match="other numbers here; written with torch 0.1, here"):
        found.images(other)
    parts = found.parts.copy()
    found.parts[0] = with_probe_of(other, parts[0])  # so that only the images tell
    with pytest.raises(UserError, match="does not reproduce"):
        found.images(other)
    damaged = bytearray(parts[0])
    damaged[4 * 70] ^= 1
    found.parts[0] = bytes(damaged)
    with pytest.raises(UserError, match="1 of 100 images do not match their checksums"):
        found.images(model)


def test_a_model_that_does_not_invert_is_refused(model, digits, monkeypatch):
    monkeypatch.setattr(
        Codec, "decode", lambda self, count, stack: torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    )
    with pytest.raises(UserError, match="do not reproduce on this machine"):
        made(model, digits[:60])


def test_the_hash_is_of_what_is_computed(model):
    assert model_hash(model) == model_hash(moved(model, 0.0))
    assert model_hash(model) != model_hash(moved(model, 0.001))


# --- what others write, with a checksum that is right ---------------------------------------------


def repacked(data: bytes, parts=lambda parts: parts, model=None, **changes) -> bytes:
    description, old = archive.unpack(Path("old"), data, ROOM)
    described = description.model_dump(exclude_unset=True)
    described["model"] |= model or {}
    return archive.pack(
        {**described, **changes}, parts(old)[: len(old) - (not described["model"]["embedded"])]
    )


STREAM = {"images": 1, "carriers": 0, "carrier_bytes": 0, "chunks": [1]}
NAMES = [
    "", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "./a", "a\0b", 5, None, "\ud800",
    "n" * 256,
    "ö" * 128,
    "b.png", "b.png/c.png", f"{'n' * 256}/a",
]  # fmt: skip
CRAFTED = [
    *({key: None} for key in ("shape", "levels", "names")),
    *(
        {"shape": shape}
        for shape in ([1, 8], [2, 8, 8], [1, 8, 0], [1, 8, 10**9], [1, 4, 8], [3, 8, 8], "x")
    ),
    *({"levels": levels} for levels in (1, 257, "x", [], 3)),
    *(
        {"names": names}
        for names in (["a.png"], ["a.png"] * 2, ["a", "b", "c"], 7, {"a": 1, "b": 2}, "test")
    ),
    *({"names": "test", "count": count} for count in (1, 3, 10**12, -1, "x")),
    {"streams": [STREAM]},
    {"streams": 5},
    {"parts": [b"more"]},
    *(
        {"strip": strip}
        for strip in (
            b"x",
            b"\x78",
            b"\x89PNG",
            zlib.compress(bytes(127)),
            zlib.compress(bytes(129)),
        )
    ),
    {"strip": encoded(torch.zeros(1, 24, 8, dtype=torch.uint8), "PNG")},
]


@pytest.mark.parametrize("changes", CRAFTED, ids=str)
def test_a_crafted_archive_is_one_error(changes, tmp_path):
    with pytest.raises(UserError, match="not a valid archive|cannot be read"):
        opened(tmp_path / "a", stored(**changes)).images(None)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="not a valid archive"):
        opened(tmp_path / "a", stored(names=[name, "b.png"]))


def test_any_other_name_is_taken(tmp_path):
    """The same rules on both sides: what can be packed can be unpacked."""
    names = [
        "shot 12:30.png",
        "a\\b.png",
        "c\ud8ff.png".replace("\ud8ff", "\udcff"),
        "n" * 251 + ".png",
        " .png",
        "ö/-",
    ]
    for name in names:
        assert opened(tmp_path / "a", stored(names=[name, "b.png"])).names == [name, "b.png"]


@pytest.mark.run  # takes long
def test_small_files_are_not_inflated_to_large_ones(tmp_path, monkeypatch):
    bomb = zlib.compress(bytes(10**8), 9)
    tracemalloc.start()
    with pytest.raises(UserError, match="cannot be read"):
        opened(tmp_path / "a", stored(strip=bomb)).images(None)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    monkeypatch.setattr(archive, "LONGEST_DESCRIPTION", 10**5)
    with pytest.raises(UserError, match="the names take"):
        stored(names=["a" * 10**5, "b"])
    monkeypatch.undo()
    data = stored(names=["a" * 10**5, "b"])
    monkeypatch.setattr(archive, "LONGEST_DESCRIPTION", 10**5)
    with pytest.raises(UserError, match="does not end"):
        opened(tmp_path / "a", data)


def bomb(count=100_000) -> bytes:
    """Black images of 100x100: 2 MB that say, truthfully, that they are 1 GB."""
    strip = zlib.compress(bytes(64 * 10_000), 9)
    rest = zlib.compress(bytes(count % 64 * 10_000), 9)
    sums = archive.checksum(torch.zeros(1, 100, 100, dtype=torch.uint8)).to_bytes(4, "little")
    described = {"shape": [1, 100, 100], "levels": 256, "names": "x", "count": count}
    return archive.pack(
        described, [sums * count, *[strip] * (count // 64), *[rest] * (count % 64 > 0)]
    )


def test_an_archive_that_takes_too_much_memory_is_refused(tmp_path):
    """Before anything is inflated, and before anything is made of the number of images."""
    data = bomb()
    assert len(data) < 3e6
    (tmp_path / "bomb.fta").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"to unpack it takes 1,0\d\d MiB of memory, and --max-memory"
    ):
        Opened(tmp_path / "bomb.fta", 2**29)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    tracemalloc.stop()
    with pytest.raises(UserError, match=rf"cannot be read: {len(data)} bytes, more than 1000000"):
        Opened(tmp_path / "bomb.fta", 10**6)
    names = {"names": ["a"] * 10**6, "count": None}
    with pytest.raises(UserError, match="its description does not end within 1000000 bytes"):
        opened(tmp_path / "a", stored(**names), memory=32 * 10**6)
    quick("decompress", "bomb.fta", "--out", "x", "--max-memory", 500, cwd=tmp_path).failed(
        2, "bomb.fta: to unpack it takes 1,0", "--max-memory is 500 MiB"
    )
    assert not (tmp_path / "x").exists()


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


@pytest.mark.parametrize("kind", ["many", "png", "deflated"])
def test_unpacking_takes_the_memory_that_was_foreseen(kind, tmp_path):
    if kind == "many":
        data = bomb(20_000)
    else:
        x = torch.zeros(1, 1, 8000, 10_000, dtype=torch.uint8)
        strip = encoded(x[0], "PNG") if kind == "png" else zlib.compress(bytes(x.numel()))
        described = {"shape": [1, 8000, 10_000], "levels": 256, "names": ["a.png"]}
        data = archive.pack(described, [archive.checksum(x).to_bytes(4, "little"), strip])
    (tmp_path / "a.fta").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "a.fta"],
        stdout=subprocess.PIPE,
        check=True,
    )
    taken, foreseen = map(int, done.stdout.split())
    assert 5e7 < taken < foreseen + 2 * len(data) + 2e7


@pytest.mark.parametrize("piece", [1, 100, 127, 128, 129, 10**6])
def test_strips_are_inflated_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(strips, "PIECE", piece)
    x = images(2, (1, 8, 8), 17)
    found = torch.empty_like(x)
    strips.unstrip(zlib.compress(x.numpy().tobytes()), found)
    assert torch.equal(found, x)
    for wrong in (bytes(127), bytes(129), bytes(10**6)):
        with pytest.raises(ValueError, match="not 128 bytes"):
            strips.unstrip(zlib.compress(wrong), found)
    with pytest.raises(ValueError, match="not 128 bytes"):
        strips.unstrip(zlib.compress(x.numpy().tobytes())[:-1], found)


@pytest.mark.parametrize("name", ["a" * 10**5, "\x1b[2J/" * 10**4, "a/" * 10**5])
def test_what_is_shown_of_an_archive_is_short(name, tmp_path):
    data = stored(names=[name, name + "b"], versions={"v" * 10**5: "w" * 10**5})
    with pytest.raises(UserError) as error:
        opened(tmp_path / "a", data)
    assert len(str(error.value)) < 500 + len(str(tmp_path)) and str(error.value).isprintable()
    moved = repacked(embedding(), model={"embedded": False, "path": name})
    with pytest.raises(UserError, match="it needs the model") as error:
        opened(tmp_path / "a", moved).load(None, False)
    assert len(str(error.value)) < 500 + len(str(tmp_path)) and str(error.value).isprintable()


def test_a_description_that_is_none_is_one_error(tmp_path):
    for described in (
        b"",
        b"\xff" * 20,
        zlib.compress(b"{}"),
        deflated(b"{"),
        deflated(b"[" * 10**5),
        deflated(b"7"),
    ):
        data = archive.MAGIC + len(described).to_bytes(4, "little") + described
        with pytest.raises(UserError, match="not a valid archive"):
            opened(tmp_path / "a", data + archive.digest(data))


@pytest.mark.parametrize("lengths", [[8, 33], [8, 10**9], [4 * 10**12, 1], [4], [], None])
def test_parts_are_as_long_as_it_says(lengths, tmp_path):
    """Before anything is made of their number."""
    described = {"shape": [1, 8, 8], "levels": 17, "names": "x", "count": 2, "lengths": lengths}
    text = deflated(json.dumps(described).encode())
    data = archive.MAGIC + len(text).to_bytes(4, "little") + text + bytes(40)
    with pytest.raises(UserError, match="parts are longer|not one name for each|lengths"):
        opened(tmp_path / "a", data + archive.digest(data))


def deflated(text: bytes) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15, zdict=archive.DICTIONARY)
    return deflate.compress(text) + deflate.flush()


def test_crafted_streams_are_one_error(model, digits, tmp_path):
    data = embedding()
    described = archive.unpack(Path(), data, ROOM)[0].model_dump(exclude_unset=True)
    streams = described["streams"]
    for changes in (
        {"stored": [0, 0]},
        {"stored": [*described["stored"], 10**6]},
        {"streams": streams[:2]},
        {"streams": [{**streams[0], "chunks": [10**9]}, *streams[1:]]},
        {"streams": [{**streams[0], "carriers": streams[0]["carriers"] + 1}, *streams[1:]]},
        {"model": None},
        {"versions": {}},
    ):
        with pytest.raises(UserError, match="not a valid archive"):
            opened(
                tmp_path / "a",
                archive.pack({**described, **changes}, archive.unpack(Path(), data, ROOM)[1]),
            )
    with pytest.raises(UserError, match="not of its model's shape"):
        opened(tmp_path / "a", repacked(data, shape=[1, 4, 16])).load(None, False)
    with pytest.raises(UserError, match="the model in it cannot be loaded"):
        opened(tmp_path / "a", repacked(data, lambda parts: [*parts[:-1], parts[-1][:-5]])).load(
            None, False
        )
    size = len(archive.unpack(Path(), data, ROOM)[1][-2])
    for change in [
        lambda part, i=i: part[:i] + bytes([part[i] ^ 129]) + part[i + 1 :]
        for i in range(0, size, 211)
    ] + [
        lambda part: part[4:],
        lambda part: part[:-4],
        lambda part: part[1:],
        lambda part: b"",
    ]:
        changed = repacked(
            data, lambda parts, change=change: [*parts[:-2], change(parts[-2]), parts[-1]]
        )
        with pytest.raises(UserError, match="does not reproduce"):
            opened(tmp_path / "a", changed).images(model)


# --- the commands ---------------------------------------------------------------------------------


def test_files_come_back_in_a_process_with_other_threads(tmp_path):
    """From files to files, with the model embedded; n_bits is of no concern to 17 levels in
    0..255.
    """
    shutil.copytree(runs()["run"], tmp_path / "run")
    said = quick(
        "compress",
        "run",
        "--split",
        "train",
        "--num-images",
        20,
        "--out",
        "x/one.fta",
        cwd=tmp_path,
    ).ok()
    for word in (
        "the bound",
        "bytes as PNG",
        "bytes as WEBP",
        "with the flow they take more",
        "without a model",
    ):
        assert word in said.out, said.out
    quick("decompress", "x/one.fta", "--out", "a/b", cwd=tmp_path, OMP_NUM_THREADS="2").ok()
    assert len(tree(tmp_path / "a" / "b")) == 20
    shutil.copy(tmp_path / "a/b/train-00007.png", tmp_path / "single.png")
    words = [
        "compress",
        "run",
        "single.png",
        "a/b",
        "--embed",
        "--out",
        "two.fta",
        "--weights",
        "raw",
    ]
    said = quick(*words, "--num-images", 10, cwd=tmp_path).ok()
    assert "with the model in it, the archive would be larger" in said.out
    shutil.rmtree(tmp_path / "run")
    quick("decompress", "two.fta", "--out", "c", cwd=tmp_path, OMP_NUM_THREADS="3").ok()
    assert tree(tmp_path / "c") == ["b", *(f"b/train-{i:05}.png" for i in range(9)), "single.png"]
    for name in tree(tmp_path / "c")[1:]:
        original = tmp_path / name if name == "single.png" else tmp_path / "a" / name
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "c" / name)), np.asarray(Image.open(original))
        )


def test_streams_and_an_embedded_model_come_back_in_a_process_with_other_threads(digits, tmp_path):
    (tmp_path / "a.fta").write_bytes(embedding())
    assert Opened(tmp_path / "a.fta").description.embedded
    quick("decompress", "a.fta", "--out", "a", cwd=tmp_path, OMP_NUM_THREADS="3").ok()
    for i, image in enumerate(to_8bit(digits[:120], 17)):
        assert np.array_equal(
            np.asarray(Image.open(tmp_path / "a" / f"train-{i:05}.png")), image[0].numpy()
        )


def test_where_the_flow_wins_the_model_that_is_needed_is_said(tmp_path):
    shutil.copytree(runs()["run"], tmp_path / "run")
    said = quick(
        "compress", "run", "--split", "train", "--num-images", 900, "--out", "all.fta", cwd=tmp_path
    ).ok()
    for word in (
        "bits/dim, net",
        "the bound",
        "initial bits",
        "images/s",
        "about 0:",
        "keep a copy of run/checkpoints",
    ):
        assert word in said.out, said.out


def test_long_names_and_odd_ones_come_back(tmp_path):
    shutil.copytree(runs()["run"], tmp_path / "run")
    for name in ("shot 12:30.png", f"{'n' * 251}.png", "a\\b.png"):
        picture(tmp_path / "in" / name)
    out = "o" * 255
    quick("compress", "run", "in", "--out", out, cwd=tmp_path).ok()
    quick("decompress", out, "--out", "out", cwd=tmp_path).ok()
    assert tree(tmp_path / "out" / "in") == tree(tmp_path / "in")


def test_where_nothing_can_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="--out x: there is no permission"):
        require_folder(tmp_path, Path("x"))
