"""Archives: codelengths that a formula knows, every image bit for bit, and one clear error for everything else."""

import copy
import dataclasses
import functools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import FOLDER, quick, sets, tree
from helpers import images, perturb, tiny_flow
from PIL import Image
from torch import nn

from flowtrain import archive, checkpoint, compression
from flowtrain.bijections import Bijection, DiagonalAffine, Flatten, Sequential
from flowtrain.bitsback import Codec, Exhausted, Stack, Uncodable, constriction
from flowtrain.classes import ClassPrior
from flowtrain.compression import Opened, encode_stream, random_words
from flowtrain.data import DataSet
from flowtrain.dequantize import Dequantizer, RealValued
from flowtrain.errors import UserError
from flowtrain.flow import Flow
from flowtrain.variational import VariationalNoise

pytest.importorskip("constriction")

GREY, RGB = (1, 4, 4), (3, 4, 4)


def variational(flow: Flow, scale: float = 0.1) -> Flow:
    flow.dequantizer.noise_model = perturb(VariationalNoise(flow.shape, 2, 4), scale)
    return flow


def affine_flow(shape, levels=256, slope=3.0, shift=0.1) -> Flow:
    """`z = slope (y - 1/2) + shift`."""
    affine = DiagonalAffine((math.prod(shape),))
    nn.init.constant_(affine.log_scale, 8 * math.atanh(math.log(slope) / 8))
    nn.init.constant_(affine.shift, shift)
    return Flow(Sequential(Flatten(shape), affine), Dequantizer(levels), shape)


def coded(flow: Flow, x: torch.Tensor) -> float:
    """Bits per dimension on a stack of random bits. All images come back, and so does the stack."""
    codec, words = Codec(flow), random_words(4 * x.numel() + 8)
    stack = Stack(words)
    before, parts = stack.bits, x.split(16)
    for part in parts:
        codec.encode(part, stack)
    bits = (stack.bits - before) / x.numel()
    stack = Stack(stack.words(), again=True)
    back = [codec.decode(len(part), stack) for part in reversed(parts)]
    assert torch.equal(torch.cat(back[::-1]), x)
    assert np.array_equal(stack.first_words(), words)
    return bits


# --- codelengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [256, 17, 4])
@pytest.mark.parametrize("noise", ["uniform", "variational"])
def test_a_closed_form_density_gives_the_closed_form_codelength(levels, noise):
    slope, shift = 3.0, 0.1
    flow = affine_flow(RGB, levels, slope, shift)
    if noise == "variational":  # as it starts: uniform
        flow.dequantizer.noise_model = VariationalNoise(RGB, 2, 4)
    x = images(256, RGB, levels)
    middle = slope * ((x.double() + 0.5) / levels - 0.5) + shift
    squares = middle.square().mean() + (slope / levels) ** 2 / 12  # of z, which is uniform in its bin
    nats = (squares + math.log(2 * math.pi)) / 2 - math.log(slope) + math.log(levels)
    assert coded(flow, x) == pytest.approx(nats.item() / math.log(2), abs=0.005 + 0.03 / levels)


MODELS = {
    **{f"glow {name}": ("glow", {"coupling": name}) for name in ("affine", "additive", "spline", "mixture")},
    "glow checkerboard": ("glow", {"split": "checkerboard", "permutation": "conv1x1", "prior": "spline"}),
    "glow mixed": ("glow", {"split": "mixed", "permutation": "shuffle", "initialization": "whitening"}),
    "glow reverse": ("glow", {"permutation": "reverse", "conditioner": "gated", "prior": "mixture"}),
    "realnvp": ("realnvp", {}),
    "nice": ("nice", {}),
    "nice gaussian": ("nice", {"prior": "gaussian"}),
}


@pytest.mark.parametrize("shape", [GREY, RGB], ids=["grey", "rgb"])
@pytest.mark.parametrize("name", MODELS)
def test_the_codelength_is_the_bound(name, shape):
    model, options = MODELS[name]
    transform = "logit" if model == "realnvp" else "center"
    flow = tiny_flow(model, shape, 256, transform, scale=0.05, **options)
    x = images(64, shape)  # those that it is initialized on: far out, the code is shorter than the normal density says
    bound = torch.stack([flow.bits_per_dim(x, torch.Generator().manual_seed(i)).mean() for i in range(8)])
    # Of this many images of this size the draws differ by about 0.01.
    assert coded(flow, x) == pytest.approx(bound.mean().item(), abs=0.005 + 4 * bound.std().item())


