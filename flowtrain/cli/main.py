"""The command line: the commands of the core and of the tools in `flowtrain/tools`."""

import importlib
import io
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO, cast

import typer

from flowtrain.cli import catalogue, decode, encode, evaluate, info, interpolate, sample, train
from flowtrain.errors import UserError
from flowtrain.system.files import PerhapsUnread

GRACE_SECONDS = 10.0  # between a signal and the end of a process that goes on in spite of it

app = typer.Typer(
    help="Train normalizing flows on images, and get likelihoods that can be trusted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANELS = ["Train and measure", "Draw and edit", "Check", "Files", "Share"]
MEASURE, DRAW, _, FILES, _ = PANELS
app.command(cls=train.Settings, epilog=train.EPILOG, rich_help_panel=MEASURE)(train.train)
app.command(epilog=evaluate.EPILOG, rich_help_panel=MEASURE)(evaluate.evaluate)
app.command("list", epilog=catalogue.EPILOG, rich_help_panel=MEASURE)(catalogue.catalogue)
app.command(epilog=info.EPILOG, rich_help_panel=MEASURE)(info.info)
app.command(epilog=sample.EPILOG, rich_help_panel=DRAW)(sample.sample)
app.command(epilog=interpolate.EPILOG, rich_help_panel=DRAW)(interpolate.interpolate)
app.command(epilog=encode.EPILOG, rich_help_panel=FILES)(encode.encode)
app.command(epilog=decode.EPILOG, rich_help_panel=FILES)(decode.decode)
# The folder of a tool has a module `command`.
for path in sorted((Path(__file__).parents[1] / "tools").glob("*/command.py")):
    importlib.import_module(f"flowtrain.tools.{path.parent.name}.command").add_to(app)
# `--help` shows the panels in the order of their first commands.
app.registered_commands.sort(key=lambda each: PANELS.index(str(each.rich_help_panel)))


def _print_version(value: bool) -> None:
    if value:
        import flowtrain

        typer.echo(f"flowtrain {flowtrain.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _stop(signum: int, frame: FrameType | None) -> None:
    # A library may catch everything that is raised in it.
    end = threading.Timer(GRACE_SECONDS, os._exit, [128 + signum])
    end.daemon = True
    end.start()
    raise SystemExit(128 + signum)


def main() -> None:
    # Signal handlers and libraries write to standard streams. If one was closed before (`>&-`), no
    # later file gets its number.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    # Process 1 of a container gets only signals that it has a handler for. `train` has its own.
    signal.signal(signal.SIGTERM, _stop)
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(hangup, _stop)
    # Operations that Apple's GPUs lack, such as the normal quantiles of variational dequantization,
    # run on the CPU. torch reads this variable when it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # File names may be no text at all. They are printed with escapes, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # The files of a command are written, even if `head` has read enough of its output. A stream
    # that was closed before is None, which all printing accepts.
    sys.stdout, sys.stderr = (
        stream and cast(TextIO, PerhapsUnread(stream, BrokenPipeError))
        for stream in (sys.stdout, sys.stderr)
    )
    for word in sys.argv[1:]:
        if not word or re.fullmatch(r"--[\w-]+=", word):
            # As a path it would be the current folder, which `--run-dir "$DIR"` does not mean.
            typer.echo(f"flowtrain: {word or 'an argument'} is empty: a value is missing", err=True)
            raise SystemExit(UserError.exit_code)
    app(prog_name="flowtrain")
