"""Archives: every image comes back bit for bit, and everything else is one clear error."""

import copy
import dataclasses
import functools
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from catalogue import sets
from cli_helpers import FOLDER, quick, tree
from coding_helpers import affine_flow, causal_flow, loaded, opened, picture, smooth
from helpers import images
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import LoadedModel, load_model, model_hash
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.pictures.grid import to_8bit
from flowtrain.pictures.lossless import encoded, file_sizes
from flowtrain.tools.archive import compress, strips
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive.codec import Codec, DirectCodec, coder_of
from flowtrain.tools.archive.command import _model_and_files
from flowtrain.tools.archive.inputs import ordinary_sizes

pytest.importorskip("constriction")
pytestmark = pytest.mark.run


@functools.cache
def run() -> Path:
    """A small Glow, trained on the digits; not to be written to."""
    words = sets(model__steps=2, model__width=16, train__lr=5e-3, train__num_steps=200)
    quick("train", *words, "--run-dir", "run", cwd=FOLDER).ok()
    return FOLDER / "run"


@pytest.fixture(scope="module")
def model():
    return load_model(str(run()), torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(model):
    return DataSet(model.config.data).split("train").take(slice(0, 500))


@pytest.fixture
def causal():
    return loaded(causal_flow((3, 4, 4), scale=0.01, x=faint(64)))


def faint(count: int) -> torch.Tensor:
    """Images that take far fewer than eight bits for each entry."""
    return smooth(count, (3, 4, 4)) // 8 + 112


def made(
    model, x: torch.Tensor, names="train", plain=None, stream=None, **options
) -> compress.Compressed:
    """With the flow, however much it takes, unless `plain` is given. `stream` is its stack size."""
    prepared = compress.prepare(model, x)
    prepared.coder.stream = stream or prepared.coder.stream
    return compress.choose(prepared, names, plain=plain, **options)


@pytest.mark.parametrize("count", [1, 500])
def test_archives_of_few_and_many(model, digits, count, tmp_path):
    x = digits[:count]
    result = made(model, x, plain=None if count == 500 else strips.strips(x))
    assert len(result.data) < 1.05 * sum(file_sizes(x, 17, "PNG").tolist())
    assert result.stored + result.carriers + result.coded == count
    assert (result.coded > 450) == (count == 500)
    found = opened(tmp_path / "a", result.data)
    assert torch.equal(found.images(model if found.streams else None), x)
    if count == 500:
        values = result.coded * model.flow.dims
        assert result.net_bits / values == pytest.approx(result.bound_bits / values, abs=0.02)


def test_stored_images_take_no_more_than_any_tall_picture(model, digits, tmp_path):
    """Archives with short strips can be unpacked, too."""
    x = digits[:200]
    short, tall = [strips.strip(part) for part in x.split(64)], strips.strips(x)
    assert (len(short), len(tall)) == (4, 1)
    pictures = x.movedim(1, 0).flatten(1, 2)
    assert len(tall[0]) <= min(len(encoded(pictures, "WEBP", slow)) for slow in (False, True))
    sizes = ordinary_sizes(x, 256)
    assert sum(map(len, tall)) <= min(sizes[name] for name in ("tall PNG", "tall WEBP method 6"))
    prepared = compress.prepare(model, x)
    for parts, flag in ((short, None), (tall, True)):
        found = opened(tmp_path / "a", compress._pack(prepared, "train", [], parts, b""))
        assert found.description.model_dump(exclude_unset=True).get("tall") == flag
        assert torch.equal(found.images(None), x)


@pytest.mark.parametrize("count, slow", [(334, True), (335, False)])
def test_the_slow_method_is_for_few_images(count, slow, monkeypatch):
    tried = []
    monkeypatch.setattr(strips, "encoded", lambda *a: tried.append(a[2:] == (True,)) or b"P")
    strips.strips(torch.zeros(count, 1, 28, 28, dtype=torch.uint8))
    assert tried and any(tried) == slow


def test_a_tall_strip_fits_a_webp():
    for height in (1, 28, 127, 128, 255, 256, 5000, 16383):
        length = strips.tall_length(height)
        assert length * height <= strips.LONGEST and length >= strips.strip_length(height)
        assert length == strips.strip_length(height) or length >= 2 * strips.STRIP


@pytest.mark.parametrize("embed", [False, True])
def test_the_smaller_of_both_ways_is_taken(model, digits, embed):
    x = digits[compress.prepare(model, digits[:90]).promising]
    prepared = compress.prepare(model, x)
    flow = compress.choose(prepared, "train").data

    def plain(size: int) -> list[bytes]:
        """Strips with which an archive takes about so many bytes."""
        return [bytes(size - len(compress._pack(prepared, "train", [], [b""], b"")))]

    sizes = [(len(flow) + 20, True, True), (len(flow) - 20, True, False), (2000, False, False)]
    if embed:  # the model counts
        sizes = [(2 * len(flow), False, False)]
        assert compress.choose(prepared, "train", plain=plain(2 * len(flow))).coded > 0
    for size, tried, wins in sizes:
        said: list[str] = []
        result = compress.choose(
            prepared, "train", plain=plain(size), embed=embed, announce=said.append
        )
        assert (len(said), result.coded > 0) == (tried, wins)
        assert len(result.data) <= (size if not wins else min(len(flow), size)) + 10
    assert made(model, x[:3]).stored == 3  # all of them would be carriers


@pytest.fixture(scope="module")
def embedding(model, digits) -> bytes:
    """An archive with the model in it, and three streams."""
    return made(model, digits[:120], embed=True, stream=40).data


@pytest.mark.parametrize("kind", ["glow", "causal", "affine"])
def test_threads_and_streams_change_no_byte(kind, model, digits, causal, tmp_path):
    used, x, size, streams = {
        "glow": (model, digits[:120], 40, 3),
        "causal": (causal, faint(150), None, 2),
        "affine": (loaded(affine_flow((3, 8, 8), 32)), smooth(70, (3, 8, 8)) // 16 + 8, 35, 2),
    }[kind]
    archives = set()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        archives.add(made(used, x, stream=size).data)
    assert len(archives) == 1
    found = opened(tmp_path / "a", archives.pop())
    assert (found.num_bins, found.description.shape) == (used.flow.num_bins, used.flow.shape)
    assert len(found.streams) == streams
    assert any(stream.carriers for stream in found.streams) == (kind != "causal")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(found.images(used), x)


def test_an_archive_of_a_causal_flow_is_little_larger_than_its_streams(causal, tmp_path):
    x, path = faint(150), tmp_path / "a"
    found = opened(path, made(causal, x, "test").data)
    assert found.description.checked == 128
    assert len(found.parts[0]) == 2 * 4 + archive.IDENTITY.size
    assert path.stat().st_size - sum(map(len, found.parts)) < 180
    damaged = x.clone()
    damaged[149, 0, 0, 0] += 1
    found._decode = lambda images, *others: images.copy_(damaged)
    with pytest.raises(UserError, match="22 of 150 images do not match their checksums"):
        found.images(causal)


@pytest.mark.parametrize("kind", ["glow", "causal"])
def test_the_likelier_side_is_coded_with_a_bit_for_it(kind, model, digits, causal, tmp_path):
    used, x = (model, digits[:200].clone()) if kind == "glow" else (causal, faint(150))
    x[::2] = x[::2].flip(-1)
    x = torch.cat([x, images(7, x.shape[1:], used.flow.num_bins)])  # noise is stored
    both = dataclasses.replace(used, flow=copy.copy(used.flow))
    both.flow.sides = 2
    report, plain, prepared = Mock(), made(used, x), compress.prepare(both, x)
    result = made(both, x, progress=lambda: nullcontext(report))
    assert report.call_args.args[0] == len(x) - 7  # carriers and all
    found, other = opened(tmp_path / "a", result.data), opened(tmp_path / "b", plain.data)
    assert torch.equal(found.images(used), x) and torch.equal(other.images(used), x)
    assert 0.2 * len(x) < prepared.sides.sum() < 0.8 * len(x)
    assert len(found.parts[0]) - len(other.parts[0]) == len(x) // 8 + 1
    assert "sides" not in other.description.model_fields_set
    assert len(result.data) < len(plain.data)
    if kind == "causal":
        bits = [compress.prepare(used, side).bound for side in (x, x.flip(-1))]
        # They were scored in other batches, which changes the rounding of float32.
        torch.testing.assert_close(prepared.bound, torch.minimum(*bits) + 1, rtol=1e-5, atol=0)
        # The streams end with a word, and their probabilities are rounded.
        assert abs(result.net_bits - result.bound_bits) < 64 + 0.001 * result.bound_bits
    assert prepared.sides[-7:].any() and result.stored == 7
    stored = opened(tmp_path / "c", made(both, x[-7:]).data)
    assert torch.equal(stored.images(None), x[-7:]) and stored.description.sides == 1


def test_each_image_is_coded_in_its_likeliest_order(tmp_path):
    x = torch.cat([faint(100), images(9, (3, 4, 4))])  # noise is stored
    used = loaded(causal_flow((3, 4, 4), scale=0.1, x=faint(64), orders=8))
    alone = compress.prepare(used, x)
    used.flow.sides = 8
    prepared, result = compress.prepare(used, x), made(used, x)
    found = opened(tmp_path / "a", result.data)
    assert torch.equal(found.images(used), x) and result.stored == 9
    assert len(found.parts[0]) == 4 + archive.IDENTITY.size + -(-3 * len(x) // 8)
    assert prepared.sides.max() > 3 and prepared.sides.unique().numel() > 4
    assert (prepared.bound < alone.bound + 3 + 1e-3).all()
    assert abs(result.net_bits - result.bound_bits) < 64 + 0.001 * result.bound_bits


@pytest.mark.parametrize("torch_version, most", [("2.13.0+cpu", 45), ("2.15.0+cu132", 60)])
def test_an_image_alone_takes_few_bytes_more(torch_version, most, causal, tmp_path, monkeypatch):
    """Its likelihood and 64 bytes, with a short path of the model, and with versions of which the
    archive's dictionary knows the words. Others take some bytes more.
    """
    versions = {"flowtrain": "1.0.0", "torch": torch_version, "python": "3.11.7"}
    monkeypatch.setattr(archive, "versions", lambda: {**versions, "constriction": "0.5.0"})
    path = tmp_path / "a"
    found = opened(path, made(causal, faint(1), "test").data)
    named = len(found.description.model.path)
    assert path.stat().st_size - len(found.parts[-1]) <= most + named


def test_weights_that_are_not_finite_are_named(model, digits):
    for word in ("conditioner", "weight", "log_scale", "shift"):
        flow = copy.deepcopy(model.flow)
        everything = [*flow.named_parameters(), *flow.named_buffers()]
        next(p for name, p in everything if word in name).view(-1)[0] = math.nan
        with pytest.raises(FloatingPointError, match="not finite|singular"):
            compress.prepare(dataclasses.replace(model, flow=flow), digits[:10])


def moved(model: LoadedModel, by: float) -> LoadedModel:
    """The model with one number changed, and the same description."""
    flow = copy.deepcopy(model.flow)
    next(p for name, p in flow.named_parameters() if "conditioner" in name).view(-1)[0] += by
    return dataclasses.replace(model, flow=flow)


def test_numerics_that_do_not_reproduce_are_an_error(model, digits, tmp_path):
    found = opened(tmp_path / "a", made(model, digits[:100]).data)
    other = moved(model, 0.2)
    found.description.versions["torch"] = "0.1"
    with pytest.raises(UserError, match="other numbers here; written with torch 0.1, here"):
        found.images(other)
    known, found.probe = found.probe, coder_of(other.flow).probe()  # so that only the images tell
    with pytest.raises(UserError, match="does not reproduce"):
        found.images(other)
    damaged, found.probe = bytearray(found.parts[0]), known
    damaged[4 * 70] ^= 1
    found.parts[0] = bytes(damaged)
    with pytest.raises(UserError, match="1 of 100 images do not match their checksums"):
        found.images(model)


@pytest.mark.parametrize("codec", [Codec, DirectCodec])
def test_a_model_that_does_not_invert_is_refused(codec, causal, monkeypatch):
    monkeypatch.setattr(codec, "decode", lambda self, n, stack: torch.zeros(n, *self.shape).byte())
    used = causal if codec is DirectCodec else loaded(affine_flow((3, 4, 4)))
    with pytest.raises(UserError, match="do not reproduce on this machine"):
        made(used, faint(3))


def test_another_model_is_refused(model, embedding, tmp_path):
    assert model_hash(model) == model_hash(moved(model, 0.0)) != model_hash(moved(model, 0.001))
    found = opened(tmp_path / "a", embedding)
    assert found.load(None, False) is not None
    found.num_bins = 16
    with pytest.raises(UserError, match="its images are not of its model's shape and levels"):
        found.load(None, False)
    found.hash = "0" * archive.HASH_DIGITS
    with pytest.raises(UserError, match="is another one.*give its path by --model"):
        found.load(None, False)


def test_the_averaged_weights_alone_decode_too(model, digits, tmp_path):
    """As `flowtrain push` writes them."""
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(checkpoint_format.encoded(*model.alone()))
    found = opened(tmp_path / "a", made(model, digits[:100]).data)
    assert found.description.model.weights == "ema"
    assert found.load(str(alone), False).weights == "raw"


def test_a_folder_of_checkpoints_is_no_model_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _model_and_files([]) == (None, [])
    assert _model_and_files([".", "a"]) == (".", [Path("a")])


def test_files_come_back_in_a_process_with_other_threads(tmp_path):
    """From files to files; n_bits is of no concern to 17 levels in 0..255."""
    shutil.copytree(run(), tmp_path / "run")
    flags = ["--split", "train", "--num-images", 20, "--out", "x/one.fta"]
    said = quick("compress", "run", *flags, cwd=tmp_path).ok().out
    for words in ("the bound", "bytes as PNG", "bytes as WEBP", "the flow makes them larger"):
        assert words in said
    assert "without a model" in said
    quick("decompress", "x/one.fta", "--out", "a/b", cwd=tmp_path, OMP_NUM_THREADS="2").ok()
    assert len(tree(tmp_path / "a" / "b")) == 20
    shutil.copy(tmp_path / "a/b/train-00007.png", tmp_path / "single.png")
    words = ["run", "single.png", "a/b", "--embed", "--out", "two.fta", "--weights", "raw"]
    said = quick("compress", *words, "--num-images", 10, cwd=tmp_path).ok().out
    assert "with the model in it, the archive would be larger" in said
    shutil.rmtree(tmp_path / "run")
    quick("decompress", "two.fta", "--out", "c", cwd=tmp_path, OMP_NUM_THREADS="3").ok()
    assert tree(tmp_path / "c") == ["b", *(f"b/train-{i:05}.png" for i in range(9)), "single.png"]
    for name in tree(tmp_path / "c")[1:]:
        original = tmp_path / name if name == "single.png" else tmp_path / "a" / name
        assert (tmp_path / "c" / name).read_bytes() == original.read_bytes()


def test_coded_images_come_back_in_a_process_with_other_threads(digits, embedding, tmp_path):
    """By the model in the archive, or by the one that the output names."""
    shutil.copytree(run(), tmp_path / "run")
    flags = ["--split", "train", "--num-images", 900, "--out", "all.fta"]
    said = quick("compress", "run", *flags, cwd=tmp_path).ok().out
    for words in ("bits/dim, net", "the bound", "initial bits", "images/s", "about 0:"):
        assert words in said
    assert "keep a copy of run/checkpoints" in said
    (tmp_path / "embedded.fta").write_bytes(embedding)
    for name in ("embedded", "all"):
        quick("decompress", f"{name}.fta", "--out", name, cwd=tmp_path, OMP_NUM_THREADS="3").ok()
        for i, image in enumerate(to_8bit(digits[:120], 17)):
            found = np.asarray(Image.open(tmp_path / name / f"train-{i:05}.png"))
            assert np.array_equal(found, image[0].numpy())


def test_odd_names_and_copies_of_the_models_size_come_back(tmp_path):
    """The same rules on both sides: what can be packed can be unpacked."""
    for name in ("shot 12:30", "n" * 251, "a\\b", "c\udcff", " ", "ö/-"):
        picture(tmp_path / "in" / f"{name}.png")
    picture(tmp_path / "in" / "wide.png", (20, 10), "RGB", 200)
    out = "o" * 255
    said = quick("compress", run(), "in", "--fit", "--out", out, cwd=tmp_path).ok().out
    assert "packing copies of 8x8 L with 17 levels (data.resize: crop): decompress" in said
    quick("decompress", out, "--out", "out", cwd=tmp_path).ok()
    assert tree(tmp_path / "out" / "in") == tree(tmp_path / "in")
    found = np.asarray(Image.open(tmp_path / "out" / "in" / "wide.png"))
    assert found.shape == (8, 8) and (found == 13 * 255 // 16).all()
