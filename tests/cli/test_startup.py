"""The imports of a command, for which a user waits."""

import re
import subprocess
import sys

import pytest
from catalogue import SMALL, sets
from cli_helpers import flowtrain, trained
from helpers import npz

pytestmark = pytest.mark.run

HEAVY = {"torch", "numpy", "sklearn", "scipy", "torchvision", "tensorboard", "PIL", "safetensors"}
HEAVY |= {"yaml", "flowtrain.config"}


def imported(*args, cwd) -> set[str]:
    """The modules that `python -m flowtrain ARGS` imports."""
    command = (sys.executable, "-X", "importtime", "-m", "flowtrain")
    done = flowtrain(*args, cwd=cwd, command=command).ok()
    names = set(re.findall(r"^import time:.*\| +(\S+)$", done.err, re.MULTILINE))
    assert "flowtrain.cli.main" in names
    return names


@pytest.mark.parametrize(
    "words, more",
    [
        (["--help"], {"pydantic"}),
        (["--version"], {"pydantic", "rich"}),
        (["sample", "--help"], set()),  # Typer imports pydantic for options that have a type
    ],
)
def test_the_command_line_starts_without_torch(words, more, tmp_path):
    assert not imported(*words, cwd=tmp_path) & (HEAVY | more)


def test_training_imports_what_it_uses(tmp_path):
    npz(tmp_path / "data.npz", train=200)
    options = [*SMALL, *sets(data__name="npz", data__path="data.npz", train__num_steps=1)]
    names = imported("train", *options, "--run-dir", "run", cwd=tmp_path)
    assert "torch" in names and (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()
    assert list((tmp_path / "run" / "samples").iterdir()), "no grid was drawn"
    assert not names & {"torchvision", "sklearn", "scipy", "matplotlib"}


def test_sampling_imports_what_it_uses(tmp_path):
    names = imported("sample", trained()["glow"], "--num-images", 4, "--out", "s.png", cwd=tmp_path)
    assert "torch" in names and (tmp_path / "s.png").exists()
    unused = {"torch._dynamo", "torchvision", "sklearn", "scipy", "tensorboard", "matplotlib"}
    assert not names & unused


def test_importing_the_package_is_light(tmp_path):
    code = "import sys, flowtrain; flowtrain.__version__; assert flowtrain.load; "
    code += "assert not set(sys.modules) & {'torch', 'numpy', 'typer', 'pydantic'}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_what_torch_reads_is_set_before_its_import(tmp_path):
    code = (
        "import os, sys, runpy\nsys.argv = ['flowtrain', '--help']\n"
        "os.environ.pop('PYTORCH_ENABLE_MPS_FALLBACK', None)\n"
        "try: runpy.run_module('flowtrain', run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules\n"
        "assert os.environ['PYTORCH_ENABLE_MPS_FALLBACK'] == '1'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
