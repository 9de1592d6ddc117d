"""Every data set: its options, and what it says before anything is read."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
from catalogue import POINTS
from helpers import REPOSITORY

from flowtrain.config import Data, component, component_names

DOWNLOADED = {  # name: shape, flip
    "mnist": ((1, 28, 28), False),
    "fashion_mnist": ((1, 28, 28), False),
    "cifar10": ((3, 32, 32), True),
    "cifar100": ((3, 32, 32), True),
    "svhn": ((3, 32, 32), False),
}
OTHERS = {"digits", "folder", "hub", "imagenet32", "imagenet64", "npz", "sphere"}


def test_every_data_set_is_tested():
    assert set(component_names(Data)) == {*DOWNLOADED, *OTHERS, *POINTS}


@pytest.mark.parametrize("name", [*DOWNLOADED, *sorted(OTHERS)])
def test_signature_is_a_schema(name):
    parameters = inspect.signature(component(Data, name).build).parameters
    assert list(parameters)[:3] == ["root", "split", "seed"]
    options = list(parameters.values())[3:]
    assert all(o.kind == o.KEYWORD_ONLY and o.annotation is not o.empty for o in options)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_described_before_anything_is_read(name, tmp_path):
    for split in ("train", "test"):
        images = component(Data, name).build(tmp_path / "none", split)
        assert (images.shape, images.flip) == DOWNLOADED[name]
        assert images.levels == 256 and images.key is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.levels = 2


def test_importing_is_light():
    code = (
        "import sys, pkgutil, importlib, flowtrain.datasets as d\n"
        "before = set(sys.modules)\n"
        "for m in pkgutil.iter_modules(d.__path__):\n"
        "    importlib.import_module('flowtrain.datasets.' + m.name)\n"
        "new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'torchvision', 'sklearn', 'rich'}, new"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
