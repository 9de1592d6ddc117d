"""Wrong input to every command, from one table: one message of at most six lines with what, where
and what to do, exit code 2, and nothing written. Never a traceback.
"""

import os
import pickle
import shlex
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import SMALL, TINY_RUN, sets
from cli_helpers import copy_of, flowtrain, last, quick, trained, tree
from coding_helpers import foreign_archive, picture, stored
from helpers import npz
from PIL import Image
from typer.main import get_command

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.main import app
from flowtrain.latents import files

CUDA = torch.cuda.is_available()
# Root reads and writes everything. Without this capability it obeys the permissions of its files.
OBEDIENT = """
import ctypes
drop = getattr(ctypes.CDLL(None), "capset", None)
if drop is not None:
    drop((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""


def make(here: Path) -> None:
    """One of everything that can be wrong, and runs that are right: of digits, of classes, of
    points, and of images given a part of them.
    """
    run = copy_of(trained()["glow"], here / "run")
    make_data(here)
    for name, more in (
        ("classes", [*TINY_RUN, *sets(model__classes=10)]),
        ("points", ["--config", "realnvp_two_moons.yaml"]),
        (
            "given",
            [
                *TINY_RUN,
                *sets(data__name="npz", data__path=here / "colour.npz"),
                *sets(model__context="downsample"),
            ],
        ),
    ):
        options = [*more, *sets(train__num_steps=1, train__sample_every=9), "--run-dir", name]
        quick("train", *options, cwd=here).ok()
    good = (run / "checkpoints" / "best.safetensors").read_bytes()
    saved = checkpoint_format.read(last(run))
    texts = {
        "syntax.yaml": "model: {steps: 1\ntrain: [",
        "list.yaml": "- 1\n- 2\n",
        "section.yaml": "model: glow\ntrain: {num_steps: 1}\n",
        "no_length.yaml": "train: {budget: null}\n",
        "both.yaml": "train: {num_steps: 1, budget: 1min}\n",
        "text": "a file, not a folder\n",
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    for suffix in ("npz", "png", "fta", "safetensors"):
        (here / f"text.{suffix}").write_text("a text, and nothing else\n")
        (here / f"empty.{suffix}").touch()
    blobs = {
        "binary.yaml": b"\xff\xfe\x00model",
        "flipped.safetensors": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "header.safetensors": good[:100] + bytes([good[100] ^ 1]) + good[101:],
        "cut.safetensors": good[:-1],
        "cut_header.safetensors": good[:200],
        "evil.pt": pickle.dumps(Evil()),
        "evil.safetensors": pickle.dumps(Evil()),
    }
    for name, blob in blobs.items():
        (here / name).write_bytes(blob)
    torch.save({"model": Evil()}, here / "evil_torch.pt")
    torch_tensors = {"weight": torch.zeros(3)}
    checkpoint_format.safetensors.torch.save_file(torch_tensors, here / "foreign.safetensors")
    meta = {key: value for key, value in saved.meta.items() if key not in ("format", "versions")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "FORMAT", 99)
        patch.setattr(checkpoint_format, "versions", lambda: {"flowtrain": "9.8.7"})
        checkpoint_format.write(here / "future.safetensors", meta, saved.tensors)
    for section in ("model", "data"):
        named = {**meta["config"], section: {**meta["config"][section], "name": "os.path"}}
        path = here / f"dotted_{section}.safetensors"
        checkpoint_format.write(path, {**meta, "config": named}, saved.tensors)
    make_pictures(here)
    make_archives(here, run)
    make_latents(here, run)
    for suffix in ("npz", "yaml", "safetensors", "fta", "png"):
        (here / f"locked.{suffix}").touch(mode=0)
    for suffix in ("npz", "npy", "yaml", "safetensors", "fta", "png", "gif", "html", "json", "csv"):
        os.mkfifo(here / f"pipe.{suffix}")
        (here / f"grid.{suffix}").mkdir()
    (here / "pipe_run" / "checkpoints").mkdir(parents=True)
    (here / "pipe_run" / ".lock").touch()
    os.mkfifo(here / "pipe_run" / "checkpoints" / "last.safetensors")
    for name in ("empty", "locked"):
        (here / name).mkdir()
    (here / "locked").chmod(0o555)
    for name, text in (("no_config", None), ("bad_config", "a: ["), ("bad_summary", "")):
        copied = copy_of(run, here / name)
        path = copied / ("summary.json" if name == "bad_summary" else "config.yaml")
        path.unlink() if text is None else path.write_text(text)


def make_data(here: Path) -> None:
    """Files and folders of images for training and evaluation."""
    rng = np.random.default_rng(0)
    npz(here / "large.npz", shape=(16, 16))
    npz(here / "same.npz", shape=(8, 8))
    npz(here / "colour.npz", shape=(8, 8, 3))
    np.savez(here / "floats.npz", x_train=rng.random((20, 8, 8)))
    np.savez(here / "labels.npz", y_train=np.zeros(20))
    np.save(here / "objects.npy", np.array([Evil()], object))
    np.save(here / "cut.npy", np.zeros((20, 8, 8), np.uint8))
    os.truncate(here / "cut.npy", 128 + 50)
    (here / "parts").mkdir()
    np.save(here / "parts" / "x_train-0.npy", np.zeros((20, 8, 8, 3), np.uint8))
    np.save(here / "parts" / "x_train-1.npy", np.zeros((20, 8, 8), np.uint8))
    data = (here / "same.npz").read_bytes()
    (here / "damaged.npz").write_bytes(data[:700] + bytes([data[700] ^ 255]) + data[701:])
    (here / "cut.npz").write_bytes(data[:-40])
    for i in range(8):
        picture(here / "images" / f"{i}.png", mode="RGB", value=i)
    raw = here / "mnist_damaged" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\0" * 100)


def make_pictures(here: Path) -> None:
    """Images that an archive takes or refuses."""
    picture(here / "good.png")
    picture(here / "sub" / "good.png")
    picture(here / "wide.png", (9, 8))
    picture(here / "rgb.png", mode="RGB")
    picture(here / "deep.png", value=100)
    Image.new("L", (8, 8)).save(here / "clear.png", transparency=0)
    picture(here / "both" / "a.png.png")
    (here / "a.png").mkdir()
    picture(here / "a.png" / "b.png")
    picture(here / "sub" / "a.png")
    picture(here / f"{'n' * 250}.jpg")
    picture(here / "taken" / "a.png")
    picture(here / "done" / "grid.png")
    for name, value in (("black", 0), ("white", 255), ("grey", 127)):
        Image.new("L", (8, 8), value).save(here / f"{name}.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 6, 6))
    mask.save(here / "mask.png")


def make_latents(here: Path, run: Path) -> None:
    """Files of latents of a run, and tables of attributes."""
    model = load_model(str(run), torch.device("cpu"))
    z = torch.zeros(1, model.flow.latent_dims)
    for name, image, values in (
        ("z", "a.png", z),
        ("up", "../up.png", z),
        ("nan", "a.png", z * torch.nan),
    ):
        latents = files.Latents(values, [image])
        (here / f"{name}.npz").write_bytes(files.npz(latents, model))
    tables = {
        "empty": "",
        "header": "file,x\n",
        "values": "file,x\ngood.png,1\ngood.png,2\n",
        "short": "file,x\ngood.png\n",
        "gone": "file,x\ngone.png,1\n",
    }
    for name, text in tables.items():
        (here / f"{name}.csv").write_text(text)


def make_archives(here: Path, run: Path) -> None:
    """Archives without a model, and archives of a model that is not there."""
    good = stored()
    archives = {
        "good": good,
        "cut": good[:-1],
        "flip": good[:100] + bytes([good[100] ^ 4]) + good[101:],
        "evil": stored(names=["../up.png", "b.png"]),
        "escape": stored(names="../../x", count=2),
        "fields": stored(levels="many"),
        "strips": stored(strip=b"no picture"),
        "below": stored(names=["good.png/a.png", "b.png"]),
    }
    for name, path in (("gone", "gone/best.safetensors"), ("foreign", str(last(run)))):
        archives[name] = foreign_archive(path)
    for name, data in archives.items():
        (here / f"{name}.fta").write_bytes(data)


class Evil:
    """Loading it as a pickle makes a folder `executed` in the current folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


