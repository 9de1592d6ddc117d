"""The sound files that `fuzz.py` damages. They are the same each time."""

import re
import shutil
from pathlib import Path

import children
import numpy as np
from catalogue import WORDS, sets
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format

TRAIN = [
    *["train", *WORDS["glow"]],
    *sets(train__batch_size=16, train__num_steps=6, train__log_every=1, train__ema=0.9),
    *sets(train__validate_every=4, train__checkpoint_every=4, train__sample_every=50),
    *sets(train__keep_checkpoints=2, data__validation=20),
]
SIDE = 8
# A command that trains on a folder of images.
ON_FOLDER = [*TRAIN, *sets(data__name="folder", data__path="pictures", data__size=SIDE)]
ON_FOLDER += sets(data__validation=2, train__num_steps=1)
# The formats of pictures, with the mode that each is saved in.
PICTURES = {"grey.png": "L", "colour.png": "RGB", "alpha.png": "RGBA", "palette.png": "P"}
PICTURES |= {"deep.png": "I;16", "photo.jpg": "RGB", "photo.webp": "RGB", "one.bmp": "RGB"}
PICTURES |= {"one.gif": "P", "one.tiff": "RGB", "one.ppm": "RGB"}


def make(folder: Path) -> None:
    """Makes in a new folder: `run` (at step 4 of 6), `other` (finished), `colour` (of colour
    images), `moons` (of points); for `run` archives, latents and attributes, two of each; for
    `colour` `pictures` with their `cache`, `x.npz`, `other.npz`, `table.csv` and `mask.png`; for
    `moons` `points.npz` and `points.npy`.
    """
    folder.mkdir(parents=True)

    def run(*words):
        done = children.run([str(word) for word in words], folder)
        assert done.code == 0, done

    run(*TRAIN, "--run-dir", "other")
    shutil.copytree(folder / "other", folder / "run")
    for each in ("run", "other"):
        for file in (folder / each).glob("events*"):
            file.unlink()
        _timeless(folder / each)
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step-00000004.safetensors").rename(checkpoints / "last.safetensors")
    (checkpoints / "step-00000006.safetensors").unlink(missing_ok=True)
    run("evaluate", "run", "--num-images", 20)
    compress = ["compress", "run", "--split", "test", "--num-images"]
    run(*compress, 12, "--out", "embedded.fta", "--embed")
    run(*compress, 40, "--out", "apart.fta")
    draw = np.random.default_rng(0)
    _pictures(folder / "pictures", draw)
    pixels = draw.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", x_train=pixels, y_train=np.arange(24) % 10)
    np.savez_compressed(folder / "other.npz", x_train=pixels, x_test=pixels[:8])
    run(*ON_FOLDER, "--run-dir", "colour")
    for name, split, method in (("", "test", "difference"), ("other-", "train", "logistic")):
        run("encode", "run", "--split", split, "--num-images", 6, "--out", f"{name}z.npz")
        for label, attribute in enumerate(("zero", "one")):
            words = ["--to-class", label, "--name", attribute, "--method", method]
            run("attributes", "run", *words, "--num-images", 40)
        (folder / "run" / "attributes.npz").rename(folder / f"{name}attributes.npz")
    small = sets(model__levels=1, model__width=8, model__blocks=0, train__num_steps=2)
    small += sets(data__validation=16, data__test_count=16, train__sample_every=50)
    run("train", "--config", "realnvp_two_moons.yaml", *small, "--run-dir", "moons")
    run("sample", "moons", "--num-images", 9, "--out", "points.npz")
    with np.load(folder / "points.npz") as sampled:
        np.save(folder / "points.npy", sampled["images"])
    rows = "".join(f"{name},{i % 2},{i % 3 % 2}\n" for i, name in enumerate(sorted(PICTURES)))
    (folder / "table.csv").write_text("file,even,third\n" + rows)
    missing = np.zeros((SIDE, SIDE), dtype=np.uint8)
    missing[2:5, 3:] = 255
    Image.fromarray(missing).save(folder / "mask.png")


def _timeless(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        saved = checkpoint_format.read(path)
        meta = {**saved.meta, "progress": {**saved.meta["progress"], "seconds": 1.0}}
        path.unlink()
        checkpoint_format.write(path, meta, saved.tensors)
    for path in (run / "summary.json", run / "metrics.jsonl"):
        text = re.sub(r'("(seconds|images_per_second)": )[^,}\n]+', r"\g<1>1.0", path.read_text())
        path.write_text(text)


def _pictures(folder: Path, draw: np.random.Generator) -> None:
    folder.mkdir()
    for name, mode in PICTURES.items():
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
        else:
            image = Image.fromarray(pixels).convert(mode)
        image.save(folder / name)
