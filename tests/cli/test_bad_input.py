"""What a user, a disk or a number can get wrong: one message with what, where and what to do; never
a traceback.
"""

import json
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch
import yaml
from catalogue import SHORT, SMALL, TINY_RUN, sets
from cli_helpers import (
    Forked,
    copy_of,
    flowtrain,
    last,
    left_overs,
    metrics,
    quick,
    trained,
    tree,
    within,
)
from PIL import Image
from run_files import train_row

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.cli.main import app
from flowtrain.compression import format as archive_format
from flowtrain.errors import RunError

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one of everything that can be wrong, and a good run."""
    here = tmp_path_factory.mktemp("bad")
    run = copy_of(trained()["glow"], here / "run")
    good = (run / "checkpoints" / "best.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    header = bytearray(good)
    header[100] ^= 1
    files = {
        "syntax.yaml": "model: {steps: 1\ntrain: [",
        "list.yaml": "- 1\n- 2\n",
        "section.yaml": "model: glow\ntrain: {num_steps: 1}\n",
        "no_length.yaml": "model: {levels: 2, steps: 1, width: 8}\n",
        "both.yaml": "train: {num_steps: 1, budget: 1min}\n",
        "text": "a file, not a folder\n",
        "text.npz": "not a zip archive",
        "picture.png": "not an image",
    }
    for name, text in files.items():
        (here / name).write_text(text)
    blobs = {
        "flipped": flipped,
        "header": header,
        "cut": good[:-1],
        "cut_header": good[:200],
        "empty": b"",
    }
    for name, blob in blobs.items():
        (here / f"{name}.safetensors").write_bytes(blob)
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    saved = checkpoint_format.read(last(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "FORMAT", 99)
        patch.setattr(checkpoint_format, "versions", lambda: {"flowtrain": "9.8.7"})
        meta = {
            key: value for key, value in saved.meta.items() if key not in ("format", "versions")
        }
        checkpoint_format.write(here / "future.safetensors", meta, saved.tensors)
    safetensors_of_others = {"weight": torch.zeros(3)}
    checkpoint_format.safetensors.torch.save_file(
        safetensors_of_others, here / "foreign.safetensors"
    )
    named = {**meta, "config": {**meta["config"], "model": {"name": "os.path"}}}
    checkpoint_format.write(here / "dotted.safetensors", named, saved.tensors)
    named = {
        **meta,
        "config": {**meta["config"], "data": {**meta["config"]["data"], "name": "os.path"}},
    }
    checkpoint_format.write(here / "dotted_data.safetensors", named, saved.tensors)
    (here / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (here / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, here / "evil_torch.pt")
    rng = np.random.default_rng(0)
    np.savez(here / "large.npz", x_train=rng.integers(0, 256, (20, 16, 16), dtype=np.uint8))
    np.savez(here / "same.npz", x_train=rng.integers(0, 256, (20, 8, 8), dtype=np.uint8))
    np.savez(here / "floats.npz", x_train=rng.random((20, 8, 8)))
    np.savez(here / "labels.npz", y_train=np.zeros(20))
    damaged = bytearray((here / "same.npz").read_bytes())
    damaged[700] ^= 255  # a pixel
    (here / "damaged.npz").write_bytes(damaged)
    (here / "cut.npz").write_bytes((here / "same.npz").read_bytes()[:-40])
    for name in ("pipe.npz", "pipe.yaml", "pipe.safetensors", "pipe.fta", "pipe.png"):
        os.mkfifo(here / name)
    (here / "pipe_run" / "checkpoints").mkdir(parents=True)
    (here / "pipe_run" / ".lock").touch()
    os.mkfifo(here / "pipe_run" / "checkpoints" / "last.safetensors")
    for name in ("empty", "grid.png", "runs_of_nobody"):
        (here / name).mkdir()
    raw = here / "mnist_damaged" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\0" * 100)
    (here / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), "u1")).save(here / "images" / f"{i}.png")
    return here


class Evil:
    """Loading it as a pickle makes a folder `executed` in the current folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def npz(path, *more):
    return ["train", *SMALL, *sets(data__name="npz", data__path=path, train__num_steps=2), *more]