NUMBER = "Input should be a valid integer"
HUGE = 10**10
AT_LEAST_1 = "greater than or equal to 1"
FOLDER, PIPE = "is a folder", "not a regular file"
DENIED, NO_FOLDER = "there is no permission to write into", "is not a folder"
NO_MODEL, NOT_ONE = "no such checkpoint or run directory", "not a flowtrain checkpoint"
OTHER_SHAPE = ("(1, 16, 16) with 256 levels", "(1, 8, 8) with 17 levels", "run/checkpoints")


# A value of `--set`, and what the message has to say.
CONFIGURATIONS = [
    ("model.stepz=3", "model.stepz", "did you mean model.steps?", "3"),
    ("train.learning_rate=1", "train.learning_rate", "unknown key", "1"),
    ("train.steps=3", "train.steps", "did you mean train.num_steps?"),
    ("num_steps=3", "num_steps", "did you mean train.num_steps?"),
    ("model.coupling=afine", "'affine', 'additive', 'spline' or 'mixture'", "'afine'"),
    ("model.width=wide", "model.width: Input should be a valid integer", "'wide'"),
    ("model.width=[8,-1]", "model.width", AT_LEAST_1, "-1"),
    ("model.width=0", "model.width", AT_LEAST_1, "0"),
    ("model.width=2.5", "model.width", "integer", "2.5"),
    ("model.bins=300", "model.bins", "less than or equal to 256", "300"),
    ("model.classes=5", "model.classes: 5", "labels 0..9"),
    ("model.context=blue", "'none', 'downsample' or 'grey'", "'blue'"),
    ("model.context=grey", "model.context: grey needs images with 3 channels, and these have 1"),
    ("model.context_factor=3", "model.context_factor", "2 or 4", "3"),
    ("model.levels=4", "8x8 can be squeezed 3 times (8 -> 4 -> 2 -> 1)", "a multiple of 16"),
    ("train.lr=fast", "train.lr", "number", "'fast'"),
    ("train.lr=-1", "train.lr", "greater than 0", "-1"),
    ("train.lr=.nan", "train.lr", "finite", "nan"),
    ("train.lr=1e400", "train.lr", "finite"),
    ("train.lr.peak=1", "train.lr"),
    ("train.lr=[1", "--set train.lr=[1", "not YAML"),
    ("train.lr=&a [*a]", "not YAML", "contains itself"),
    ("train.lr=!!python/object/apply:os.mkdir [executed]", "not YAML", "tag"),
    ("train.ema=1", "train.ema", "less than 1", "1"),
    ("train.ema=-.inf", "train.ema", "finite"),
    ("train.budget=soon", "train.budget", "a duration such as 90s, 30min or 1.5h", "'soon'"),
    ("train.budget=nan", "train.budget", "a duration"),
    ("train.budget=1e400h", "train.budget", "finite"),
    ("train.log_every=0", "train.log_every", AT_LEAST_1),
    ("train.num_steps=nan", "train.num_steps", "integer"),
    ("train.batch_size=1e30", "train.batch_size", "integer"),
    ("train.batch_size=true", "train.batch_size", "not a boolean"),
    ("train.precision=fp16", "train.precision", "'fp16'"),
    (
        "train.logger=tensorbord",
        "train.logger",
        "'tensorboard' or 'wandb'",
        "'tensorbord'",
    ),
    ("train.logger=[wandb,wandb]", "train.logger: one of them is named twice"),
    ("train.logger=3", "train.logger", "a valid list", "3"),
    ("train.logger=[tensorboard,1]", "train.logger", "'tensorboard' or 'wandb'", "1"),
    ("train.%FF=1", "train", "unicode"),
    ("train", "--set train", "key=value"),
    ("=3", "--set =3", "key=value"),
    ("data.validation=-1", "data.validation", "greater than or equal to 0", "-1"),
    ("data.validation=.nan", "data.validation", "finite"),
    ("data.validation=5000", "data.validation", "cannot hold 5000 of 1617 images out"),
    ("data.validation=1e308", "data.validation", "cannot hold 1000000000", "of 1617 images out"),
    ("data.flip=maybe", "data.flip", "boolean", "'maybe'"),
    ("data.n_bits=5", "data.n_bits", "digits has 17 levels"),
    ("data.shift=8", "data.shift", "8"),
    ("data.path=x.npz", "data.path", "unknown key"),
    ("data=digits", "data:", "'digits'"),
    ("data.name=mnits", "data.name", "did you mean mnist?", "cifar10, cifar100, digits"),
    ("data.root=~nobody_of_this_name/x", "data.root", "~nobody_of_this_name"),
    ("data.root=%FF", "data.root", "not YAML"),
    ("dequantization.name=variatonal", "dequantization.name", "'variatonal'"),
    ("dequantization.alpha=0.5", "dequantization.alpha", "less than 0.5"),
    ("dequantization.sigma=0", "dequantization.sigma", "greater than 0"),
    ("dequantization.sigma=1.5", "dequantization.sigma", "less than or equal to 1"),
    ("model.label_dropout=1", "model.label_dropout", "less than 1"),
    ("model.label_dropout=0.1", "model.label_dropout: 0.1, but", "set model.classes"),
    ("seed=-1", "seed", "-1"),
    ("seed=2024-13-45", "--set seed=2024-13-45"),
    ("seed=nan", "seed", "integer"),
]

