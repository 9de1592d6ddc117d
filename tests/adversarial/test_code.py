"""A checkpoint from a stranger runs no code without `--trust-code`, in any command."""

import shutil

import pytest
import yaml
from catalogue import TINY_RUN
from cli_helpers import COMMANDS, copy_of, example, last, quick, trained
from coding_helpers import foreign_archive

from flowtrain.checkpoints import format as checkpoint_format

pytestmark = pytest.mark.run

# The examples of commands with `--trust-code`. `crafted` is a run directory.
READING = [
    [name, *example(name, "crafted")]
    for name, command in COMMANDS.commands.items()
    if any("--trust-code" in option.opts for option in command.params)
]
# What else reads a checkpoint or an archive.
READING += [
    ["train", *TINY_RUN, "--run-dir", "crafted"],
    ["train", *TINY_RUN, "--run-dir", "new", "--resume", "crafted"],
    ["train", *TINY_RUN, "--run-dir", "new", "--resume", "crafted/checkpoints/last.safetensors"],
    ["train", *TINY_RUN, "--run-dir", "new", "--init-from", "crafted"],
    ["train", *TINY_RUN, "--dry-run", "--run-dir", "crafted"],
    ["decompress", "embedded.fta", "--out", "new"],
    ["decompress", "digits.fta", "--out", "new", "--model", "crafted"],
    ["compare", "crafted", "crafted"],
]


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
    for archive, model in (("embedded", last(run).read_bytes()), ("digits", None)):
        (folder / f"{archive}.fta").write_bytes(foreign_archive(str(last(run)), model))


@pytest.mark.parametrize("section", ["model", "data"])
@pytest.mark.parametrize("name", ["intruder", "package.intruder"])
def test_no_command_imports_what_a_checkpoint_names(section, name, tmp_path):
    craft(tmp_path, section, name)
    # Without a dot a name is refused where all commands read it, so a few commands show it.
    for command in READING if "." in name else READING[::6]:
        done = quick(*command, cwd=tmp_path)
        unread = {"--init-from", "--dry-run", "compare"} & set(command)  # is the configuration
        if unread and command[0] != "push":
            done.ok()
        else:
            done.failed(2, f"{section}.name", name)
        assert not (tmp_path / "executed").exists(), command
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    quick("evaluate", "crafted", "--trust-code", cwd=tmp_path)
    assert (tmp_path / "executed").exists() == ("." in name)