# command line (train has the options of TINY_RUN): exit code, and what the message has to say
BAD_CONFIGURATIONS = [
    ("model.stepz=3", "model.stepz", "did you mean model.steps?", "3"),
    ("train.learning_rate=1", "train.learning_rate", "unknown key", "1"),
    ("train.steps=3", "train.steps", "did you mean train.num_steps?"),
    ("num_steps=3", "num_steps", "did you mean train.num_steps?"),
    (
        "model.coupling=afine",
        "model.coupling",
        "'affine', 'additive', 'spline' or 'mixture'",
        "'afine'",
    ),
    (
        "model.width=wide",
        "model.width: Input should be a valid integer",
        "; or Input should be a valid list",
        "'wide'",
    ),
    ("model.width=[8,-1]", "model.width", "greater than or equal to 1", "-1"),
    ("model.bins=300", "model.bins", "less than or equal to 256", "300"),
    ("model.width=0", "model.width", "greater than or equal to 1", "0"),
    ("model.width=2.5", "model.width", "integer", "2.5"),
    ("train.lr=fast", "train.lr", "number", "'fast'"),
    ("train.lr=-1", "train.lr", "greater than 0", "-1"),
    ("train.lr=.nan", "train.lr", "finite", "nan"),
    ("train.ema=1", "train.ema", "less than 1", "1"),
    ("train.budget=soon", "train.budget", "a duration such as 90s, 30min or 1.5h", "'soon'"),
    ("train.log_every=0", "train.log_every", "greater than or equal to 1"),
    ("data.validation=-1", "data.validation", "greater than or equal to 0", "-1"),
    (
        "data.validation=1e308",
        "data.validation",
        "cannot hold 1000000000",
        "of 1617 images out",
    ),
    ("data.validation=5000", "data.validation", "cannot hold 5000 of 1617 images out"),
    ("data.flip=maybe", "data.flip", "boolean", "'maybe'"),
    ("data.n_bits=5", "data.n_bits", "digits has 17 levels"),
    ("data.shift=8", "data.shift", "8"),
    ("data.path=x.npz", "data.path", "unknown key"),
    ("data=digits", "data:", "'digits'"),
    ("data.name=mnits", "data.name", "did you mean mnist?", "cifar10, cifar100, digits"),
    (
        "model.name=glo",
        "model.name",
        "did you mean glow?",
        "cnf, glow, iaf, maf, nice, planar, realnvp",
    ),
    ("model.name=no.such.module", "model.name", "no.such.module"),
    ("model.name=./mine.py", "model.name", "unknown name './mine.py'"),
    ("data.root=~nobody_of_this_name/x", "data.root", "~nobody_of_this_name"),
    ("seed=2024-13-45", "--set seed=2024-13-45"),
    (
        "model.levels=4",
        "8x8 can be squeezed 3 times (8 -> 4 -> 2 -> 1); levels: 4 needs a multiple of 16",
    ),
    ("dequantization.name=variatonal", "dequantization.name", "'variatonal'"),
    ("dequantization.alpha=0.5", "dequantization.alpha", "less than 0.5"),
    ("seed=-1", "seed", "-1"),
    ("train.precision=fp16", "train.precision", "'fp16'"),
    ("train", "--set train", "key=value"),
    ("=3", "--set =3", "key=value"),
    ("train.lr=[1", "--set train.lr=[1", "not YAML"),
    ("train.lr.peak=1", "train.lr"),
]

HUGE = str(10**10)
WIDE = sets(model__steps=16, model__width=512)  # a megabyte for each image

FOLDER_OF_IMAGES = sets(data__name="folder", data__path="images")