# What stands where a command takes a model, and what the message has to say.
MODELS = {
    "nowhere.safetensors": (NO_MODEL,),
    "no%FF.safetensors": ("no?.safetensors", NO_MODEL),
    f"{'n' * 300}.safetensors": (NO_MODEL,),
    "empty.safetensors": ("damaged", "header"),
    "text.safetensors": ("damaged", "header"),
    "pipe.safetensors": (PIPE,),
    "locked.safetensors": ("locked.safetensors",),
    "evil.safetensors": ("damaged",),
    "foreign.safetensors": ("foreign.safetensors",),
}
# Commands that take one, and the other words that they need.
TAKING_A_MODEL = {
    "evaluate": "evaluate {}",
    "ood": "ood {} --data noise",
    "doctor": "doctor {}",
    "sample": "sample {}",
    "interpolate": "interpolate {}",
    "attributes": "attributes {} --to-class 1",
    "encode": "encode {} --split test --out x.npz",
    "decode": "decode {} z.npz --out x",
    "explore": "explore {} --no-browser",
    "inpaint": "inpaint {} --image good.png --mask mask.png --out x",
    "report": "report {}",
    "info": "info {}",
    "push": "push {} a/b --dry-run",
    "compress": "compress {} good.png --out x",
    "decompress": "decompress gone.fta --out x --model {}",
    "train --resume": "train TINY --run-dir new --resume {}",
    "train --init-from": "train TINY --run-dir new --init-from {}",
}
# What stands where a command writes a file, before its suffix, and what the message has to say.
OUTPUTS = {"text/a": (NO_FOLDER,), "locked/a": (DENIED,), "grid": (FOLDER,), "pipe": (PIPE,)}
WRITING = [
    "evaluate run --json {}.json",
    "evaluate run --scores {}.csv",
    "ood run --data noise --json {}.json",
    "ood run --data noise --scores {}.csv",
    "ood run --data noise --out {}.png",
    "doctor run --json {}.json",
    "sample run --out {}.png",
    "sample run --out {}.npz",
    "interpolate run --out {}.gif",
    "encode run --split test --out {}.npz",
    "decode run z.npz --out {}.npz",
    "inpaint run --image good.png --mask mask.png --out {}.npz",
    "report run --out {}.html",
    "compare run --out {}.png",
    "compare run --json {}.json",
    "compress run good.png --out {}.fta",
]
# What stands where images are read, and what the message has to say.
DATA = {
    "nope": ("neither a data set", "mnist", "folder", ".png", ".npz"),
    "no%FF.npz": ("no?.npz: there is no such file",),
    "no.png": ("no.png: there is no such file",),
    "/dev/zero": ("/dev/zero: neither a data set",),
    "empty": ("there is no image in",),
    "empty.npz": ("empty.npz: is not an .npz or .npy file",),
    "text.npz": ("text.npz: is not an .npz or .npy file",),
    "pipe.npz": ("pipe.npz: cannot be opened", PIPE),
    "locked.npz": ("locked.npz: cannot be opened", "Permission denied"),
}
READING = [
    "evaluate run --data {}",
    "ood run --data {}",
    "ood run --data noise --in {}",
    "encode run --data {} --out x.npz",
    "attributes run --to-class 1 --data {}",
]


# Commands with which little else can be wrong: every fault is tried.
THIN = {"doctor", "explore", "report", "info", "push", "compare"}


def in_turn(lines, faults, count):
    """`(line, said)` of each line with `count` of the faults, and each fault with as many lines.

    One function of flowtrain refuses them all: what a command has to show is that it asks.
    """
    names = [*faults, *faults]
    for i, line in enumerate(lines):
        first = i * count % len(faults)
        several = len(faults) if line.split()[0] in THIN else count
        for name in names[first : first + several]:
            yield line.format(name), faults[name]


