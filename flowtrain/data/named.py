"""Data that a command line names: a data set, a folder, an image file, or files of arrays."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from flowtrain import config as configuration
from flowtrain.config import Data as DataConfig
from flowtrain.datasets import folder, vectors
from flowtrain.datasets.base import Images
from flowtrain.errors import UserError, did_you_mean
from flowtrain.types import Shape


def section_named(
    name: str, own: DataConfig, shape: Shape, option: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The `data` section for a NAME on the command line.

    NAME is a data set that needs no path, the model's own data set, a folder of image files, an
    image file, or what `flowtrain.datasets.npz` reads, for a model of vectors or points what
    `flowtrain.datasets.vectors` reads. All keys that fit are taken from `own`, the
    section of the model. Image files get the size and channels of `shape`, the model's.

    Raises `UserError` that names `option` if NAME is none of these. The message also lists `also`.
    """
    section = own.model_dump(mode="json")
    if name == own.name:
        return section
    known = configuration.component_names(DataConfig)
    schemas = {kind: configuration.component_schema(DataConfig, kind) for kind in known}
    names = [kind for kind, schema in schemas.items() if "path" not in schema.model_fields]
    path = Path(name)
    values: dict[str, Any]
    if name in names:
        values = {"name": name}
    elif shape[1:] == (1, 1) and path.suffix.lower() in vectors.SUFFIXES:
        values = {"name": "vectors", "path": name}
    elif path.suffix.lower() in (".npz", ".npy") or any(path.glob("x_train*.npy")):
        values = {"name": "npz", "path": name}
    elif path.is_dir() or path.suffix.lower() in folder.SUFFIXES:
        values = {"name": "folder", "path": name, "size": max(shape[1:]), "channels": shape[0]}
    else:
        raise UserError(
            f"{option} {name}: neither a data set ({', '.join((*names, *also))}), nor a folder, "
            f"nor an image file ({', '.join(folder.SUFFIXES)}), nor an .npz or .npy file"
            f"{did_you_mean(name, (*names, *also))}"
        )
    if "path" in values and not path.exists():
        raise UserError(f"{option} {name}: there is no such file")
    # Options that only some data sets have are kept only for the same data set. Flips and shifts
    # are for training.
    kept = {*DataConfig.model_fields}
    if values["name"] == own.name:
        kept = {*schemas[own.name].model_fields}
    kept -= {"flip", "shift"}
    return {**{key: value for key, value in section.items() if key in kept}, **values}


def source(data: DataConfig) -> tuple[str, str]:
    """Name and place of a data set, the same for every spelling of its path."""
    options = data.options()
    path = options.get("path")
    return data.name, os.path.realpath(path) if path else options.get("repository", "")


def undivided(config: DataConfig, own: DataConfig) -> Images | None:
    """All images, in order, of data without a test split: an image file, a folder without `test/`,
    arrays or vectors without x_test. None for all other data, and for the model's `own`. Training
    holds out a tenth as the test split. Evaluation of a model on other data uses them all.
    """
    options = config.options()
    path = options.get("path", Path())
    if source(config) == source(own):
        return None
    if config.name in ("npz", "vectors"):
        build = configuration.component(DataConfig, config.name).build
        images: Images = build(config.root, "test", **options)
        if images.rows is None:  # it has x_test
            return None
        return dataclasses.replace(images, rows=None, labels=None)
    if config.name == "folder" and not (path / "test").is_dir():
        shape = (options["channels"], options["size"], options["size"])
        names = [path.name] if path.is_file() else [f.name for f in folder.files_of(path, "")]
        files = [path] if path.is_file() else [path / name for name in names]
        named = files if path.is_file() else []
        kept: list[int] = []

        def decode() -> np.ndarray:
            kept[:], x = folder.read_files(files, named, "--data", shape, 256, options["resize"])
            return x

        return Images(
            shape=shape, num_bins=256, read=decode, names=lambda: [names[i] for i in kept]
        )
    return None