BAD_COMMANDS = [
    (
        ["train", *TINY_RUN, *WIDE, *sets(train__batch_size=2**20)],
        "train.batch_size: a step of 1,048,576 x 1 images",
        "GiB are available: at most",
        "use train.accumulate, or another train.memory",
    ),
    (
        ["train", *TINY_RUN, *sets(train__batch_size=4096, train__accumulate=2**20)],
        "train.accumulate: a step of 4,096 x 1,048,576 images",
        "GiB are available: at most",
    ),
    (
        ["train", *SMALL, *FOLDER_OF_IMAGES, *sets(data__size=2**16, train__num_steps=1)],
        "train.batch_size: a step of 32 x 1 images",
        "GiB are available",
    ),
    (
        ["train", "--dry-run", *sets(train__batch_size=2**20, train__accumulate=2**20)],
        "train.accumulate: a step of 1,048,576 x 1,048,576 images",
    ),
    (
        ["train", "--config", "glow_digit.yaml"],
        "--config glow_digit.yaml",
        "did you mean glow_digits.yaml?",
        "shipped:",
    ),
    (["train", "--config", "syntax.yaml"], "syntax.yaml", "cannot be read as YAML", "line 2"),
    (["train", "--config", "binary.yaml"], "binary.yaml", "cannot be read as YAML"),
    (["train", "--config", "list.yaml"], "list.yaml", "expected keys and values, got list"),
    (
        ["train", "--config", "section.yaml"],
        "section.yaml",
        "model: expected keys and values, got 'glow'",
    ),
    (
        ["train", "--config", "no_length.yaml"],
        "train.num_steps and train.budget",
        "neither is given",
    ),
    (["train", "--config", "both.yaml"], "train.num_steps and train.budget", "both are given"),
    (["train", "--config", "empty"], "--config empty"),
    (["train", *TINY_RUN, "--run-dir", "text"], "--run-dir text", "cannot be used"),
    (["train", *TINY_RUN, "--run-dir", "text/below"], "--run-dir text/below", "cannot be used"),
    (
        ["train", *TINY_RUN, "--resume", "nowhere", "--run-dir", "new"],
        "nowhere: no such checkpoint or run directory",
    ),
    (
        ["train", *TINY_RUN, "--init-from", "nowhere", "--run-dir", "new"],
        "nowhere: no such checkpoint",
    ),
    (
        ["train", *TINY_RUN, "--resume", "flipped.safetensors", "--run-dir", "new"],
        "flipped.safetensors: damaged",
    ),
    (["train", *TINY_RUN, "--device", "gpu"], "--device gpu", "auto, cpu, cuda, cuda:N or mps"),
    (
        ["train", *TINY_RUN, "--device", "cuda:x"],
        "--device cuda:x",
        "auto, cpu, cuda, cuda:N or mps",
    ),
    (["train", *TINY_RUN, "--device", "cuda:"], "--device cuda:", "auto, cpu, cuda, cuda:N or mps"),
    (["train", *TINY_RUN, "--device", "cuda:99"], "--device cuda:99", "CUDA device"),
    (["train", "--sett", "seed=1"], "No such option", "--set"),
    (npz("nowhere.npz"), "data.path: there is no file", "nowhere.npz"),
    (npz("text.npz"), "data.path", "text.npz is not an .npz file"),
    (npz("cut.npz"), "data.path", "cut.npz", "cut short"),
    (
        npz("damaged.npz"),
        "data.path: x_train in",
        "damaged.npz is damaged",
        "copy or save the file again",
    ),
    (npz("floats.npz"), "data.path", "float64, not uint8", ".astype(np.uint8)"),
    (npz("labels.npz"), "data.path", "has no array x_train (it has y_train)"),
    (npz("large.npz", "--set", "model.levels=5"), "16x16 can be squeezed 4 times", "levels: 5"),
    (["train", *TINY_RUN, *sets(data__name="npz")], "data.path", "missing"),
    (
        ["train", *TINY_RUN, *sets(data__name="folder", data__path="empty", data__size=8)],
        "data.path",
        "no image in",
    ),
    (
        ["train", *TINY_RUN, *sets(data__name="folder", data__path="text", data__size=8)],
        "data.path",
        "not a folder",
    ),
    (["evaluate"], "no MODEL given", "no run under runs/"),
    (["evaluate", "nowhere"], "nowhere: no such checkpoint or run directory"),
    (["evaluate", "empty"], "empty: has no checkpoint", "checkpoints/best.safetensors"),
    (["evaluate", "run", "--split", "dev"], "--split dev", "test, validation or train"),
    (["evaluate", "run", "--weights", "best"], "--weights best", "ema or raw"),
    (["evaluate", "run", "--num-images", "0"], "--num-images"),
    (["evaluate", "run", "--samples", "0"], "--samples"),
    (["evaluate", "run", "--samples", HUGE], f"--samples {HUGE}: the scores of 180 images need"),
    (
        ["evaluate", "run", *sets(data__validation=0), "--split", "validation"],
        "--split validation",
        "empty",
    ),
    (
        ["evaluate", "run", *sets(data__name="npz", data__path="large.npz")],
        "(1, 16, 16)",
        "(1, 8, 8)",
        "run/checkpoints",
    ),
    (
        ["evaluate", "run", *sets(data__name="npz", data__path="same.npz")],
        "256 levels",
        "17 levels",
    ),
    (["evaluate", "run", "--json", "text/a.json"], "text/a.json: cannot be written"),
    (["evaluate", "run", "--json", "empty"], "empty: cannot be written"),
    (["evaluate", "run", "--scores", "empty", "--json", "a.json"], "empty: cannot be written"),
    (["evaluate", "flipped.safetensors"], "flipped.safetensors: damaged", "checksum"),
    (["evaluate", "cut.safetensors"], "cut.safetensors: damaged", "checksum"),
    (["evaluate", "header.safetensors"], "header.safetensors", "damaged"),
    (["evaluate", "cut_header.safetensors"], "cut_header.safetensors: damaged", "header"),
    (["evaluate", "empty.safetensors"], "empty.safetensors: damaged", "header"),
    (["evaluate", "foreign.safetensors"], "foreign.safetensors"),
    (["evaluate", "text"], "text: not a flowtrain checkpoint"),
    (
        ["evaluate", "future.safetensors"],
        "checkpoint format 99 by flowtrain 9.8.7",
        "reads format 1",
        "train again",
    ),
    (["evaluate", "evil.pt"], "evil.pt: not a flowtrain checkpoint", "pickles are never loaded"),
    (["evaluate", "evil.safetensors"], "evil.safetensors: damaged"),
    (
        ["evaluate", "evil_torch.pt"],
        "evil_torch.pt: not a flowtrain checkpoint",
        "pickles are never loaded",
    ),
    (
        ["train", *TINY_RUN, "--init-from", "evil.pt", "--run-dir", "new"],
        "evil.pt: not a flowtrain checkpoint",
    ),
    (["sample", "dotted.safetensors"], "model.name is 'os.path'", "--trust-code"),
    (["sample", "dotted_data.safetensors"], "data.name is 'os.path'", "--trust-code"),
    (["sample", "run", "--out", "a.jpg"], "--out a.jpg", ".png or .npz"),
    (["sample", "run", "--out", "a"], "--out a:", ".png or .npz"),
    (["sample", "run", "--out", "grid.png"], "grid.png", "cannot be written"),
    (["sample", "run", "--out", "text/a.png"], "text/a.png: cannot be written"),
    (["sample", "run", "--num", "0"], "--num"),
    (["sample", "run", "--num", HUGE], f"--num {HUGE}: a picture of", "GiB are available: lower"),
    (["sample", "run", "--num", HUGE, "--out", "a.npz"], f"--num {HUGE}: 10,000,000,000 samples"),
    (["sample", "run", "--seed", str(2**63)], "--seed"),
    (["sample", "run", "--temperature", "-1"], "--temperature"),
    (["sample", "run", "--temperature", "nan"], "--temperature"),
    (["sample", "run", "--temperature", "hot"], "--temperature"),
    (["sample", "run", "--seed", "-1"], "--seed"),
    (["sample", "run", "--temperature", "inf"], "--temperature inf", "finite"),
    (
        ["interpolate", "run", *sets(data__name="npz", data__path="large.npz")],
        "(1, 16, 16)",
        "(1, 8, 8)",
    ),
    (["evaluate", "n" * 300], "n" * 300),
    (["interpolate", "run", "--steps", "1"], "--steps"),
    (["interpolate", "run", "--steps", HUGE], f"--steps {HUGE}: a picture of 4 paths of 10,00"),
    (
        ["interpolate", "run", "--pairs", HUGE, "--steps", "2"],
        "a picture of 10,000,000,000 paths of 2 images",
    ),
    (["interpolate", "run", "--pairs", "91"], "--pairs 91", "180 images"),
    (["interpolate", "run", "--out", "a.npz"], "--out a.npz", ".png or .gif"),
    (
        ["interpolate", "run", "--images", "nowhere.png", "picture.png"],
        "nowhere.png: there is no such image file",
    ),
    (
        ["interpolate", "run", "--images", "picture.png", "picture.png"],
        "picture.png cannot be read as an image",
    ),
    (["interpolate", "run", "--images", "picture.png"], "--images"),
    (["train", "--config", "pipe.yaml"], "--config pipe.yaml: not a regular file"),
    (["train", "--config", "/dev/zero"], "--config /dev/zero: not a regular file"),
    (
        ["train", *TINY_RUN, "--resume", "pipe.safetensors", "--run-dir", "new"],
        "pipe.safetensors: cannot be read: not a regular file",
    ),
    (["train", *TINY_RUN, "--run-dir", "pipe_run"], "last.safetensors", "not a regular file"),
    (
        ["train", *TINY_RUN, "--init-from", "/dev/random", "--run-dir", "new"],
        "/dev/random: cannot be read: not a regular file",
    ),
    (npz("pipe.npz"), "data.path", "pipe.npz cannot be opened", "not a regular file"),
    (["evaluate", "pipe.safetensors"], "pipe.safetensors: cannot be read: not a regular file"),
    (["evaluate", "/dev/zero"], "/dev/zero: cannot be read: not a regular file"),
    (["evaluate", "run", "--dataset", "pipe.npz"], "pipe.npz cannot be opened"),
    (["decompress", "pipe.fta", "--out", "x"], "pipe.fta: cannot be read: not a regular file"),
    (["decompress", "/dev/zero", "--out", "x"], "/dev/zero: cannot be read: not a regular file"),
    (["compress", "run", "pipe.png", "--out", "x"], "pipe.png", "not a regular file"),
    (
        ["interpolate", "run", "--images", "pipe.png", "pipe.png"],
        "pipe.png cannot be read as an image",
        "not a regular file",
    ),
    (["compress", "pipe.safetensors", "picture.png", "--out", "x"], "not a regular file"),
]


