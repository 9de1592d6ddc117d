"""Wrong input to every command: one message of at most six lines, exit code 2, nothing written.

Messages of other packages are tested where they are raised. The rows here are those that commands
raise, and show that a command calls the rest. Tests of the examples in `--help` are for each
command that is there.
"""

import os
import shlex
import shutil

import numpy as np
import pytest
from catalogue import TINY_RUN, sets
from cli_helpers import COMMANDS, Result, copy_of, example, flowtrain, quick, trained, tree
from coding_helpers import picture
from helpers import npz
from PIL import Image

from flowtrain.cli import base
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.tools.sweep.plan import begin, planned

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of digits, of classes, of points and of images given a part of them; wrong files."""
    here = tmp_path_factory.mktemp("wrong")
    copy_of(trained()["glow"], here / "run")
    npz(here / "colour.npz", shape=(8, 8, 3))
    npz(here / "large.npz", shape=(16, 16))
    given = sets(data__name="npz", data__path=here / "colour.npz", model__context="downsample")
    for name, more in (
        ("classes", [*TINY_RUN, *sets(model__classes=10)]),
        ("points", ["--config", "realnvp_two_moons.yaml"]),
        ("given", [*TINY_RUN, *given]),
    ):
        options = [*more, *sets(train__num_steps=1, train__sample_every=9), "--run-dir", name]
        quick("train", *options, cwd=here).ok()
    texts = {
        "both.yaml": "train: {num_steps: 1, budget: 1min}\n",
        "sweep.yaml": "imagse: 3\nrows: [none]\n",
        "ranges.yaml": "images: 9\nranges: {data.n_bits: [8, 5]}\n",
        "open.yaml": "images: 9\nranges: {train.lr: {low: 1e-4}}\n",
        "text": "a file, not a folder\n",
        "text.png": "no picture\n",
        "gone.csv": "file,x\ngone.png,1\n",
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    plan = planned({"rows": ["none"], "images": 8}, load_config(find_config("glow_digits")), "")
    begin(here / "a_sweep", plan)
    np.savez(here / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(here / "huge.npz", mu=np.full(3, 1e200), sigma=np.eye(3))
    picture(here / "odd_run" / "checkpoints")
    (here / "odd_run" / ".lock").touch()
    (here / "empty").mkdir()
    (here / "loop").symlink_to("loop")
    for name in ("good", "sub/good", "a.png/b", "sub/a", "done/grid"):
        picture(here / f"{name}.png")
    picture(here / "wide.png", (9, 8))
    picture(here / "rgb.png", mode="RGB")
    np.save(here / "cut.npy", np.zeros((20, 8, 8), np.uint8))
    Image.new("L", (8, 8), 127).save(here / "grey.png")
    Image.new("L", (8, 8), 255).save(here / "white.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 6, 6))
    mask.save(here / "mask.png")
    return here


HUGE = 10**10
GIVEN = "not possible for a model of images given"
INPAINT = "inpaint run --image good.png --mask mask.png --out x"
# A command line, and what its message has.
TABLE = [
    ("evaluate run run", "run: expected KEY=VALUE"),
    ("evaluate data.root=x", "no MODEL given", "no run under runs/"),
    ("evaluate run model.width=3", "--set model.width=3", "only keys of data"),
    ("train --config sub", "--config sub: is a folder; for images, flowtrain train sub"),
    ("train glow_digits", "glow_digits: a configuration is named by --config glow_digits"),
    ("train --config glow_digits sub", "sub: expected KEY=VALUE", "--config"),
    ("train --for latents TINY", "--for: is for DATA"),
    ("train good.png", "DATA good.png: one image is not enough"),
    ("train nope", "DATA nope: neither a data set"),
    ("train loop", "loop"),
    ("train two_moons", "DATA two_moons: these are not images", "--config"),
    ("train digits --budget soon", "--budget: train.budget: expected a duration"),
    ("train --lr 1", "No such option: --lr", "train.lr=VALUE"),
    ("train data.root=~nobody_of_this_name/x", "data.root", "~nobody_of_this_name"),
    ("train TINY --run-dir text", "--run-dir text: cannot be used: it is a file; give the name"),
    ("train TINY data.name=npz", "data.path: missing; add data.path=PATH"),
    ("train TINY --run-dir odd_run", "--run-dir odd_run", "checkpoints is not a folder"),
    ("train TINY --run-dir new --init-from points", "does not fit this model", "by --config, and"),
    ("train --config causal_digits.yaml model.orders=2", "data.flip: the orders of model.orders"),
    ("train --config causal_digits.yaml model.orders=2 model.classes=10", "model.orders: 2"),
    ("train --config causal_digits.yaml model.orders=2 model.context=downsample", "model.orders"),
    ("train TINY --set data.name=imagenet64 --set data.version=oord2016", "train_64x64.tar"),
    ("train TINY LARGE --set train.batch_size=1048576", "a step of 1,048,576 x 1", "at most"),
    ("train --dry-run train.accumulate=1048576 train.batch_size=1048576", "1,048,576 x"),
    ("sweep --images 9 --out new", "sweep: no rows: give --try SETTINGS"),
    ("sweep --try none --out new", "sweep: give either --seconds or --images"),
    ("sweep --try model.widht=3 --images 9 --out new", "row model.widht=3", "model.width?"),
    ("sweep --try 'a=\"b' --images 9 --out new", 'row a="b: No closing quotation'),
    ("sweep --try seed=3 --images 9 --out new", "row seed=3: seed changes"),
    ("sweep --try train.num_steps=3 --images 9 --out new", "train.num_steps changes"),
    ("sweep --try none --images 9 --out new --set data.validation=0", "data.validation: 0"),
    ("sweep ranges.yaml --out new", "data.n_bits changes the meaning"),
    ("sweep open.yaml --out new", "train.lr: expected a list of values, or low and high"),
    ("sweep sweep.yaml --images 9 --out new", "sweep.yaml: imagse: unknown key; did you mean"),
    ("sweep both.yaml --images 9 --out new", "both.yaml: train: unknown key"),
    ("sweep a_sweep/sweep.yaml --out new", "sweep.yaml: base: a sweep's own plan; give"),
    ("evaluate run --mirror", "--mirror: the model was trained without mirror images"),
    ("evaluate run --data sub --split test", "--split test: sub has no splits"),
    ("evaluate run --data nope", "neither a data set", "mnist", "folder", ".png", ".npz"),
    ("evaluate run --data no.png", "no.png: there is no such file"),
    ("evaluate run --data sub data.path=empty", "--set data.path=empty: --data sub names the"),
    (f"evaluate run --draws {HUGE}", f"--draws {HUGE}: the scores of 180 images need"),
    ("sample run --out a.jpg", "--out a.jpg", ".png or .npz"),
    (f"sample run --num-images {HUGE}", f"--num-images {HUGE}: a picture of", "GiB are available"),
    ("sample run --temperature 1e400", "--temperature inf", "finite"),
    ("sample run --guidance 1e400", "--guidance inf", "finite"),
    ("sample run --method jacobi", "--method jacobi: ", "samples take one pass"),
    ("sample classes --classes 1,,2", "--classes 1,,2", "whole numbers"),
    ("sample classes --classes 10", "--classes 10", "0..9"),
    ("sample run --image good.png", "--image good.png", "model.context is none"),
    ("sample given --set data.path=no.npz", "no.npz"),
    ("sample given --image good.png --set data.root=x", "--set: these samples need no data"),
    ("sample run --stages --temperature 1", "--stages: only --num-images, --seed and --out"),
    ("sample points --stages", "--stages: pictures of points show them always"),
    (f"sample run --stages --num-images {HUGE}", f"--num-images {HUGE}: the test split has only"),
    ("interpolate given", GIVEN, "the image at 4x4 pixels"),
    (f"interpolate run --steps {HUGE}", f"--steps {HUGE}: a picture of 4 paths of 10,00"),
    ("interpolate run --pairs 91", "--pairs 91", "180 images"),
    ("interpolate run --images good.png text.png", "text.png cannot be read as an image"),
    ("interpolate run --from-class 4", "--from-class and --to-class"),
    ("interpolate points --from-class 1 --to-class 2", "--from-class 1", "no labels"),
    ("interpolate run --from-class 4 --to-class 12", "--to-class 12", "0 images"),
    ("interpolate run --from-class 4 --to-class 5 --images a b", "--images", "--from-class"),
    ("interpolate run --along a --from-class 1 --to-class 2", "--along and --from-class"),
    ("interpolate run --along a --images good.png good.png", "--images", "--image"),
    ("interpolate run --images a.png --out p.gif", "--images a.png --out: expected two image"),
    ("interpolate run --images good.png good.png data.root=x", "--images: not with KEY=VALUE"),
    ("interpolate run --image good.png", "--image, --strength and --no-stop: they need --along"),
    ("interpolate run --no-stop", "--no-stop: they need --along"),
    ("interpolate run --images good.png good.png --pairs 2", "--pairs 2: not with image files"),
    ("interpolate run --along a --strength nan", "--strength nan: expected a finite number"),
    ("interpolate run --along a data.name=npz data.path=large.npz", "data of shape (1, 16, 16)"),
    ("encode run --out x.npz", "give the images", "--images", "--split", "--data"),
    ("encode run --images good.png --split test --out x.npz", "--images: not with --data"),
    ("encode run --images good.png data.root=x --out x.npz", "--images: not with", "KEY=VALUE"),
    ("encode run --images good.png wide.png --out x.npz", "wide.png: expected", "repeat --images"),
    ("encode points --images good.png --out x.npz", "--images good.png", ".npy or .npz"),
    ("encode run --split validation --set data.validation=0 --out x.npz", "it is empty"),
    ("ood run sub --set data.split_seed=1", "data.split_seed: a trained model keeps its held-out"),
    ("encode run --split test data.validation=0 data.split_seed=1 --out x.npz", "its held-out"),
    ("encode points --images cut.npy --out x.npz", "cut.npy has the type uint8", "real"),
    ("decode points nan.npz --out x", "--out x: the model is of real-valued data", ".npz"),
    ("list run", "unexpected extra argument"),
    ("info both.yaml", "train.num_steps and train.budget: both are given"),
    ("info own.py:flow", "own.py:flow: a flow of other code, which has no checkpoint"),
    ("attributes run", "one of three ways", "--positive", "--csv", "--to-class"),
    ("attributes run --positive sub", "--positive and --negative: give both"),
    ("attributes run --positive a --negative b --to-class 1", "one of three ways"),
    ("attributes run --to-class 1 --from-class 1", "--to-class 1: it is the same class"),
    ("attributes run --from-class 1 --csv gone.csv", "these need --to-class"),
    ("attributes run --positive sub --negative a.png wide.png", "wide.png: expected", "repeat"),
    ("attributes run --csv gone.csv data.root=x", "KEY=VALUE: these need --to-class"),
    ("attributes run --to-class 1 --data sub", "--data sub: it has no classes"),
    ("attributes run --to-class 1 --images sub", "--images: needs --csv"),
    ("attributes run --csv gone.csv --name x", "--name x: the attributes of --csv"),
    (f"{INPAINT} --factor 2", "give one of --mask FILE"),
    (f"{INPAINT} --mask wide.png", "--mask wide.png: the image is 9x8"),
    (f"{INPAINT} --mask grey.png", "64 pixels are neither black", "PNG"),
    (f"{INPAINT} --mask good.png", "--mask good.png: it is all black"),
    (f"{INPAINT} --mask white.png", "--mask white.png: it is all white"),
    ("inpaint run --image good.png --factor 2 --out x", "good.png: the image is 8x8", "not 4x4"),
    ("inpaint run --image good.png --factor 3 --out x", "--factor 3: expected a number from 2"),
    (f"{INPAINT} --out done", "--out done: 'grid.png' already exists"),
    (f"{INPAINT} --steps 7", "--steps", "8"),
    (f"{INPAINT} --num-images 999999999", "--num-images 999999999: the chains need"),
    (INPAINT.replace("run", "classes") + " --class 10", "--class 10", "the classes 0..9"),
    ("explore points --no-browser", "points", "the explorer shows images", "flowtrain sample"),
    ("explore run --set data.name=npz --set data.path=large.npz", "(1, 16, 16) with 256 levels"),
    ("explore run --no-browser --host 192.0.2.1", "--host 192.0.2.1", "no server can listen"),
    ("doctor run --set data.name=npz --set data.path=colour.npz", "shape (3, 8, 8)"),
    ("ood run --data constant --in noise", "--in noise: neither a data set"),
    ("ood points --data noise", "is one of real values"),
    ("quality run --against nan.npz", "nan.npz: the statistics are not finite"),
    ("quality run --against huge.npz", "huge.npz: the statistics are not finite"),
    ("sweep --try none --images 9 --out a_sweep", "--out a_sweep: another sweep, whose data.root"),
    ("ood run", "IMAGES: give a folder, an image file or a name"),
    ("ood run noise --false-positives 1:100", "'--false-positives': 1:100", "such as 1% or 0.01"),
    ("ood run noise --maps text", "--maps text: ", "text is not a folder"),
    ("ood run sub --maps sub/heat", "--maps sub/heat: is in sub, whose images are compared"),
    ("quality points", "real values; the figures are of images"),
    ("quality given", GIVEN),
    ("quality run --images sub --temperature 0.5", "--images: not with options of sampling"),
    ("quality run --images large.npz --out large.npz", "--out large.npz: --images reads this file"),
    ("quality run --images nope", "--images nope: neither a data set"),
    ("quality run --against large.npz", "shape (1, 16, 16)", "of shape (1, 8, 8)"),
    ("quality run --temperature 1e400", "--temperature, --guidance: expected finite numbers"),
    ("report run --set data.name=npz --set data.path=gone.npz", "gone.npz: there is no such file"),
    ("compare empty", "empty/config.yaml", "No such file"),
    ("compare text", "text: is not a run directory"),
    ("push run a/b@v1 --dry-run", "a/b@v1: a revision cannot be uploaded to"),
    ("import . --from y0ast", ".: cannot be read: Is a directory"),
    ("export run --to torch --opset 18", "--opset 18: it is for --to onnx"),
    ("export given --to torch", GIVEN, "4x4 pixels (model.context)"),
    ("compress run --out x", "INPUT", "--split"),
    ("compress run empty --out x", "empty", "no image"),
    ("compress run good.png --split test --out x", "INPUT", "not both"),
    ("compress run good.png --out x data.root=y", "--set", "--split"),
    ("compress run rgb.png --out x", "rgb.png", "8x8 RGB", "8x8 L", "--fit packs copies"),
    ("compress run --fit --split test --out x", "--fit: only for image files"),
    ("compress run good.png sub/good.png --out x", "sub/good.png", "good.png"),
    ("compress run sub --out sub/good.png", "--out sub/good.png", "one of the files"),
    ("compress given rgb.png --out x", "an archive has no context", "4x4 pixels (model.context)"),
    ("compress points --split test --out x", "real-valued"),
]
# LARGE: a megabyte for each image.
WORDS_OF = {"TINY": TINY_RUN, "LARGE": sets(model__steps=16, model__width=512)}
# Values that an option takes in no command.
NEVER = {
    **dict.fromkeys(("--num-images", "--draws", "--pairs", "--batch-size", "--max-memory"), "0"),
    **dict.fromkeys(("--seed", "--temperature", "--guidance", "--port"), "-1"),
    **dict.fromkeys(("--from-class", "--to-class"), "-1"),
    **dict.fromkeys(("--weights", "--split", "--method"), "best"),
    "--steps": "1",
    "--score": "best",
    "--false-positives": "2",
    "--device": "abacus",
    "--until": "2",
}


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(base, "_log_warnings", lambda: None)

    def run(*words: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            COMMANDS(list(words), prog_name="flowtrain")
        return Result(ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("line, said", [(line, said) for line, *said in TABLE])
def test_wrong_input(line, said, folder, command, monkeypatch):
    before = tree(folder)
    words = [word for each in shlex.split(line) for word in WORDS_OF.get(each, [each])]
    monkeypatch.chdir(folder)
    done = command(*words)
    for new in ("new", "runs"):  # a refused start may leave a folder with a lock
        there = [path.name for path in (folder / new).rglob("*") if path.is_file()]
        assert there in ([], [".lock"])
        shutil.rmtree(folder / new, ignore_errors=True)
    done.failed(2, *said)
    assert done.err.count("\n") <= 6
    assert tree(folder) == before  # nothing written, nothing lost


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_the_example_in_the_help_of_a_command(name, tmp_path, command, monkeypatch):
    """With another option, a wrong value, no model, and outputs that cannot be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    words, options = [name, *example(name)], COMMANDS.commands[name].params
    command(name, "--nonsense").failed(2, "No such option")
    for option in options:
        flag = option.opts[0]
        if flag in NEVER:
            command(*words, flag, NEVER[flag]).failed(2, flag)
        if flag in ("--out", "--json", "--scores") and name != "decompress":
            path = "text/a" + ("." + option.metavar.partition(".")[2]).partition("|")[0].rstrip(".")
            command(*words, flag, path).failed(2, f"{flag} {path}: ", "text is not a folder")
    if any("MODEL" in (option.metavar or "") for option in options) and name != "train":
        done = command(*words)
        done.failed(2, words[1])
        assert done.err.count("\n") == 1
    assert tree(tmp_path) == ["text"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["evaluate", ""], "an argument is empty"),
        (["train", *TINY_RUN, "--run-dir="], "--run-dir= is empty: a value is missing"),
        ([os.fsdecode(b"\xff")], "No such command"),
    ],
)
def test_what_is_no_argument(words, said, tmp_path):
    quick(*words, cwd=tmp_path).failed(2, said)


def test_as_a_user_would_see_it(folder):
    """The table runs in this process; this does not."""
    done = flowtrain("train", *sets(model__stepz=3), cwd=folder).failed(2)
    assert done.out == ""
    assert done.err.startswith("flowtrain: ") and done.err.count("\n") == 1
    assert done.err.endswith("model.stepz: unknown key; did you mean model.steps? (value 3)\n")


def test_a_name_that_is_no_text(tmp_path):
    """As a run directory it is refused; the files of such a name can be read, and are printed."""
    name = os.fsdecode(b"bad\xff")
    done = flowtrain("train", *TINY_RUN, "--run-dir", name, cwd=tmp_path)
    done.failed(2, "--run-dir bad?: its name is not UTF-8")
    assert tree(tmp_path) == []
    copy_of(trained()["glow"], tmp_path / name)
    done = quick("evaluate", name, "--num-images", 2, cwd=tmp_path).ok()
    assert "bad\\udcff" in done.out
