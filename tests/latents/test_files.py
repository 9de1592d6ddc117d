"""Files of latents: they give every pixel back, and those of strangers are read with care."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from catalogue import CAUSAL, sets
from cli_helpers import quick, tree
from helpers import CPU, a_config, images, tiny_flow
from PIL import Image

from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.errors import RunError, UserError
from flowtrain.latents import encoding, files


@pytest.fixture(scope="module")
def model():
    return load_model("glow_digits", CPU)


def digits():
    return DataSet(a_config("glow").data).split("test")


def test_a_file_of_latents(model, tmp_path):
    path, x = tmp_path / "z.npz", digits().take(slice(0, 4))
    saved = files.Latents(model.flow.encode(x), ["a.png", "b/ö.jpg", "c", "d"])
    path.write_bytes(files.npz(saved, model))
    with np.load(path) as arrays:
        assert arrays["level1"].shape == (4, 2, 4, 4) and arrays["level2"].shape == (4, 8, 2, 2)
        assert arrays["level1"].dtype == np.float32 and int(arrays["format"]) == files.FORMAT
    found = files.read(path, model)
    assert torch.equal(found.z, saved.z) and found.names == saved.names
    other = load_model("glow_digits", CPU)
    with torch.no_grad():
        next(other.flow.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="is another one"):
        files.read(path, other)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": np.array("0123456789abcdef")}, "latents of the model 0123456789abcdef; "),
        ({"format": np.array(7)}, "latents in format 7, .* reads 1"),
        ({"format": np.array(1.5)}, "format has the type float64, expected whole numbers"),
        ({"names": np.array([], np.str_)}, "it has no latents"),
        ({"names": np.array(["a"])}, "level1 has the shape .*, expected 1 x 2 x 4 x 4"),
        ({"names": np.array(["../a", "b"])}, "names: '../a' is not a plain relative path"),
        ({"names": np.array([b"a", b"b"])}, r"names has the type \|S1, expected texts"),
        ({"level1": np.zeros((2, 4, 4, 4), np.float32)}, r"level1 has the shape \(2, 4, 4, 4\)"),
        ({"level1": np.zeros((2, 2, 4, 4), np.uint8)}, "level1 has the type uint8, expected real"),
        ({"level2": np.full((2, 8, 2, 2), np.nan)}, "level2 of a has a number that is not finite"),
        ({"level2": np.full((2, 8, 2, 2), 1e300)}, "level2 of a has a number that is not finite"),
    ],
)
def test_latents_from_strangers_are_read_with_care(model, tmp_path, change, said):
    path, z = tmp_path / "z.npz", torch.zeros(2, 64)
    with np.load(io.BytesIO(files.npz(files.Latents(z, ["a", "b"]), model))) as good:
        arrays = {**good, **change}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"z.npz: {said}"):
        files.read(path, model)


def test_images_that_do_not_come_back_and_names_of_pictures(monkeypatch):
    flow, x, done = tiny_flow(shape=(1, 4, 4), q=17), images(3, (1, 4, 4), 17), []
    monkeypatch.setattr(encoding, "sampling_batch_size", lambda flow: 2)
    z = encoding.encode(flow, x, lambda at, of: done.append((at, of)))
    assert z.dtype == torch.float32 and done == [(2, 3), (3, 3)]
    torch.testing.assert_close(z, flow.encode(x))
    assert encoding.difference(flow, x, x, ["a", "b", "c"]) == 0
    back = x.clone()
    back[1, 0, 2, 1:3] ^= 1
    with pytest.raises(RunError, match="b: 2 of 16 values are not restored.* 1 of 3 images"):
        encoding.difference(flow, x, back, ["a", "b", "c"])

    assert encoding.picture_names(["a.png", "b/c.JPG"]) == ["a.png", "b/c.JPG.png"]
    with pytest.raises(UserError, match="names: two files have the same name"):
        encoding.picture_names(["a", "a.png"])


@pytest.mark.parametrize("count, value", [(0, 0), (3, np.nan), (3, 1e300)])
def test_points_that_are_none_are_refused(count, value, tmp_path):
    np.save(tmp_path / "x.npy", np.full((count, 2), value, float))
    model = SimpleNamespace(flow=SimpleNamespace(shape=(2, 1, 1)))
    with pytest.raises(UserError, match="x.npy: it has no points, or one that is not finite"):
        encoding.read_points([tmp_path / "x.npy"], model)


NINE = ["--split", "test", "--num-images", 9]
SHORT = sets(train__num_steps=1, train__sample_every=9)
POINTS = ["--config", "realnvp_two_moons.yaml"]


@pytest.mark.run
@pytest.mark.parametrize("name", ["glow", "causal"])
def test_encode_and_decode_give_every_pixel_back(name, tmp_path):
    run = {"glow": "glow_digits", "causal": "r"}[name]
    if name == "causal":
        quick("train", *CAUSAL, *SHORT, "--run-dir", run, cwd=tmp_path).ok()
    done = quick("encode", run, *NINE, "--out", "z.npz", cwd=tmp_path)
    assert "decoding restores every pixel" in done.ok().out
    quick("decode", run, "z.npz", "--out", "out", cwd=tmp_path).ok()
    assert tree(tmp_path / "out") == [f"test-{i:05}.png" for i in range(9)]
    x = digits().take(slice(0, 9))
    for image, file in zip(x[:, 0], sorted((tmp_path / "out").iterdir()), strict=True):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), image.int().numpy() * 255 // 16)
    # The pictures are the same images again.
    quick("encode", run, "--images", "out", "--out", "again.npz", cwd=tmp_path).ok()
    quick("decode", run, "again.npz", "--out", "x.npz", cwd=tmp_path).ok()
    with np.load(tmp_path / "x.npz") as arrays, np.load(tmp_path / "z.npz") as first:
        assert torch.equal(torch.from_numpy(arrays["images"]).movedim(-1, 1), x)
        assert arrays["names"].tolist() == first["names"].tolist()
        assert int(arrays["levels"]) == 17
        assert first["classes"].tolist() == digits().labels[:9].tolist()


def test_unusable_files_of_folders_are_left_out(model, tmp_path, caplog):
    for name in ("a/x.png", "a/y.png", "b/x.png", "b/y.png", "b/z.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 255).save(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "bad.png").write_text("no picture")
    (b / "worse.png").symlink_to("nowhere")
    names, x = encoding.named_images([a, b], model, 10**30)  # as a command line may have it
    assert names == ["x.png", "y.png", "z.gif"] and (x == 16).all() and len(x) == 3
    same = f"--images {b}/x.png: it has the same name as {a}/x.png, and is left out, like 1 more"
    assert same in caplog.text and caplog.text.count("the same name") == 1
    assert "--images: 2 of 5 images cannot be read and are left out:" in caplog.text
    assert f"  {a}/bad.png: cannot be read as an image (cannot identify" in caplog.text
    assert f"  {b}/worse.png: there is no such image file" in caplog.text
    for paths in ([a, b / "x.png"], [a, b / "worse.png"]):
        with pytest.raises(UserError, match=str(paths[1])):
            encoding.named_images(paths, model, None)
    for good in (a / "x.png", a / "y.png"):
        good.unlink()
    with pytest.raises(UserError, match=rf"--images: no image can be read \({a}/bad.png: can"):
        encoding.named_images([a], model, None)


@pytest.mark.run
def test_points_come_back_but_for_rounding(tmp_path):
    quick("train", *POINTS, *SHORT, "--run-dir", "r", cwd=tmp_path).ok()
    done = quick("encode", "r", *NINE, "--out", "z.npz", cwd=tmp_path)
    assert "decoding restores the points within" in done.ok().out
    quick("decode", "r", "z.npz", "--out", "x.npz", cwd=tmp_path).ok()
    with np.load(tmp_path / "x.npz") as arrays:
        points = arrays["images"].reshape(9, 2)
    data = DataSet(load_model(str(tmp_path / "r"), CPU).config.data).split("test").take(slice(9))
    np.testing.assert_allclose(points, data.reshape(9, 2).numpy(), atol=1e-4)
    np.save(tmp_path / "own.npy", points)
    for file in ("own.npy", "x.npz"):
        quick("encode", "r", "--images", file, "--out", f"{file}.npz", cwd=tmp_path).ok()
        with np.load(tmp_path / f"{file}.npz") as arrays, np.load(tmp_path / "z.npz") as first:
            np.testing.assert_allclose(arrays["level1"], first["level1"], atol=1e-3)


@pytest.mark.run
def test_latents_are_not_written_where_they_do_not_give_the_images_back(tmp_path):
    first = "from flowtrain.flow.flow import Flow\nreal = Flow.decode\n"
    first += "Flow.decode = lambda self, *args: real(self, *args) ^ 1\n"
    command = ["encode", "glow_digits", "--split", "test", "--num-images", 3, "--out", "z.npz"]
    done = quick(*command, cwd=tmp_path, first=first)
    done.failed(1, "test-00000.png: 64 of 64 values are not restored", "nothing is written")
    assert tree(tmp_path) == []


@pytest.mark.run
def test_attributes_of_folders_tables_and_classes(tmp_path):
    """They are kept beside the model, and interpolate moves along them."""

    def run(command, *options):
        return quick(command, "glow_digits", *options, cwd=tmp_path).ok().out

    run("encode", "--split", "train", "--num-images", 80, "--out", "z.npz")
    run("decode", "z.npz", "--out", "x")
    ink = {p.name: float(np.asarray(Image.open(p)).mean()) for p in (tmp_path / "x").iterdir()}
    middle = np.median(list(ink.values()))
    rows = [f"{name},{int(value > middle)},{i % 2}" for i, (name, value) in enumerate(ink.items())]
    (tmp_path / "x" / "t.csv").write_text("\n".join(["file,thick,odd", *rows]))
    for name, value in ink.items():
        folder = tmp_path / ("v1.5 thick" if value > middle else "thin")
        folder.mkdir(exist_ok=True)
        os.link(tmp_path / "x" / name, folder / name)
    out = run("attributes", "--csv", "x/t.csv", "--orthogonal")
    assert "attributes.npz: thick, odd" in out and "0.5 is chance" in out
    folders = ["--positive", "v1.5 thick", "--negative", "thin", "--method", "logistic"]
    out = run("attributes", *folders, "--name", "heavy")
    assert "attributes.npz: thick, odd, heavy" in out
    assert "odd, heavy, v1.5 thick" in run("attributes", *folders)
    out = run("attributes", "--to-class", 9, "--from-class", 4)
    line = next(line.split() for line in out.splitlines() if "4-to-9" in line)
    assert float(line[1]) > 0.9 and float(line[4]) > 0.9 and line[-1] == "75"
    along = ["--along", "heavy", "--strength", 1.5, "--steps", 3, "--out", "i.png"]
    assert "less likely than 99% of the test images" in run("interpolate", *along, "--pairs", 2)
    out = run("interpolate", *along, "--image", f"x/{next(iter(ink))}")
    assert "wrote i.png: 1 path of 3 steps" in out
    # From the first test image of a class, 20 times as large, to another class.
    run("interpolate", "--from-class", 4, "--to-class", 9, "--pairs", 3, "--steps", 5, *along[-2:])
    with Image.open(tmp_path / "i.png") as picture:
        assert picture.size == (5 * 162 + 2, 3 * 162 + 2)
        first = np.asarray(picture.convert("L"))[2:162:20, 2:162:20]
    x = digits().take((digits().labels == 4).numpy())[0, 0].int()
    assert np.array_equal(first, x.numpy() * 255 // 16)