@pytest.mark.parametrize("shape, levels", [((1, 8, 8), 256), ((3, 5, 3), 256), ((1, 8, 8), 17), ((3, 4, 4), 2)])
def test_the_codelength_is_the_bound_with_learned_noise(shape, levels):
    flow = variational(affine_flow(shape, levels))
    x = images(96, shape, levels)
    bound = torch.stack([flow.bits_per_dim(x, torch.Generator().manual_seed(i)).mean() for i in range(8)])
    assert coded(flow, x) == pytest.approx(bound.mean().item(), abs=0.01 + 4 * bound.std().item())


@pytest.mark.parametrize("alpha", [0.05, 1e-5])
def test_constant_images_come_back(alpha):
    x = torch.cat([torch.full((1, *RGB), value, dtype=torch.uint8) for value in (0, 1, 127, 254, 255)])
    flow = variational(affine_flow(RGB, slope=1.0))
    flow.dequantizer.transform, flow.dequantizer.alpha = "logit", alpha
    coded(flow, x)
    coded(variational(affine_flow(RGB)), x)


def test_what_is_out_of_range_is_named():
    x = torch.full((3, *RGB), 128, dtype=torch.uint8)
    x[1] = 255
    with pytest.raises(Uncodable) as caught:
        Codec(affine_flow(RGB, slope=150.0)).encode(x, Stack(random_words(1000)))
    assert caught.value.images.tolist() == [False, True, False]


def test_a_layer_without_a_rule_is_named():
    class Cubic(Bijection):
        pass

    flow = Flow(Sequential(Flatten(GREY), Cubic()), Dequantizer(256), GREY)
    with pytest.raises(UserError, match="Cubic"):
        Codec(flow)
    with pytest.raises(UserError, match="real-valued"):
        Codec(Flow(Sequential(Flatten(GREY)), RealValued(), GREY))
    with pytest.raises(UserError, match="model.classes is 3"):
        Codec(Flow(Sequential(Flatten(GREY)), Dequantizer(256), GREY, ClassPrior(3, (4,))))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match="flowtrain\\[compress\\]"):
        constriction()


# --- streams ----------------------------------------------------------------------------------------------------------


def round_trip(codec: Codec, x: torch.Tensor, borrowed: int) -> compression.Stream:
    stream, dropped = encode_stream(codec, x, list(range(len(x))), borrowed, lambda count: None)
    assert sorted(stream.images + dropped) == list(range(len(x)))
    back = compression.decode_stream(codec, stream.words, stream.description(), lambda count: None)
    assert torch.equal(back, x[stream.images])
    return stream