# A command line, and what its message has to say.
TABLE = [
    # --- all commands
    ("evaluat", "No such command 'evaluat'"),
    ("%FF", "No such command"),
    ("evaluate ''", "an argument is empty"),
    ("train TINY --run-dir ''", "an argument is empty: a value is missing"),
    ("train TINY --run-dir=", "--run-dir= is empty: a value is missing"),
    ("evaluate run --nonsense", "No such option: --nonsense"),
    ("evaluate run --%FF=1", "No such option"),
    ("evaluate run run", "run: expected KEY=VALUE"),
    *[(line, *said) for line, said in in_turn(TAKING_A_MODEL.values(), MODELS, 4)],
    *[(line, " ".join(line.split()[-2:]), *said) for line, said in in_turn(WRITING, OUTPUTS, 2)],
    *[(line, *said) for line, said in in_turn(READING, DATA, 4)],
    # --- train
    ("train --config glow_digit.yaml", "did you mean glow_digits?", "shipped:"),
    ("train --config nothing_like_it", "no such file", "shipped:"),
    ("train glow_digits", "glow_digits: expected KEY=VALUE", "--config"),
    ("train train.learning_rate=1", "did you mean train.lr?"),
    ("train --set train.epochs=1", "did you mean train.num_steps?"),
    ("train --lr 1", "No such option: --lr", "train.lr=VALUE"),
    ("train --learning-rate 1", "train.lr=VALUE"),
    ("train data.size=8", "data.size: unknown key", "it belongs to data.name folder"),
    ("train data.name=MNIST", "did you mean mnist?"),
    ("train data.name=celeba", "a folder of images is data.name=folder"),
    ("train --config no%FF.yaml", "--config no?.yaml: no such file"),
    ("train --config syntax.yaml", "syntax.yaml: cannot be read as YAML", "line 2"),
    ("train --config binary.yaml", "binary.yaml: cannot be read as YAML"),
    ("train --config good.png", "good.png: cannot be read as YAML"),
    ("train --config list.yaml", "list.yaml: expected keys and values, got list"),
    ("train --config section.yaml", "section.yaml: model: expected keys and values, got 'glow'"),
    ("train --config no_length.yaml", "train.num_steps and train.budget: neither is given"),
    ("train --config both.yaml", "train.num_steps and train.budget: both are given"),
    ("train --config sub", "--config sub: not a regular file"),
    ("train --config pipe.yaml", "--config pipe.yaml: not a regular file"),
    ("train --config /dev/zero", "--config /dev/zero: not a regular file"),
    ("train --config locked.yaml", "locked.yaml: cannot be read as YAML: Permission denied"),
    ("train TINY --run-dir text", "--run-dir text: cannot be used"),
    ("train TINY --run-dir text/below", "--run-dir text/below: cannot be used"),
    ("train TINY --run-dir locked", "--run-dir locked: cannot be used: Permission denied"),
    ("train TINY --run-dir locked/below", "--run-dir locked/below: cannot be used"),
    ("train TINY --run-dir pipe.npz", "--run-dir pipe.npz: cannot be used"),
    ("train TINY --run-dir pipe_run", "last.safetensors", PIPE),
    ("train TINY --run-dir %FF", "--run-dir ?: its name is not UTF-8"),
    ("train TINY --run-dir run --resume never", "--resume never: run holds a run"),
    ("train TINY --run-dir new --resume empty", "empty: has no checkpoint"),
    ("train TINY --run-dir new --resume flipped.safetensors", "flipped.safetensors: damaged"),
    ("train TINY --run-dir new --resume classes", "model.classes: classes/checkpoints"),
    ("train TINY --run-dir new --init-from evil.pt", "evil.pt", NOT_ONE),
    ("train TINY --run-dir new --init-from classes", "does not fit this model"),
    ("train TINY --run-dir new --init-from points", "does not fit this model"),
    ("train TINY --run-dir new --init-from /dev/random", "/dev/random: cannot be read", PIPE),
    ("train TINY --device gpu", "--device gpu", "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
    ("train TINY --device cuda:x", "--device cuda:x", "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
    ("train TINY --device cuda:", "--device cuda:", "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"),
    (
        "train TINY --device cuda:%FF",
        "--device cuda:?",
        "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps",
    ),
    ("train TINY --device cuda:99", "--device cuda:99", "CUDA device"),
    ("train --sett seed=1", "No such option", "--set"),
    ("train NPZ nowhere.npz", "data.path: ", "nowhere.npz: there is no such file"),
    ("train NPZ text.npz", "data.path: ", "text.npz: is not an .npz or .npy file"),
    ("train NPZ cut.npz", "data.path", "cut.npz", "cut short"),
    ("train NPZ empty", "data.path", "empty has no array x_train (it has nothing)", "np.save"),
    ("train NPZ objects.npy", "data.path", "objects.npy has the type object, not uint8"),
    ("train NPZ cut.npy", "data.path", "cut.npy is damaged: it has 50 bytes for an array"),
    ("train NPZ parts", "x_train-1.npy has images of 8x8 with 1", "one size"),
    ("train NPZ grid.npy", "data.path", "has no array x_train", "x_train.npy"),
    ("train NPZ pipe.npy", "data.path", "pipe.npy: cannot be opened", PIPE),
    ("train NPZ pipe.npz", "data.path: ", "pipe.npz: cannot be opened", PIPE),
    ("train NPZ locked.npz", "locked.npz: cannot be opened", "Permission denied"),
    ("train NPZ damaged.npz", "damaged.npz: x_train is damaged"),
    ("train NPZ floats.npz", "data.path", "float64, not uint8", ".astype(np.uint8)"),
    ("train NPZ labels.npz", "data.path", "has no array x_train (it has y_train)"),
    ("train NPZ large.npz --set model.levels=5", "16x16 can be squeezed 4 times", "levels: 5"),
    ("train TINY --set data.name=npz", "data.path", "missing"),
    ("train TINY --set data.name=imagenet32", "data.version", "missing"),
    ("train TINY HUB", "data.repository: give either this or data.path: neither is given"),
    ("train TINY HUB --set data.repository=x --set data.path=y", "data.path: both are given"),
    ("train TINY HUB --set data.repository=/etc", "data.repository: /etc is no name on the hub"),
    ("train TINY IMAGENET new", "data.version", "oord2016", "chrabaszcz2017", "'new'"),
    ("train TINY IMAGENET oord2016", "data.root", "put train_64x64.tar there", "Source: "),
    ("train TINY IMAGENET chrabaszcz2017", "put Imagenet64_train_part1_npz.zip and", "Source: "),
    ("train IMAGES images --set data.size=65536", "train.batch_size: a step of 32 x 1 images"),
    ("train IMAGES empty", "data.path", "no image in"),
    ("train IMAGES text", "data.path", NO_FOLDER),
    ("train IMAGES nowhere", "data.path", "is no folder"),
    ("train SMALL MNIST mnist_damaged", "data.root: the MNIST files in", "100 bytes, not 47040016"),
    (
        "train TINY LARGE --set train.batch_size=1048576",
        "train.batch_size: a step of 1,048,576 x 1",
    ),
    (
        "train TINY LARGE --set train.batch_size=1048576",
        "GiB are available: at most",
        "train.memory",
    ),
    ("train TINY --set train.accumulate=1048576 --set train.batch_size=4096", "4,096 x 1,048,576"),
    (
        "train --dry-run --set train.accumulate=1048576 --set train.batch_size=1048576",
        "1,048,576 x",
    ),
    # --- the configuration
    *[(f"train TINY --set '{override}'", *said) for override, *said in CONFIGURATIONS],
    ("train --set model.name=./mine.py", "model.name", "unknown name './mine.py'"),
    ("train --set model.name=no.such.module", "model.name", "no.such.module"),
    ("train --set model.name=glo", "model.name", "did you mean glow?", "cnf, glow, iaf, jet"),
    # --- evaluate
    ("evaluate", "no MODEL given", "no run under runs/"),
    ("evaluate empty", "empty: has no checkpoint", "checkpoints/best.safetensors"),
    ("evaluate text", "text: not a flowtrain checkpoint"),
    ("evaluate run/config.yaml", "run/config.yaml", NOT_ONE),
    ("evaluate /dev/zero", "/dev/zero: cannot be read", PIPE),
    ("evaluate flipped.safetensors", "flipped.safetensors: damaged", "checksum"),
    ("evaluate cut.safetensors", "cut.safetensors: damaged", "checksum"),
    ("evaluate header.safetensors", "header.safetensors", "damaged"),
    ("evaluate cut_header.safetensors", "cut_header.safetensors: damaged", "header"),
    ("evaluate future.safetensors", "format 99 by flowtrain 9.8.7", "format 1", "train again"),
    ("evaluate evil.pt", "evil.pt: not a flowtrain checkpoint", "pickles are never loaded"),
    ("evaluate evil_torch.pt", "evil_torch.pt: not a flowtrain checkpoint"),
    ("evaluate run --split dev", "--split", "'dev' is not one of 'test'"),
    ("evaluate run --split validation --set data.validation=0", "--split validation", "empty"),
    ("evaluate run --data sub --split test", "--split test: sub has no splits"),
    ("evaluate run --weights best", "--weights", "'best' is not one of 'ema'"),
    ("evaluate run --num-images 0", "--num-images", AT_LEAST_1),
    ("evaluate run --num-images 1.5", "--num-images", NUMBER),
    ("evaluate run --draws -1", "--draws", AT_LEAST_1),
    (f"evaluate run --draws {HUGE}", f"--draws {HUGE}: the scores of 180 images need"),
    ("evaluate run --batch-size inf", "--batch-size", NUMBER),
    ("evaluate run --seed nan", "--seed", NUMBER),
    ("evaluate points --draws 2", "--draws 2", "exact"),
    ("evaluate run data.name=npz data.path=large.npz", *OTHER_SHAPE),
    ("evaluate run --set data.name=npz --set data.path=same.npz", "256 levels", "17 levels"),
    ("evaluate data.root=x", "no MODEL given"),
    ("evaluate run model.width=3", "--set model.width=3", "only keys of data"),
    ("evaluate run --set data.%FF=1", "data", "unicode"),
    ("evaluate run --data same.npz", "256 levels", "17 levels"),
    ("evaluate run --data digits --set data.size=3", "data.size: unknown key"),
    ("evaluate points --data digits", "(1, 8, 8) with 17 levels", "(2, 1, 1) with real values"),
    # --- ood
    ("ood run", "--data"),
    ("ood run --data noise --in noise", "--data noise: it is named twice"),
    ("ood run --data digits", "--data digits: it is named twice"),
    ("ood run --data noise --data noise", "--data noise: it is named twice"),
    ("ood run --data constant --in noise", "--in noise: neither a data set"),
    ("ood run --data noise --out x.jpg", "--out x.jpg", ".png"),
    ("ood run --data noise --num-images 0", "--num-images", AT_LEAST_1),
    ("ood run --data noise --batch-size 0", "--batch-size", AT_LEAST_1),
    ("ood run --data noise --weights both", "--weights", "'both' is not one of 'ema'"),
    ("ood run --data noise --set model.width=3", "--set model.width=3"),
    ("ood run --data noise --set data.name=two_moons", "(2, 1, 1)", "real values"),
    ("ood run --data text.png", "text.png cannot be read as an image"),
    ("ood points --data noise", "a model of real values"),
    # --- doctor
    ("doctor run --num-images 0", "--num-images", AT_LEAST_1),
    ("doctor run --num-images nan", "--num-images", NUMBER),
    ("doctor run --weights best", "--weights", "'best' is not one of 'ema'"),
    ("doctor run --device abacus", "--device abacus"),
    ("doctor run --set model.width=3", "--set model.width=3", "only keys of data"),
    ("doctor run --set data.name=npz --set data.path=colour.npz", "shape (3, 8, 8)", "256 levels"),
    # --- sample
    ("sample dotted_model.safetensors", "model.name is 'os.path'", "--trust-code"),
    ("sample dotted_data.safetensors", "data.name is 'os.path'", "--trust-code"),
    ("sample run --out a.jpg", "--out a.jpg", ".png or .npz"),
    ("sample run --out a", "--out a:", ".png or .npz"),
    ("sample run --method fast", "--method", "'fast' is not one of 'sequential'"),
    ("sample run --method jacobi", "--method jacobi: ", "samples take one pass"),
    ("sample run --num-images 0", "--num-images", AT_LEAST_1),
    (
        f"sample run --num-images {HUGE}",
        f"--num-images {HUGE}: a picture of",
        "GiB are available: lower",
    ),
    (f"sample run --num-images {HUGE} --out a.npz", f"--num-images {HUGE}: 10,000,000,000 samples"),
    (f"sample run --seed {2**63}", "--seed"),
    (f"sample run --num-images {10**400}", "GiB are available: lower"),
    ("sample run --temperature -1", "--temperature", "greater than or equal to 0"),
    ("sample run --temperature nan", "--temperature"),
    ("sample run --temperature hot", "--temperature", "valid number"),
    ("sample run --temperature 1e400", "--temperature inf", "finite"),
    ("sample run --seed -1", "--seed", "greater than or equal to 0"),
    ("sample run --classes 1", "--classes 1", "not class-conditional"),
    ("sample classes --classes 10", "--classes 10", "0..9"),
    ("sample classes --classes -1", "--classes -1", "0..9"),
    (f"sample classes --classes {10**30}", "--classes 1000", "0..9"),
    ("sample classes --classes a", "--classes a", "whole numbers"),
    ("sample run --image good.png", "--image good.png", "model.context is none"),
    ("sample run --image no.png", "--image no.png", "model.context is none"),
    ("sample points --image good.png", "--image good.png", "model.context is none"),
    ("sample run data.root=x", "--set: these samples need no data"),
    ("sample given --image good.png --set data.root=x", "--set: these samples need no data"),
    ("sample given --set model.width=3", "--set model.width=3: only keys of data"),
    ("sample given --set data.path=no.npz", "no.npz"),
    ("sample given --image no.png", "no.png: there is no such image file"),
    ("sample given --image no%FF.png", "no?.png: there is no such image file"),
    ("sample given --image empty.png", "empty.png cannot be read as an image"),
    ("sample given --image text.png", "text.png cannot be read as an image"),
    ("sample given --image pipe.png", "pipe.png", PIPE),
    ("sample given --image grid.png", "grid.png"),
    ("sample given --image locked.png", "locked.png", "is not readable"),
    ("sample given --image ''", "an argument is empty"),
    ("sample given --classes 1", "--classes 1", "not class-conditional"),
    (f"sample given --num-images {HUGE}", f"--num-images {HUGE}: a picture of 80,000,000,"),
    ("interpolate given", "not possible for a model of images given the image at 4x4 pixels"),
    ("explore given --no-browser", "not possible for a model of images given"),
    ("encode given --split test --out z.npz", "not possible for a model of images given"),
    ("decode given z.npz --out x", "not possible for a model of images given"),
    ("attributes given --to-class 1", "not possible for a model of images given"),
    ("push given user/name --dry-run", "not possible for a model of images given"),
    ("interpolate given --images good.png good.png", "not possible", "model.context"),
    ("compress given rgb.png --out x", "an archive has no context", "4x4 pixels (model.context)"),
    ("sample classes --classes 1,,2", "--classes 1,,2", "whole numbers"),
    ("sample run --guidance -1", "--guidance", "greater than or equal to 0"),
    ("sample run --guidance nan", "--guidance"),
    ("sample run --guidance 1e400", "--guidance inf", "finite"),
    ("sample run --guidance much", "--guidance", "valid number"),
    ("sample run --guidance 1", "--guidance 1: the model is not class-conditional"),
    ("sample classes --guidance 0", "--guidance 0: each class has its own prior", "do not see"),
    ("sample points --guidance 1", "--guidance 1: the model is not class-conditional"),
    ("sample run --denoise", "--denoise: the model was not trained with Gaussian noise"),
    ("sample points --denoise", "--denoise: the model was not trained", "dequantization.name"),
    # --- explore
    ("explore points --no-browser", "points", "the explorer shows images", "flowtrain sample"),
    ("explore run --port 65536", "--port", "less than or equal to 65535"),
    ("explore run --port -1", "--port", "greater than or equal to 0"),
    ("explore run --port nan", "--port", NUMBER),
    ("explore run --no-browser --host 192.0.2.1", "--host 192.0.2.1", "no server can listen"),
    ("explore run --no-browser --host no.invalid", "--host no.invalid"),
    ("explore run --no-browser --host no%FF", "--host no?"),
    ("explore run --max-memory 0", "--max-memory", AT_LEAST_1),
    ("explore run --max-memory nan", "--max-memory", NUMBER),
    ("explore run --set data.name=npz --set data.path=large.npz", *OTHER_SHAPE),
    ("explore run --set model.steps=3", "--set model.steps=3", "only keys of data"),
    ("explore run --set data.nam=npz", "data.nam", "did you mean data.name?"),
    ("explore run --weights best", "--weights", "'best' is not one of 'ema'"),
    # --- interpolate
    ("interpolate run --set data.name=npz --set data.path=large.npz", *OTHER_SHAPE),
    ("interpolate run --steps 1", "--steps", "greater than or equal to 2"),
    (f"interpolate run --steps {HUGE}", f"--steps {HUGE}: a picture of 4 paths of 10,00"),
    (f"interpolate run --pairs {HUGE} --steps 2", "a picture of 10,000,000,000 paths of 2 images"),
    ("interpolate run --pairs 91", "--pairs 91", "180 images"),
    ("interpolate run --pairs nan", "--pairs", NUMBER),
    ("interpolate run --out a.npz", "--out a.npz", ".png or .gif"),
    ("interpolate run --images no%FF.png good.png", "no?.png: there is no such image file"),
    ("interpolate run --images text.png text.png", "text.png cannot be read as an image"),
    ("interpolate run --images empty.png good.png", "empty.png cannot be read as an image"),
    ("interpolate run --images good.png grid.png", "grid.png cannot be read", "Is a directory"),
    ("interpolate run --images pipe.png pipe.png", "pipe.png cannot be read", PIPE),
    ("interpolate run --images good.png", "--images"),
    ("interpolate points --images good.png good.png", "--images", "real-valued"),
    ("interpolate run --from-class 4", "--from-class and --to-class"),
    ("interpolate run --from-class -1 --to-class 2", "--from-class", "or equal to 0"),
    ("interpolate run --from-class 4 --to-class 12", "--to-class 12", "0 images"),
    (f"interpolate run --from-class 4 --to-class {10**30}", "--to-class 1000", "0 images"),
    ("interpolate run --from-class 4 --to-class 5 --pairs 99", "--from-class 4", "99 are needed"),
    ("interpolate run --from-class 4 --to-class 5 --steps 100000000000", "--steps", "GiB"),
    ("interpolate run --from-class 4 --to-class 5 --images a b", "--images", "--from-class"),
    ("interpolate points --from-class 1 --to-class 2", "--from-class 1", "no labels"),
    ("interpolate run --along smile", "smile: no such attribute of run/", "there are: none"),
    ("interpolate run --along ''", "an argument is empty"),
    ("interpolate run --along a --from-class 1 --to-class 2", "--along and --from-class"),
    ("interpolate run --along a --images good.png good.png", "--images", "--image"),
    ("interpolate run --image good.png", "--image and --strength: they need --along"),
    ("interpolate run --strength 2", "--image and --strength: they need --along"),
    ("interpolate run --along a --strength nan", "--strength nan: expected a finite number"),
    ("interpolate run --along a --strength far", "--strength", "valid number"),
    # --- attributes
    ("attributes run", "one of three ways", "--positive", "--csv", "--to-class"),
    ("attributes run --positive images", "--positive and --negative: one is of no use"),
    ("attributes run --positive a --negative b --to-class 1", "one of three ways"),
    ("attributes run --positive empty --negative sub", "--positive empty: there is no image in"),
    ("attributes run --positive images --negative none", "none: there is no such image file"),
    ("attributes run --positive images --negative text.png", "text.png cannot be read as an image"),
    ("attributes run --positive images --negative pipe.png", "pipe.png cannot be read", PIPE),
    ("attributes run --positive images --negative sub", "without it", "at least 4 are needed"),
    ("attributes points --positive images --negative sub", "--positive", "real-valued data"),
    ("attributes run --to-class 12", "--to-class 12: the train split has no images of it"),
    ("attributes run --to-class 1 --from-class 12", "--from-class 12: the train split has no"),
    ("attributes run --to-class 1 --from-class 1", "--to-class 1: it is the same class"),
    ("attributes run --to-class -1", "--to-class", "or equal to 0"),
    ("attributes points --to-class 1", "--to-class 1: two_moons has no labels"),
    ("attributes run --from-class 1 --csv t.csv", "they need --to-class"),
    ("attributes run --to-class 1 --data sub", "--data sub: it has no classes"),
    ("attributes run --to-class 1 --split dev", "--split", "'dev' is not one of 'test'"),
    (
        "attributes run --to-class 1 --method guess",
        "--method",
        "'guess' is not one of 'difference'",
    ),
    ("attributes run --to-class 1 --name -x", "'-x' cannot be the name of an attribute"),
    ("attributes run --to-class 1 --images sub", "--images: it is the folder of --csv"),
    ("attributes run --to-class 1 --num-images 0", "--num-images", AT_LEAST_1),
    ("attributes run --to-class 1 --weights best", "--weights", "'best' is not one of 'ema'"),
    ("attributes run --to-class 1 --set model.width=3", "--set model.width=3"),
    ("attributes run --csv nowhere.csv", "--csv nowhere.csv: cannot be read: No such file"),
    ("attributes run --csv pipe.csv", "--csv pipe.csv: cannot be read", PIPE),
    ("attributes run --csv empty.csv", "--csv empty.csv: its first line has to name the columns"),
    ("attributes run --csv binary.yaml", "binary.yaml: is not a CSV table in UTF-8"),
    ("attributes run --csv header.csv", "--csv header.csv: it has no images"),
    ("attributes run --csv values.csv", "values.csv, line 3: x is '2', expected 0 or 1"),
    ("attributes run --csv short.csv", "short.csv, line 2: expected 2 values", "got 1"),
    ("attributes run --csv gone.csv", "gone.csv, line 2: there is no image file gone.png"),
    ("attributes run --csv gone.csv --images sub", "there is no image file sub/gone.png"),
    ("attributes run --csv gone.csv --name x", "--name x: the attributes of --csv"),
    # --- inpaint
    ("inpaint run", "Missing option '--image'"),
    ("inpaint run --image good.png --mask mask.png", "Missing option '--out'"),
    ("inpaint run --image good.png --out x", "give one of --mask FILE", "--factor F"),
    ("inpaint run --image good.png --mask mask.png --factor 2 --out x", "give one of --mask FILE"),
    ("inpaint run --image no.png --mask mask.png --out x", "--image no.png: there is no such"),
    ("inpaint run --image good.png --mask no.png --out x", "--mask no.png: there is no such"),
    ("inpaint run --image text.png --mask mask.png --out x", "--image text.png cannot be read as"),
    ("inpaint run --image empty.png --mask mask.png --out x", "--image empty.png cannot be read"),
    ("inpaint run --image good.png --mask empty.png --out x", "--mask empty.png cannot be read"),
    ("inpaint run --image pipe.png --mask mask.png --out x", "pipe.png cannot be read", PIPE),
    ("inpaint run --image good.png --mask pipe.png --out x", "pipe.png cannot be read", PIPE),
    ("inpaint run --image good.png --mask sub --out x", "--mask sub cannot be read as an image"),
    ("inpaint run --image wide.png --mask mask.png --out x", "--image wide.png: the image is 9x8"),
    ("inpaint run --image good.png --mask wide.png --out x", "--mask wide.png: the image is 9x8"),
    ("inpaint run --image good.png --mask black.png --out x", "all black, so no pixel is missing"),
    ("inpaint run --image good.png --mask white.png --out x", "all white, so no pixel is known"),
    ("inpaint run --image good.png --mask grey.png --out x", "64 pixels are neither black", "PNG"),
    ("inpaint run --image good.png --factor 3 --out x", "--factor 3: expected a number from 2"),
    ("inpaint run --image good.png --factor 0 --out x", "--factor 0: expected a number from 2"),
    ("inpaint run --image good.png --factor 2 --out x", "good.png: the image is 8x8", "not 4x4"),
    ("inpaint run --image good.png --mask mask.png --out done", "--out done: 'grid.png' is there"),
    ("inpaint run --image good.png --mask mask.png --out text", NO_FOLDER),
    ("inpaint run --image good.png --mask mask.png --out x --num-images 0", AT_LEAST_1),
    ("inpaint run --image good.png --mask mask.png --out x --steps 2", "--steps", "8"),
    (
        "inpaint run --image good.png --mask mask.png --out x --num-images 999999999",
        "--num-images 999999999: the chains need",
    ),
    (
        "inpaint run --image good.png --mask mask.png --out x --class 1",
        "--class 1: the model is not class-conditional",
    ),
    (
        "inpaint classes --image good.png --mask mask.png --out x --class 10",
        "--class 10: the model has the classes 0..9",
    ),
    (
        "inpaint classes --image good.png --mask mask.png --out x --class -1",
        "--class -1: the model has the classes 0..9",
    ),
    ("inpaint points --image good.png --mask mask.png --out x", "real-valued data"),
    (
        "inpaint given --image good.png --mask mask.png --out x",
        "not possible for a model of images given",
    ),
    # --- encode
    ("encode run --split test", "Missing option '--out'"),
    ("encode run --out x.npz", "give the images", "--images", "--split", "--data"),
    ("encode run --split test --out x.png", "--out x.png: expected a name that ends in .npz"),
    ("encode run --split dev --out x.npz", "--split", "'dev' is not one of 'test'"),
    ("encode run --images good.png --split test --out x.npz", "--images: give either these"),
    ("encode run --images empty --out x.npz", "--images empty: there is no image in"),
    ("encode run --images nowhere --out x.npz", "nowhere: there is no such image file"),
    ("encode run --images text.png --out x.npz", "text.png cannot be read as an image"),
    ("encode run --images pipe.png --out x.npz", "pipe.png cannot be read", PIPE),
    ("encode run --images good.png --images sub --out x.npz", "the same name as good.png"),
    ("encode run --split test --num-images 0 --out x.npz", "--num-images", AT_LEAST_1),
    (
        "encode run --split test --weights best --out x.npz",
        "--weights",
        "'best' is not one of 'ema'",
    ),
    ("encode run --split test data.name=two_moons --out x.npz", "(2, 1, 1)"),
    ("encode run --data same.npz --out x.npz", "256 levels", "17 levels"),
    ("encode run --data sub --split test --out x.npz", "--split test: sub has no splits"),
    ("encode run --split validation --set data.validation=0 --out x.npz", "it is empty"),
    ("encode points --images good.png --out x.npz", "--images good.png", ".npy or .npz"),
    ("encode points --images cut.npy --out x.npz", "cut.npy has the type uint8", "real"),
    ("encode points --images floats.npz --out x.npz", "floats.npz: it has no array images"),
    ("encode points --images text.npz --out x.npz", "text.npz: is not an .npz or .npy file"),
    ("encode points --images pipe.npy --out x.npz", "pipe.npy: cannot be opened", PIPE),
    # --- decode
    ("decode run", "Missing argument 'FILE.npz'"),
    ("decode run z.npz", "Missing option '--out'"),
    ("decode run nowhere.npz --out x", "nowhere.npz: there is no such file"),
    ("decode run text.npz --out x", "text.npz: is not an .npz or .npy file"),
    ("decode run empty.npz --out x", "empty.npz: is not an .npz or .npy file"),
    ("decode run pipe.npz --out x", "pipe.npz: cannot be opened", PIPE),
    ("decode run grid.npz --out x", "grid.npz: cannot be opened", "Is a directory"),
    ("decode run locked.npz --out x", "locked.npz", "not readable"),
    ("decode run floats.npz --out x", "floats.npz: it has no array format (it has x_train)"),
    ("decode run objects.npy --out x", "objects.npy: it has no array format"),
    ("decode classes z.npz --out x", "z.npz: latents of the model", "is another one"),
    ("decode run up.npz --out x", "up.npz: names: '../up.png' is not a plain relative path"),
    ("decode run nan.npz --out x", "nan.npz: level1 of a.png has a number that is not finite"),
    ("decode run z.npz --out taken", "--out taken: 'a.png' is there already"),
    ("decode run z.npz --out locked/x", "--out locked/x", DENIED),
    ("decode run z.npz --out text/x", "--out text/x", NO_FOLDER),
    ("decode run z.npz --out x --weights best", "--weights", "'best' is not one of 'ema'"),
    ("decode points z.npz --out x", "--out x: the model is of real-valued data", ".npz"),
    # --- report
    ("report run --out x.pdf", "--out x.pdf", ".html"),
    ("report run --num-images 0", "--num-images", AT_LEAST_1),
    ("report run --weights best", "--weights", "'best' is not one of 'ema'"),
    ("report run --set train.lr=1", "--set train.lr=1"),
    ("report run --set data.name=npz --set data.path=gone.npz", "gone.npz: there is no such file"),
    ("report run --set data.name=npz --set data.path=same.npz", "256 levels", "17 levels"),
    # --- list and info
    ("list run", "unexpected extra argument"),
    ("info", "no MODEL given"),
    ("info nothing_like_it", "nothing_like_it: no such checkpoint or run directory"),
    ("info nowhere.yaml", "--config nowhere.yaml: no such file"),
    ("info syntax.yaml", "syntax.yaml: cannot be read as YAML"),
    ("info binary.yaml", "binary.yaml: cannot be read as YAML"),
    ("info empty", "empty: has no checkpoint"),
    ("info run run", "unexpected extra argument"),
    # --- push, and models on the hub
    ("push", "Missing argument 'MODEL'"),
    ("push run", "Missing argument 'USER/NAME'"),
    ("push run name --dry-run", "name: no name on the hub: expected hf://user/name"),
    ("push run ../b --dry-run", "../b: no name on the hub"),
    ("push run a/%FF --dry-run", "a/?: no name on the hub"),
    ("push run a/b@v1 --dry-run", "a/b@v1: a revision cannot be uploaded to"),
    ("push run a/b --dry-run --out text", "--out text", NO_FOLDER),
    ("push run a/b --dry-run --out text/a", "--out text/a", NO_FOLDER),
    ("push run a/b --dry-run --out locked/a", "--out locked/a", DENIED),
    ("push run a/b --dry-run --weights best", "--weights", "'best' is not one of 'ema'"),
    ("push run a/b --dry-run --device abacus", "--device abacus"),
    ("push dotted_data.safetensors a/b --dry-run", "data.name is 'os.path'", "--trust-code"),
    ("sample hf://a", "hf://a: no name on the hub"),
    ("sample hf://../../x", "hf://../../x: no name on the hub"),
    ("info hf://a/b@../x", "hf://a/b@../x: no name on the hub"),
    ("train TINY --run-dir new --init-from hf://a", "hf://a: no name on the hub"),
    ("train TINY --run-dir new --resume hf://a", "hf://a: no name on the hub"),
    ("compress hf://a good.png --out x", "hf://a: no name on the hub"),
    ("decompress foreign.fta --out x --model hf://a", "hf://a: no name on the hub"),
    # --- compare
    ("compare", "Missing argument 'RUN...'"),
    ("compare run nowhere", "nowhere: no such run directory"),
    ("compare no%FF", "no?: no such run directory"),
    ("compare run/config.yaml", "run/config.yaml: is not a run directory"),
    ("compare pipe.npz", "pipe.npz: is not a run directory"),
    ("compare empty", "empty/config.yaml", "No such file"),
    ("compare bad_config", "bad_config/config.yaml: cannot be read as YAML"),
    ("compare bad_summary", "bad_summary/summary.json: broken"),
    ("compare run --out x.jpg", "--out x.jpg", ".png"),
    # --- compress
    ("compress run --out x", "INPUT", "--split"),
    ("compress run good.png", "Missing option '--out'"),
    ("compress run good.png --split test --out x", "INPUT", "not both"),
    ("compress run --split all --out x", "--split", "'all' is not one of 'test'"),
    ("compress run good.png --num-images nan --out x", "--num-images", NUMBER),
    ("compress run none.png --out x", "none.png", "no such"),
    ("compress run no%FF.png --out x", "no?.png", "no such"),
    ("compress run text.png --out x", "text.png", "cannot be read"),
    ("compress run pipe.png --out x", "pipe.png", PIPE),
    ("compress run wide.png --out x", "wide.png", "9x8 L", "8x8 L"),
    ("compress run rgb.png --out x", "rgb.png", "8x8 RGB", "8x8 L"),
    ("compress run deep.png --out x", "deep.png", "17", "not be lossless"),
    ("compress run clear.png --out x", "clear.png", "transparent"),
    ("compress run empty --out x", "empty", "no image"),
    ("compress run good.png sub/good.png --out x", "sub/good.png", "good.png"),
    ("compress run a.png sub/a.png --out x", "a.png/b.png", "folder where the file 'a.png' is"),
    (f"compress run {'n' * 250}.jpg --out x", "n.jpg", "255 bytes"),
    ("compress run good.png --out x --weights best", "--weights", "'best' is not one of 'ema'"),
    ("compress run good.png --out x data.root=y", "--set", "--split"),
    ("compress run good.png --out good.png", "--out good.png", "one of the files"),
    ("compress run sub --out sub/good.png", "--out sub/good.png", "one of the files"),
    ("compress run sub --out run/checkpoints/best.safetensors", "--out run", "one of the files"),
    ("compress points --split test --out x", "real-valued"),
    # --- decompress
    ("decompress", "Missing argument 'FILE'"),
    ("decompress good.fta", "Missing option '--out'"),
    ("decompress none.fta --out x", "none.fta", "cannot be read"),
    ("decompress no%FF.fta --out x", "no?.fta", "cannot be read"),
    ("decompress empty --out x", "empty: cannot be read: Is a directory"),
    ("decompress empty.fta --out x", "empty.fta: not an archive"),
    ("decompress text.fta --out x", "text.fta: not an archive"),
    ("decompress pipe.fta --out x", "pipe.fta: cannot be read", PIPE),
    ("decompress /dev/zero --out x", "/dev/zero: cannot be read", PIPE),
    ("decompress locked.fta --out x", "locked.fta", "not readable"),
    ("decompress cut.fta --out x", "cut.fta", "damaged"),
    ("decompress flip.fta --out x", "flip.fta", "damaged"),
    ("decompress evil.fta --out x/y", "evil.fta", "../up.png"),
    ("decompress escape.fta --out x/y/z", "escape.fta", "../../x-00000.png"),
    ("decompress fields.fta --out x", "fields.fta", "not a valid archive: levels"),
    ("decompress strips.fta --out x", "strips.fta", "cannot be read (no picture"),
    ("decompress below.fta --out .", "--out .", "good.png", "folder"),
    ("decompress good.fta --out good.png", "--out good.png", NO_FOLDER),
    ("decompress good.fta --out good.png/x", "--out good.png/x", NO_FOLDER),
    ("decompress good.fta --out pipe.png", "--out pipe.png", NO_FOLDER),
    ("decompress good.fta --out locked/x", "--out locked/x", DENIED),
    ("decompress good.fta --out taken", "--out taken", "'a.png' is there already"),
    ("decompress good.fta --out x --max-memory 0", "--max-memory", AT_LEAST_1),
    ("decompress good.fta --out x --max-memory nan", "--max-memory", NUMBER),
    ("decompress gone.fta --out x", "gone.fta", "gone/best.safetensors", "--model"),
    ("decompress foreign.fta --out x --model classes", "classes", "another one", "--model"),
]


WORDS_OF = {
    "TINY": TINY_RUN,
    "SMALL": SMALL,
    "LARGE": sets(model__steps=16, model__width=512),  # a megabyte for each image
    "NPZ": [*SMALL, *sets(train__num_steps=2, data__name="npz"), "--set", "data.path="],
    "IMAGES": [*TINY_RUN, *sets(data__name="folder", data__size=8), "--set", "data.path="],
    "HUB": [*sets(data__name="hub", data__size=8)],
    "IMAGENET": [*sets(data__name="imagenet64"), "--set", "data.version="],
    "MNIST": [*sets(data__name="mnist"), "--set", "data.root="],
}


def words(line: str) -> list[str]:
    """A command line of the table as words. %FF is a byte that no text has. A name in capitals is
    short for some words, of which the last goes on with the next word if it ends in "=".
    """
    found: list[str] = []
    for word in shlex.split(line):
        text = os.fsdecode(word.encode().replace(b"%FF", b"\xff"))
        if found and found[-1].startswith("data.") and found[-1].endswith("="):
            found[-1] += text
        else:
            found += WORDS_OF.get(word, [text])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("wrong")
    make(here)
    return here


def short(line: str) -> str:
    return line.replace("n" * 250, "long").replace("0" * 30, "")[:70]


@pytest.mark.parametrize(
    "line, said", [(row[0], row[1:]) for row in TABLE], ids=[short(row[0]) for row in TABLE]
)
def test_wrong_input(line, said, folder):
    before = tree(folder)
    done = quick(*words(line), cwd=folder, first=OBEDIENT)
    for new in ("new", "runs"):  # a refused start may leave a folder with a lock
        files = [path.name for path in (folder / new).rglob("*") if path.is_file()]
        assert files in ([], [".lock"])
        shutil.rmtree(folder / new, ignore_errors=True)
    done.failed(2, *said)
    assert done.err.count("\n") <= 6
    assert tree(folder) == before  # nothing written, nothing executed, nothing lost


def test_every_command_has_rows():
    rows = [words(row[0])[0] for row in TABLE]
    for name in get_command(app).commands:
        assert rows.count(name) >= (1 if name == "list" else 15), name  # `list` takes nothing


def test_as_a_user_would_see_it(folder):
    """The table runs forked; this one does not."""
    done = flowtrain("train", *sets(model__stepz=3), cwd=folder).failed(2)
    assert done.out == ""
    assert done.err.startswith("flowtrain: ") and done.err.count("\n") == 1
    assert done.err.rstrip().endswith(
        "model.stepz: unknown key; did you mean model.steps? (value 3)"
    )


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
    for name in ("runs", "dl"):
        shutil.rmtree(folder / name)


def test_the_pickles_above_are_malicious(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pickle.loads((folder / "evil.pt").read_bytes())
    assert (folder / "executed").is_dir()
    (folder / "executed").rmdir()


def test_a_name_that_is_no_text(tmp_path):
    """As a run directory it is refused; the files of such a name can be read, and are printed."""
    name = os.fsdecode(b"bad\xff")
    flowtrain("train", *TINY_RUN, "--run-dir", name, cwd=tmp_path).failed(
        2, "--run-dir bad?: its name is not UTF-8"
    )
    assert tree(tmp_path) == []
    copy_of(trained()["glow"], tmp_path / name)
    done = quick("evaluate", name, "--num-images", 2, cwd=tmp_path).ok()
    assert "bad\\udcff" in done.out


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