def case_id(case):
    words = case if isinstance(case, str) else " ".join(map(str, case))
    return words.replace(" ".join(TINY_RUN), "").replace(" ".join(SMALL), "")[:60]


@pytest.mark.parametrize(
    "override, fragments", [(c[0], c[1:]) for c in BAD_CONFIGURATIONS], ids=case_id
)
def test_bad_configuration(override, fragments, folder):
    before = tree(folder)
    options = [] if override.startswith("model.name") else TINY_RUN
    quick("train", *options, "--set", override, cwd=folder).failed(2, *fragments)
    forget(folder, "runs")
    assert tree(folder) == before


@pytest.mark.parametrize("command, fragments", [(c[0], c[1:]) for c in BAD_COMMANDS], ids=case_id)
def test_bad_input(command, fragments, folder):
    before = tree(folder)
    quick(*command, cwd=folder).failed(2, *fragments)
    forget(folder, "runs", "new", "a.json")
    assert tree(folder) == before  # nothing written, nothing executed, nothing lost


def forget(folder, *names):
    """Folders that a refused start may leave: they hold a lock at most."""
    for name in names:
        assert not list((folder / name).rglob("*.safetensors"))
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).is_file():
            (folder / name).unlink()


def test_as_a_user_would_see_it(folder):
    """The table runs forked; this one does not."""
    done = flowtrain("train", *sets(model__stepz=3), cwd=folder).failed(2)
    assert done.out == ""
    assert done.err.startswith("flowtrain: ") and done.err.count("\n") == 1
    assert done.err.rstrip().endswith(
        "model.stepz: unknown key; did you mean model.steps? (value 3)"
    )