def smooth(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Images of which neighbouring pixels are alike."""
    coarse = torch.rand(count, shape[0], 3, 3, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear") * 255).to(torch.uint8)


@pytest.mark.parametrize("borrowed", [16, 1200, 5000])
def test_a_stream_that_borrows_more_than_it_has_begins_again(borrowed):
    codec, x = Codec(affine_flow((3, 8, 8))), smooth(40, (3, 8, 8))
    stream = round_trip(codec, x, borrowed)
    assert 0 < stream.carriers < 40 and max(stream.chunks) > min(stream.chunks)
    with pytest.raises(Exhausted):
        codec.encode(x[:1], Stack(random_words(10)))


def test_random_bits_are_borrowed_where_images_are_too_small_to_carry():
    x = torch.full((50, 1, 8, 8), 7, dtype=torch.uint8)
    stream = round_trip(Codec(affine_flow((1, 8, 8))), x, 50_000)
    assert stream.carriers == compression.MOST_CARRIERS and stream.initial_bits >= 50_000


def test_an_image_that_cannot_be_coded_is_left_out_of_its_stream():
    x = smooth(30, (3, 8, 8)) // 8 + 112
    x[20, 0, 0, 0] = 255
    stream = round_trip(Codec(affine_flow((3, 8, 8), slope=150.0)), x, 4000)
    assert 20 not in stream.images and len(stream.images) == 29


# --- archives ---------------------------------------------------------------------------------------------------------


@functools.cache
def runs() -> dict[str, Path]:
    """Two small Glows that know what digits look like; not to be written to."""
    for name, steps in (("run", 200), ("other", 1)):
        words = [*sets(model__steps=2, model__width=16, train__lr=5e-3, train__num_steps=steps), "--run-dir", name]
        quick("train", *words, cwd=FOLDER).ok()
    return {name: FOLDER / name for name in ("run", "other")}


@pytest.fixture(scope="module")
def model():
    return checkpoint.load_model(str(runs()["run"]), torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(model):
    return DataSet(model.config.data).split("train").take(slice(0, 500))


def opened(path, data: bytes) -> Opened:
    path.write_bytes(data)
    return Opened(path)


@pytest.mark.parametrize("count", [1, 2, 500])
def test_archives_of_few_and_many(model, digits, count, tmp_path):
    x = digits[:count]
    sizes = compression.ordinary_sizes(x, 17, lambda done, total: None)
    assert {"PNG", "WEBP"} <= sizes.keys()
    result = compression.compress(model, x, "train", ordinary_bytes=min(sizes.values()))
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
def test_a_small_archive_is_no_larger_than_png(count, shape):
    x = smooth(count, shape)
    parts = [bytes(4 * count), *archive.strips(x)]
    names = [f"{i}.png" for i in range(count)]
    data = archive.pack({"shape": shape, "levels": 256, "names": names}, parts)
    assert len(data) < 1.03 * sum(archive.sizes(x, 256, "PNG").tolist())


def test_images_that_the_model_knows_nothing_about_are_stored(model, digits, tmp_path):
    x = torch.cat([images(4, (1, 8, 8), 17), digits[:100]])
    result = compression.compress(model, x, "some")
    assert result.stored == 4 and result.coded > 80
    assert torch.equal(opened(tmp_path / "a", result.data).images(model), x)


def test_the_smaller_of_both_ways_is_taken(model, tmp_path):
    x = torch.zeros(80, 1, 8, 8, dtype=torch.uint8)
    flow = compression.compress(model, x, "zeros")  # nobody has said what else there is
    assert flow.stored == 0
    for ordinary, tried in ((1.1 * len(flow.data), [80]), (1.0, [])):  # about the same, far less
        said: list[int] = []
        result = compression.compress(
            model, x, "zeros", ordinary_bytes=ordinary, announce=lambda estimate, count, said=said: said.append(count)
        )
        assert said == tried and result.stored == 80 and len(result.data) < len(flow.data)
        assert torch.equal(opened(tmp_path / "a", result.data).images(None), x)


def test_threads_and_streams_change_no_byte(model, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(compression, "STREAM", 40)
    made = set()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.add(compression.compress(model, digits[:120], "train").data)
    assert len(made) == 1
    found = opened(tmp_path / "a", made.pop())
    assert len(found.streams) == 3
    assert torch.equal(found.images(model), digits[:120])


def test_a_flipped_bit_anywhere_is_caught(model, digits, tmp_path):
    for data in (
        compression.compress(model, digits[:1], ["a.png"], ordinary_bytes=1.0).data,
        compression.compress(model, digits[:90], "train").data,
    ):
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, bytes(damaged))
        for length in (0, 3, 4, 7, 12, len(data) // 2, len(data) - 1):
            with pytest.raises(UserError, match="damaged|not an archive"):
                archive.unpack(tmp_path, data[:length])


def moved(model: checkpoint.LoadedModel, by: float) -> checkpoint.LoadedModel:
    """The model with one number changed, and the same description."""
    flow = copy.deepcopy(model.flow)
    next(p for name, p in flow.named_parameters() if "conditioner" in name).view(-1)[0] += by
    return dataclasses.replace(model, flow=flow)


def test_numerics_that_do_not_reproduce_are_an_error(model, digits, tmp_path):
    found = opened(tmp_path / "a", compression.compress(model, digits[:100], "train").data)
    other = moved(model, 0.2)
    found.description["versions"]["torch"] = "0.1"
    with pytest.raises(UserError, match="other numbers here; written with torch 0.1, here"):
        found.images(other)
    found.description["probe"] = compression.probe(Codec(other.flow))  # so that only the images tell
    with pytest.raises(UserError, match="does not reproduce"):
        found.images(other)
    damaged = bytearray(found.parts[0])
    damaged[4 * 70] ^= 1
    found.parts[0] = bytes(damaged)
    found.description["probe"] = compression.probe(Codec(model.flow))
    with pytest.raises(UserError, match="1 of 100 images do not match their checksums"):
        found.images(model)


def test_a_model_that_does_not_invert_is_refused(model, digits, monkeypatch):
    monkeypatch.setattr(Codec, "decode", lambda self, count, stack: torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="do not reproduce on this machine"):
        compression.compress(model, digits[:60], "train")


def test_the_hash_is_of_what_is_computed(model):
    assert compression.model_hash(model) == compression.model_hash(moved(model, 0.0))
    assert compression.model_hash(model) != compression.model_hash(moved(model, 0.001))


# --- the commands -----------------------------------------------------------------------------------------------------


def test_files_come_back_in_a_process_with_other_threads(tmp_path):
    """From files to files, with the model embedded; n_bits is of no concern to 17 levels in 0..255."""
    shutil.copytree(runs()["run"], tmp_path / "run")
    said = quick("compress", "run", "--split", "train", "--num-images", 80, "--out", "x/one.fta", cwd=tmp_path).ok()
    for word in ("bits/dim, net", "the bound", "initial bits", "images/s", "bytes as PNG", "bytes as WEBP", "about 0:"):
        assert word in said.out, said.out
    quick("decompress", "x/one.fta", "--out", "a/b", cwd=tmp_path, OMP_NUM_THREADS="2").ok()
    assert len(tree(tmp_path / "a" / "b")) == 80
    shutil.copy(tmp_path / "a/b/train-00007.png", tmp_path / "single.png")
    words = ["compress", "run", "a/b", "single.png", "--embed", "--out", "two.fta", "--weights", "raw"]
    quick(*words, cwd=tmp_path).ok()
    shutil.rmtree(tmp_path / "run")
    quick("decompress", "two.fta", "--out", "c", cwd=tmp_path, OMP_NUM_THREADS="3").ok()
    assert tree(tmp_path / "c") == ["b", *(f"b/train-{i:05}.png" for i in range(80)), "single.png"]
    for name in tree(tmp_path / "c")[1:]:
        original = tmp_path / name if name == "single.png" else tmp_path / "a" / name
        assert np.array_equal(np.asarray(Image.open(tmp_path / "c" / name)), np.asarray(Image.open(original)))


@pytest.mark.parametrize("levels", [256, 32, 17, 2])
def test_files_of_few_levels_are_those_that_decompress_writes(levels, tmp_path):
    x = images(3, (3, 4, 4), levels)
    for i, image in enumerate(x):
        (tmp_path / f"{i}.png").write_bytes(archive.encoded(compression.to_8bit(image, levels), "PNG"))
    names, found = compression.from_files([tmp_path], (3, 4, 4), levels)
    assert torch.equal(found, x) and names == [f"{tmp_path.name}/{i}.png" for i in range(3)]


def picture(path, size=(8, 8), mode="L", value=0):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, an archive of the one, and files of all kinds."""
    here = tmp_path_factory.mktemp("compress")
    shutil.copytree(runs()["run"], here / "run")
    shutil.copytree(runs()["other"], here / "other")
    quick("compress", "run", "--split", "train", "--num-images", 90, "--out", "good.fta", cwd=here).ok()
    data = (here / "good.fta").read_bytes()
    (here / "cut.fta").write_bytes(data[:-1])
    (here / "moved.fta").write_bytes(compression_moved(data))
    evil = {"shape": [1, 8, 8], "levels": 17, "names": ["../up.png"]}
    (here / "evil.fta").write_bytes(archive.pack(evil, [bytes(4)]))
    (here / "broken.png").write_bytes(b"no image")
    picture(here / "good.png")
    picture(here / "sub" / "good.png")
    picture(here / "wide.png", (9, 8))
    picture(here / "rgb.png", mode="RGB")
    picture(here / "deep.png", value=100)
    (here / "empty").mkdir()
    (here / "taken").mkdir()
    picture(here / "taken" / "train-00003.png")
    return here


def compression_moved(data: bytes) -> bytes:
    """An archive whose model was somewhere else."""
    description, parts = archive.unpack(FOLDER, data)
    description["model"]["path"] = "gone/best.safetensors"
    return archive.pack(description, parts)


WRONG = [
    ("compress run --out x", ["INPUT", "--split"]),
    ("compress run good.png --split test --out x", ["INPUT", "not both"]),
    ("compress run --split all --out x", ["--split all"]),
    ("compress run --split test --out empty", ["--out empty", "folder"]),
    ("compress run none.png --out x", ["none.png", "no such"]),
    ("compress run broken.png --out x", ["broken.png", "cannot be read"]),
    ("compress run wide.png --out x", ["wide.png", "9x8 L", "8x8 L"]),
    ("compress run rgb.png --out x", ["rgb.png", "8x8 RGB", "8x8 L"]),
    ("compress run deep.png --out x", ["deep.png", "17", "not be lossless"]),
    ("compress run good.png sub/good.png --out x", ["sub/good.png", "good.png"]),
    ("compress run empty --out x", ["empty", "no image"]),
    ("compress run good.png --out x --weights best", ["--weights best"]),
    ("compress none.safetensors good.png --out x", ["none.safetensors"]),
    ("decompress none.fta --out x", ["none.fta", "cannot be read"]),
    ("decompress good.png --out x", ["good.png", "not an archive"]),
    ("decompress cut.fta --out x", ["cut.fta", "damaged"]),
    ("decompress evil.fta --out x", ["../up.png"]),
    ("decompress good.fta --out good.png", ["--out good.png", "file"]),
    ("decompress good.fta --out taken", ["--out taken", "train-00003.png"]),
    ("decompress good.fta --out x --model other", ["other", "another one", "--model"]),
    ("decompress moved.fta --out x", ["moved.fta", "gone/best.safetensors", "--model"]),
]


@pytest.mark.parametrize("words, said", WRONG, ids=[words for words, _ in WRONG])
def test_wrong_input_is_one_message_and_writes_nothing(folder, words, said):
    before = tree(folder)
    quick(*words.split(), cwd=folder).failed(2, *said)
    assert tree(folder) == before
