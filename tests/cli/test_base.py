"""What the commands share."""

import errno
import os
import re
import warnings
from pathlib import Path

import pytest
import typer

from flowtrain.checkpoints.load import find
from flowtrain.cli import base
from flowtrain.cli.base import check_suffix, command, require_file
from flowtrain.cli.main import app
from flowtrain.errors import UserError
from flowtrain.flow.flow import Flow
from flowtrain.system import threads
from flowtrain.system.console import console


def test_outputs_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "model.SAFETENSORS").touch()
    rows = {"": "is a folder", "pipe.png": "is not a regular file"}
    for path, said in (rows | {"model.SAFETENSORS": "is a checkpoint"}).items():
        with pytest.raises(UserError, match=f"--json .*: {said}"):
            require_file(tmp_path / path, "--json")
    require_file("-")
    assert check_suffix(None, (".png", ".npz")) == ".png"


def test_warnings_of_pillow_are_no_messages():
    """Pillow warns of pictures that it reads all the same."""

    @command
    def reads_a_picture():
        for module in ("PIL.Image", "torch"):
            warnings.warn_explicit("large", UserWarning, "file.py", 1, module)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        reads_a_picture()
    assert len(shown) == 1


def test_a_working_directory_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(typer.Exit) as ended:
        command(lambda: pytest.fail("it began"))()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err.startswith("flowtrain: the working directory: No such file")


def test_a_folder_that_cannot_be_searched(monkeypatch, capsys):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", denied)
    with pytest.raises(typer.Exit) as ended:
        command(find)("locked/run")
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "flowtrain: locked/run: Permission denied\n"


@pytest.mark.parametrize(
    "name, options",
    [
        ("sample", {}),
        ("interpolate", {}),
        ("evaluate", {}),
        ("ood", {"outside": ["noise"]}),
        ("doctor", {}),
        ("report", {}),
        ("attributes", {"to_class": 4}),
        ("push", {"repository": "me/it", "dry_run": True}),
        ("quality", {"json_out": "-", "against": "gone.npz"}),  # parts of the samples
    ],
)
def test_a_run_where_nothing_can_be_written_is_refused_first(
    name, options, tmp_path, monkeypatch, capsys
):
    """By the commands that write into the run if they are not told where."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "stderr", False)  # --json - changes it
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Flow, "draw_latents", lambda *_: pytest.fail("it samples"))
    monkeypatch.setattr(Flow, "forward", lambda *_: pytest.fail("it computes"))
    commands = {each.callback.__name__: each.callback for each in app.registered_commands}
    with pytest.raises(typer.Exit) as ended:
        commands[name](model="glow_digits", **options)
    assert ended.value.exit_code == 2
    said = capsys.readouterr().err
    assert "there is no permission to write into" in said
    option = "--json" if name in ("evaluate", "ood", "doctor") else "--out"
    assert (f": give {option} FILE\n" in said) == (name not in ("attributes", "push", "quality"))


def test_help_texts_are_wrapped_by_the_terminal_alone():
    """Typer keeps line breaks within a paragraph."""
    for each in app.registered_commands:
        assert not re.search(r"[^\n]\n[^\n]", each.callback.__doc__), each.callback


def test_the_number_of_threads_is_printed_by_training_alone(monkeypatch, capsys):
    monkeypatch.setattr(threads, "use_free_cores", lambda: "threads: 1")
    base._prepare_cpu.cache_clear()
    assert base.device_of("cpu").type == base.device_of("cpu", announce=True).type == "cpu"
    assert capsys.readouterr().out == "threads: 1\n"