def test_a_name_that_is_no_text(tmp_path):
    """As a run directory it is refused; the files of such a name can be read, and are printed."""
    name = os.fsdecode(b"bad\xff")
    flowtrain("train", *TINY_RUN, "--run-dir", name, cwd=tmp_path).failed(
        2, "--run-dir bad?: its name is not UTF-8"
    )
    assert tree(tmp_path) == []
    copy_of(trained()["glow"], tmp_path / name)
    done = flowtrain("evaluate", name, "--num-images", 2, cwd=tmp_path).ok()
    assert "bad\\udcff" in done.out


def test_several_mistakes_are_told_at_once(folder):
    done = quick("train", *sets(model__stepz=3, train__lr="fast", nonsense=1), cwd=folder)
    done.failed(2, "model.stepz", "train.lr", "nonsense")


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
@pytest.mark.parametrize(
    "command",
    [["train", *TINY_RUN], ["evaluate", "run"], ["sample", "run"], ["interpolate", "run"]],
)
def test_no_cuda(command, folder):
    quick(*command, "--device", "cuda", cwd=folder).failed(
        2, "--device cuda", "no CUDA device", "--device cpu"
    )


def test_mnist_without_a_network(folder):
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        proxy = dict.fromkeys(
            ("http_proxy", "https_proxy"), f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        done = quick(
            "train", *SMALL, *sets(data__name="mnist", data__root="dl"), cwd=folder, **proxy
        )
    wanted = (
        "data.root: MNIST is not in",
        "could not be downloaded",
        "train-images-idx3-ubyte.gz",
        "https://",
    )
    done.failed(2, *wanted, str(folder / "dl" / "MNIST" / "raw"))
    forget(folder, "runs", "dl")


def test_damaged_mnist(folder):
    done = quick("train", *SMALL, *sets(data__name="mnist", data__root="mnist_damaged"), cwd=folder)
    done.failed(
        2, "data.root: the MNIST files in", "are damaged", "100 bytes, not 47040016", "Delete"
    )
    forget(folder, "runs")


def test_the_pickles_above_are_malicious(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pickle.loads((folder / "evil.pt").read_bytes())
    assert (folder / "executed").is_dir()
    (folder / "executed").rmdir()


def test_weights_that_were_not_kept(tmp_path):
    quick("train", *TINY_RUN, *sets(train__ema=0), cwd=tmp_path).ok()
    quick("evaluate", "--weights", "ema", cwd=tmp_path).failed(
        2, "--weights ema", "train.ema was 0", "--weights raw"
    )
    assert '"raw"' in quick("evaluate", "--json", "-", cwd=tmp_path).ok().out


def test_a_damaged_checkpoint_does_not_restart_the_run(tmp_path):
    """Resuming says which file; it neither starts over nor removes anything."""
    run = copy_of(trained()["glow"], tmp_path / "runs" / "glow_digits")
    data = bytearray(last(run).read_bytes())
    data[-1] ^= 1
    last(run).write_bytes(data)
    before = tree(run)
    quick("train", *TINY_RUN, cwd=tmp_path).failed(
        2, "runs/glow_digits/checkpoints/last.safetensors: damaged"
    )
    assert tree(run) == before
    (run / "checkpoints").rename(run / "aside")
    (run / "checkpoints").write_text("in the way")
    quick("train", *TINY_RUN, cwd=tmp_path).failed(2, "--run-dir", "checkpoints is not a folder")


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # room: the longest file that the disk takes, beyond a checkpoint's bytes
    "room, what, options",
    [
        (-1000, "last.safetensors", []),
        (6000, "", sets(train__sample_every=1)),  # TensorBoard's file outgrows that
        (2000, "metrics.jsonl", sets(train__sample_every=5000, train__validate_every=5000)),
    ],
    ids=["checkpoint", "tensorboard", "metrics"],
)
def test_no_space_left(room, what, options, tmp_path):
    """Exit 1, with a message; what was saved before is whole, and no half-written file stays."""
    command = [
        "train",
        *SMALL,
        *sets(train__checkpoint_every=2, train__log_every=5, train__num_steps=400),
        *options,
    ]
    first = Forked(command, cwd=tmp_path)
    run = tmp_path / "runs" / "glow_digits"
    with within(60, "a checkpoint") as expired:
        while not list((run / "checkpoints").glob("step-*")):
            expired()
    first.process.terminate()
    assert first.result().code == 143
    limit = last(run).stat().st_size + room
    step = checkpoint_format.read(last(run)).meta["step"]
    if what == "metrics.jsonl":  # nearly as long as it may be
        row = json.dumps(train_row(1, 4.0)) + "\n"
        (run / "metrics.jsonl").write_text(row * ((limit - 10) // len(row)))
    failed = quick(*command, cwd=tmp_path, file_limit=limit)
    failed.failed(1, "runs/glow_digits", what, "cannot be written", "File too large")
    assert checkpoint_format.read(last(run)).meta["step"] >= step
    assert left_overs(run) == []


def test_no_space_left_for_an_output(tmp_path):
    args = [trained()["glow"], "--num", 2000, "--out", "a.npz"]
    quick("sample", *args, cwd=tmp_path, file_limit=5000).failed(
        1, "a.npz: cannot be written", "File too large"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"a.safetensors: cannot be written: No space left on device"
    ):
        checkpoint_format.write(path, {"step": 2}, {"model.w": torch.zeros(3)})
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# --- code that a checkpoint names -----------------------------------------------------------------

# Every command that takes a model, a run or a checkpoint. `crafted` is a run directory.
READING = [
    ["train", *TINY_RUN, "--run-dir", "crafted"],
    ["train", *TINY_RUN, "--run-dir", "new", "--resume", "crafted"],
    ["train", *TINY_RUN, "--run-dir", "new", "--resume", "crafted/checkpoints/last.safetensors"],
    ["train", *TINY_RUN, "--run-dir", "new", "--init-from", "crafted"],
    ["train", *TINY_RUN, "--dry-run", "--run-dir", "crafted"],
    ["evaluate", "crafted"],
    ["ood", "crafted", "--out", "noise"],
    ["doctor", "crafted"],
    ["sample", "crafted"],
    ["interpolate", "crafted"],
    ["compress", "crafted", "--split", "test", "--out", "new.fta"],
    ["decompress", "embedded.fta", "--out", "new"],
    ["decompress", "elsewhere.fta", "--out", "new"],
    ["decompress", "elsewhere.fta", "--out", "new", "--model", "crafted"],
    ["compare", "crafted", "crafted"],
    ["report", "crafted"],
]


def test_every_command_is_among_those_that_read_a_checkpoint():
    assert {command[0] for command in READING} == {
        str(each.name or each.callback.__name__) for each in app.registered_commands
    }


def craft(folder, section, name):
    """Makes a run whose configuration names a module that leaves a file when it is imported."""
    for file in ("intruder.py", "package/__init__.py", "package/intruder.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("open('executed', 'w')")
    run = copy_of(trained()["glow"], folder / "crafted")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section]["name"] = name
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for path in (run / "checkpoints").iterdir():
        saved = checkpoint_format.read(path)
        path.unlink()
        checkpoint_format.write(path, {**saved.meta, "config": config}, saved.tensors)
    described = {"shape": [1, 8, 8], "levels": 17, "names": ["a.png"], "probe": 0, "versions": {}}
    described["streams"] = [{"images": 1, "carriers": 0, "carrier_bytes": 0, "chunks": [1]}]
    described["versions"]["torch"] = torch.__version__
    parts = [bytes(4), bytes(8)]
    for archive, model in (("embedded", [last(run).read_bytes()]), ("elsewhere", [])):
        of = {"hash": "0" * 64, "path": str(last(run)), "weights": "raw", "embedded": bool(model)}
        packed = archive_format.pack({**described, "model": of}, [*parts, *model])
        (folder / f"{archive}.fta").write_bytes(packed)


@pytest.mark.parametrize("section", ["model", "data"])
@pytest.mark.parametrize("name", ["intruder", "package.intruder"])
def test_no_command_imports_what_a_checkpoint_names(section, name, tmp_path):
    craft(tmp_path, section, name)
    for command in READING:
        done = quick(*command, cwd=tmp_path)
        if {"--init-from", "--dry-run", "compare"} & set(command):  # they read no configuration
            done.ok()
        else:
            done.failed(2, f"{section}.name", name)
        assert not (tmp_path / "executed").exists(), command
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    quick("evaluate", "crafted", "--trust-code", cwd=tmp_path)
    assert (tmp_path / "executed").exists() == ("." in name)


# --- numbers that are not finite ------------------------------------------------------------------


def test_a_rate_that_is_far_too_high(tmp_path):
    """It goes back, names a layer, lowers the rate, and in the end stops with evidence and finite
    weights.
    """
    often = sets(train__checkpoint_every=100, train__log_every=1, train__validate_every=1)
    done = quick(
        "train", *TINY_RUN, *often, *sets(train__lr=1e30, train__max_non_finite=3), cwd=tmp_path
    )
    done.failed(
        1,
        "4 steps",
        "train.max_non_finite: 3",
        "bijection.",
        "runs/glow_digits/non-finite-4.json",
        "train.lr",
    )
    assert "back at step 0, with the learning rate times 0.5" in done.out
    assert done.out.count("first not finite: ") == 4
    run = tmp_path / "runs" / "glow_digits"
    evidence = [json.loads((run / f"non-finite-{n}.json").read_text()) for n in (1, 2, 3, 4)]
    assert [e["lr"] for e in evidence] == pytest.approx(
        [evidence[0]["lr"] / 2**n for n in range(4)]
    )
    assert all(e["first_non_finite"].split()[-1].startswith("bijection.") for e in evidence)
    assert all(
        e["loss"] in ("nan", "inf", "-inf") or e["grad_norm"] in ("nan", "inf") for e in evidence
    )
    for path in (run / "checkpoints").iterdir():
        tensors = checkpoint_format.read(path).tensors
        assert [name for name, t in tensors.items() if not torch.isfinite(t.float()).all()] == []
    steps = [(row["split"], row["step"]) for row in metrics(run)]
    assert len(steps) == len(set(steps))


def test_weights_that_overflow_are_not_saved(tmp_path):
    """The gradient is finite, and the step takes the weights to infinity, just before a
    checkpoint.
    """
    options = sets(
        train__lr=1e39, train__warmup_steps=0, train__checkpoint_every=1, train__max_non_finite=0
    )
    quick("train", *TINY_RUN, *options, cwd=tmp_path).failed(
        1, "1 steps not finite", "parameter bijection."
    )
    saved = checkpoint_format.read(
        tmp_path / "runs" / "glow_digits" / "checkpoints" / "last.safetensors"
    )
    assert saved.meta["step"] == 0
    assert all(torch.isfinite(t.float()).all() for t in saved.tensors.values())


def test_a_moment_of_too_high_a_rate_is_survived(tmp_path):
    """After the first event, half the rate is enough, and the run ends well; its best checkpoint is
    not lost.
    """
    code = """
import torch
from flowtrain.bijections import DiagonalAffine, Flatten, Sequential
from flowtrain.bijections.base import Bijection

class Once(Bijection):
    calls = 0

    def forward(self, x, context=None):
        self.calls += torch.is_grad_enabled()
        bad = self.calls == 8 and torch.is_grad_enabled()
        return x * (torch.nan if bad else 1.0), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z, z.new_zeros(len(z))

def build(shape):
    return Sequential(Flatten(shape), Once(), DiagonalAffine((64,)))
"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "once.py").write_text(code)
    options = [
        *sets(model__name="mine.once"),
        *SHORT,
        *sets(train__log_every=1, train__warmup_steps=0),
    ]
    options += sets(train__schedule="constant", train__validate_every=1)
    done = quick("train", *options, "--run-dir", "r", cwd=tmp_path).ok()
    assert (
        "step 7: loss nan" in done.out
        and "back at step 5, with the learning rate times 0.5" in done.out
    )
    rows = [row for row in metrics(tmp_path / "r") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["lr"] for row in rows] == [2e-3] * 5 + [1e-3] * 15
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["non_finite_steps"] == 1
    assert (tmp_path / "r" / "non-finite-1.json").exists()
    best = [
        float(words[3]) for words in map(str.split, done.out.splitlines()) if words[-1] == "(best)"
    ]
    assert best == sorted(best, reverse=True) and len(best) > 7  # also across the way back
