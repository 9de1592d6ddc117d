"""Data that a command line names."""

import json
import re

import numpy as np
import pytest
from cli_helpers import quick, trained, tree
from coding_helpers import picture
from helpers import CPU, a_config, npz

from flowtrain.checkpoints.load import load_model
from flowtrain.data.named import section_named, undivided
from flowtrain.data.splits import DataSet, Split
from flowtrain.evaluation.score import mean_loss
from flowtrain.latents.encoding import read_images
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory


def named(name, own, shape=(3, 8, 8)):
    """The data set that a name stands for, beside a model's own."""
    own = a_config("nice", data=own).data
    config = a_config("nice", data=section_named(str(name), own, shape, "--data")).data
    return DataSet(config, undivided(config, own))


def pictures(folder, count, size=(8, 8)):
    """Pictures of one grey each: 10, 20, ..."""
    for i in range(count):
        picture(folder / f"{i}.png", size, "RGB", 10 * i + 10)
    return folder


def values(data, split="all"):
    return data.split(split).take(slice(None))[:, 0, 0, 0].tolist()


def test_what_fits_another_data_set_comes_from_the_models_own(tmp_path):
    options = {"n_bits": 5, "split_seed": 3, "root": str(tmp_path)}
    own = npz(tmp_path / "a.npz", **options, layout="nchw", flip=True, shape=(3, 8, 8))
    mnist = section_named("mnist", a_config("nice", data=own).data, (3, 8, 8), "--data")
    assert mnist["name"] == "mnist" and {key: mnist[key] for key in options} == options
    assert not {"path", "layout", "flip", "shift"} & set(mnist)
    x = np.zeros((4, 1, 4, 4), "u1")
    np.savez(tmp_path / "b.npz", x_train=x, x_test=x[:2])
    other = named(tmp_path / "b.npz", own)
    assert (other.config.layout, other.shape, other.num_bins) == ("nchw", (1, 4, 4), 32)
    assert not other.undivided
    folder = named(pictures(tmp_path / "p", 3), own, shape=(1, 6, 4))
    assert (folder.shape, folder.config.resize) == ((1, 6, 6), "crop")
    own = {"name": "folder", "path": str(tmp_path / "p"), "size": 8, "resize": "stretch"}
    assert named(pictures(tmp_path / "q", 3), own).config.resize == "stretch"


def test_all_images_of_a_folder_without_splits(tmp_path):
    own = npz(tmp_path / "a.npz")
    data = named(pictures(tmp_path / "p", 12, (20, 16)), own)
    assert data.undivided and data.shape == (3, 8, 8)
    assert values(data) == [10 * int(i) + 10 for i in sorted(map(str, range(12)))]
    assert values(named(pictures(tmp_path / "one", 1), own)) == [10]
    assert values(named(tmp_path / "p" / "4.png", own)) == [50]
    pictures(tmp_path / "p" / "train", 5)
    pictures(tmp_path / "p" / "test", 2)
    data = named(tmp_path / "p", own)
    assert not data.undivided and values(data, "test") == [10, 20]


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_all_images_of_arrays_without_splits(tmp_path, layout):
    pixels = np.arange(25, dtype="u1").reshape(25, 1, 1, 1) * np.ones((1, 3, 3, 3), "u1")
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(np.split(pixels, [20])):
        np.save(tmp_path / "parts" / f"x_train-{number}.npy", part)
    np.save(tmp_path / "b.npy", pixels)
    np.savez(tmp_path / "b.npz", x_train=pixels)
    own = npz(tmp_path / "a.npz", layout=layout, shape=(3, 8, 3), n_bits=7)
    for name in ("b.npz", "parts", "b.npy"):
        data = named(tmp_path / name, own)
        assert data.undivided and values(data) == [i // 2 for i in range(25)]
    np.save(tmp_path / "one.npy", pixels[9:10])
    assert values(named(tmp_path / "one.npy", own)) == [4]
    np.save(tmp_path / "points.npy", np.eye(2))
    points = named(tmp_path / "points.npy", {"name": "two_moons"}, (2, 1, 1))
    assert points.undivided and values(points) == [1, 0]


def test_the_models_own_data_keep_their_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((20, 8, 8, 3), "u1"))
    (tmp_path / "link.npz").symlink_to(tmp_path / "a.npz")
    own = {"name": "npz", "path": str(tmp_path / "a.npz")}
    for name in ("npz", tmp_path / "a.npz", tmp_path / "link.npz"):
        data = named(name, own)
        assert not data.undivided and len(data.split("test")) == 2


@pytest.mark.run
def test_evaluate_on_files_for_a_model_of_fewer_levels(tmp_path):
    """They are brought to its levels, as for `interpolate`."""
    model = load_model(str(trained()["glow"]), CPU)
    files = sorted(pictures(tmp_path / "p", 5).iterdir())
    done = quick("evaluate", trained()["glow"], "--data", "p", "--json", "-", cwd=tmp_path).ok()
    assert "p: images are brought to 1x8x8 with 17 levels" in done.err
    x = read_images(files, model, "--images").numpy()
    expected = mean_loss(model.flow, Split(x, np.arange(5)))
    assert json.loads(done.out)["bits_per_dim"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.run
def test_evaluate_on_other_data(tmp_path):
    """The result does not replace that on the model's own data, nor one on others of this name."""
    section = npz(tmp_path / "a.npz", shape=(8, 8, 3))
    run = RunDirectory(tmp_path / "r")
    fit(a_config("nice", data=section, train={"num_steps": 2}), run, CPU)

    def evaluate(*words):
        return quick("evaluate", "r", *words, cwd=tmp_path)

    pictures(tmp_path / "p", 12)
    (tmp_path / "p" / "bad.png").write_text("no picture")
    found = evaluate("--data", "p", "--scores", "s.csv", "--json", "r.json").ok()
    bad = f"--data: 1 of 13 images cannot be read and are left out:\n  {tmp_path}/p/bad.png: "
    assert bad in found.err
    evaluate("--data", "p/bad.png").failed(2, "p/bad.png cannot be read as an image")
    outcome = json.loads((tmp_path / "r.json").read_text())
    assert (outcome["dataset"], outcome["split"], outcome["num_images"]) == ("p", "all", 12)
    rows = (tmp_path / "s.csv").read_text().splitlines()
    # The file as such scores as it does in the folder (its noise is that of the first image).
    one = json.loads(evaluate("--data", "p/0.png", "--json", "-").ok().out)
    names = sorted(f"{i}.png" for i in range(12))
    assert [row.rpartition(",")[2] for row in rows] == ["file", *names] and one["num_images"] == 1
    assert one["bits_per_dim"] == pytest.approx(float(rows[1].split(",")[1]))
    reduced = evaluate("--data", "p", "--set", "data.size=6")  # keys of data still apply
    reduced.failed(2, "(3, 6, 6) with 256 levels cannot be evaluated", "(3, 8, 8)")

    before = tree(run.path)
    for path in ("b.npz", "c/b.npz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        npz(tmp_path / path, shape=(8, 8, 3), test=5)
        evaluate("--data", path).ok()
    new = sorted(set(tree(run.path)) - set(before))
    assert len(new) == 2 and all(re.fullmatch(r"evaluate-b-[0-9a-f]{8}-test.json", n) for n in new)

    (tmp_path / "a.npz").unlink()  # a path between image files needs no data
    words = ["--images", "p/0.png", "p/1.png", "--out", "i.png"]
    quick("interpolate", "r", *words, cwd=tmp_path).ok()
