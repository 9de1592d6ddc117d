"""The sound files that `fuzz.py` damages. They are the same each time, whatever the clock says."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import children
import numpy as np
from catalogue import WORDS, sets
from PIL import Image

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.tools.archive import format as archive_format

TRAIN = [
    *["train", *WORDS["glow"]],
    *sets(train__batch_size=16, train__num_steps=6, train__log_every=1, train__ema=0.9),
    *sets(train__validate_every=4, train__checkpoint_every=4, train__sample_every=50),
    *sets(train__keep_checkpoints=2, data__validation=20),
]
SIDE = 8
LATENTS = ["z.npz", "other-z.npz"]
ATTRIBUTES = ["attributes.npz", "other-attributes.npz"]
# Along an attribute, which the file beside the model has.
ALONG = ["interpolate", "run", "--along", "one", "--pairs", "2", "--steps", "3", "--out", "i.png"]
# The formats of pictures, with the mode that each is saved in.
PICTURES = {
    "grey.png": "L",
    "colour.png": "RGB",
    "alpha.png": "RGBA",
    "palette.png": "P",
    "deep.png": "I;16",
    "photo.jpg": "RGB",
    "photo.webp": "RGB",
    "one.bmp": "RGB",
    "one.gif": "P",
    "one.tiff": "RGB",
    "one.ppm": "RGB",
}


@dataclass(frozen=True)
class Sound:
    """A folder with the files.

    folder: Has `run` (at step 4 of 6), `other` (finished), `colour` (a model of colour images),
        `moons` (a model of points), `pictures` and their `cache`, `x.npz`, `other.npz`, and the
        archives `embedded.fta` and `apart.fta`, each with the images in it in `NAME.images`. Of the
        model `run` there are two files of latents (`LATENTS`), with what they decode to in
        `NAME.images.npz`, and two of attributes (`ATTRIBUTES`), with the path along `one` in
        `NAME.png`. `points.npz` and `points.npy` are for `moons`. `table.csv` is for `colour`, and
        so is `mask.png`, for images of its size.
    levels: Q of the model.
    bits_per_dim: Of `colour` on each npz.
    """

    folder: Path
    levels: int
    bits_per_dim: dict[str, float]

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def unpacked(self, archive: str) -> list[Path]:
        """The images of an archive."""
        return list((self.folder / f"{archive}.images").glob("*.png"))


def on_folder(folder: Path) -> list[str]:
    """A command that trains on a folder of images."""
    of_folder = sets(data__name="folder", data__path=folder, data__size=SIDE, data__validation=2)
    return [*TRAIN, *of_folder, *sets(train__num_steps=1)]


def make(folder: Path) -> Sound:
    """Makes the files in a new folder."""
    folder.mkdir(parents=True)

    def run(*words):
        done = children.run([str(word) for word in words], folder)
        assert done.code == 0, done
        return done.out

    run(*TRAIN, "--run-dir", "other")
    shutil.copytree(folder / "other", folder / "run")
    for each in ("run", "other"):
        for file in (folder / each).glob("events*"):
            file.unlink()
        _timeless(folder / each)
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step-00000004.safetensors").rename(checkpoints / "last.safetensors")
    (checkpoints / "step-00000006.safetensors").unlink(missing_ok=True)
    (folder / "run" / ".lock").unlink()
    run("evaluate", "run", "--num-images", 20)
    run(
        "compress", "run", "--split", "test", "--num-images", 12, "--out", "embedded.fta", "--embed"
    )
    run("compress", "run", "--split", "test", "--num-images", 40, "--out", "apart.fta")
    draw = np.random.default_rng(0)
    _pictures(folder / "pictures", draw)
    pixels = draw.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", x_train=pixels, y_train=np.arange(24) % 10)
    np.savez_compressed(folder / "other.npz", x_train=pixels, x_test=pixels[:8])
    run(*on_folder(folder / "pictures"), "--run-dir", "colour")
    for name in ("embedded.fta", "apart.fta"):
        run("decompress", name, "--out", f"{name}.images")
    bits = {}
    for name in ("x.npz", "other.npz"):
        result = json.loads(run("evaluate", "colour", "--data", name, "--json", "-"))
        bits[name] = result["bits_per_dim"]
    _latents(folder, run)
    saved = checkpoint_format.read(checkpoints / "last.safetensors")
    return Sound(folder, saved.meta["levels"], bits)


def _latents(folder: Path, run: Callable[..., str]) -> None:
    """Files of latents and of attributes, points, and a table of images with attributes."""
    for name, split, count in zip(LATENTS, ("test", "train"), (6, 4), strict=True):
        run("encode", "run", "--split", split, "--num-images", count, "--out", name)
        run("decode", "run", name, "--out", f"{name}.images.npz")
    for name, method in zip(ATTRIBUTES, ("difference", "logistic"), strict=True):
        for label in (0, 1):
            words = ["--to-class", label, "--name", ["zero", "one"][label], "--method", method]
            run("attributes", "run", *words, "--num-images", 40)
        run(*ALONG[:-1], f"{name}.png")
        (folder / "run" / "attributes.npz").rename(folder / name)
    points = [
        "--config",
        "realnvp_two_moons.yaml",
        *sets(model__levels=1, model__width=8, model__blocks=0),
    ]
    points += sets(train__num_steps=2, data__validation=16, data__test_count=16)
    run("train", *points, *sets(train__sample_every=50), "--run-dir", "moons")
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
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "seconds": 1.0}, indent=2) + "\n")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    clock = {"seconds": 1.0, "images_per_second": 100.0}
    lines = [json.dumps({key: clock.get(key, row[key]) for key in row}) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines))


def _pictures(folder: Path, draw: np.random.Generator) -> None:
    folder.mkdir()
    for name, mode in PICTURES.items():
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        if mode == "I;16":
            deep = pixels[..., 0].astype(np.uint16) << 8
            image = Image.fromarray(deep)
        elif mode != "RGB":
            image = image.convert(mode)
        image.save(folder / name)


def archive_parts(path: Path) -> tuple[dict, list[bytes]]:
    """The description of an archive, without lengths, and its parts."""
    described, parts = archive_format.unpack(path, path.read_bytes(), 2**28)
    content = described.model_dump(exclude={"lengths"}, exclude_none=True)
    return json.loads(json.dumps(content)), parts
