"""`flowtrain train`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import (
    DeviceOption,
    SettingOptions,
    command,
    device_of,
    fail,
    on_all_processes,
)
from flowtrain.errors import UserError

if TYPE_CHECKING:
    import torch

    from flowtrain.config import Train
    from flowtrain.training.dry_run import Cost

MIB = 2**20


def _complete_config(incomplete: str) -> list[tuple[str, str]]:
    configs = configfiles.shipped_configs().items()
    return [
        (name, configfiles.headline(path)) for name, path in configs if name.startswith(incomplete)
    ]


EPILOG = "Example: [cyan]flowtrain train --config glow_mnist_small train.budget=20min[/cyan]"


class Settings(TyperCommand):
    """Its help lists the configurations. An option that is a key gets a hint."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[DATA]", "[KEY=VALUE]..."]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        rows = [f"[bold]{name}[/bold]  {headline}" for name, headline in _complete_config("")]
        title = "[bold]Configurations that come with flowtrain:[/bold]"
        self.epilog = "\n\n".join([EPILOG, title, *rows])
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Versions of typer differ in where the class is: in click, or in a copy of it.
            if type(error).__name__ != "NoSuchOption":
                raise
            from flowtrain.config import keys_like

            option = vars(error)["option_name"].lstrip("-").replace("-", "_")
            if found := keys_like(option):
                fail(
                    f"No such option: --{option}; a key of the configuration is set by "
                    f"{found[0]}=VALUE",
                    UserError.exit_code,
                )
            raise


@command
@on_all_processes
def train(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=_complete_config,
            help="A YAML file: as given, in configs/, or one that comes with flowtrain (below).",
            show_default=f"{configfiles.DEMO}, without DATA",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="With DATA: the time of training, such as 90s, 30min or 1.5h.",
            show_default="30min",
        ),
    ] = None,
    purpose: Annotated[
        Literal["likelihood", "pictures", "latents"] | None,
        typer.Option(
            "--for",
            help="With DATA: the best bits/dim, the best samples, or latents for edits and paths.",
            show_default="likelihood",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write everything to this directory.",
            show_default="runs/<name of the configuration or data>",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|CHECKPOINT",
            help="auto continues from the last checkpoint in the run directory; never refuses a "
            "directory with a run.",
        ),
    ] = "auto",
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Continue the run in the run directory, finished or not, with the length and the "
            "training settings of this command. Changes are printed.",
        ),
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Start from this model's weights (fine-tuning)."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, operations, memory and estimated time, and stop."
        ),
    ] = False,
    until: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Pause after this share of the run's length, with a validation. The same command "
            "with a larger share continues as if it had not paused.",
        ),
    ] = 1.0,
    device: DeviceOption = "auto",
    *,
    settings: SettingOptions,
) -> None:
    """Train a flow. The same command resumes a stopped run.

    For DATA (a folder of images, a data set, or an .npz file) in place of --config, a configuration
    is chosen that suits the data, --budget and --for.
    """
    from flowtrain import config as configuration
    from flowtrain.system.device import mention_slow_bf16, mention_unused

    if extend and resume != "auto":
        raise UserError(f"--extend: uses the last checkpoint, so not with --resume {resume}")
    if init_from and (extend or resume not in ("auto", "never")):
        raise UserError("--init-from: starts a run, so not with --extend or --resume CHECKPOINT")
    data, settings.settings = _data_and_settings(settings.settings or [], config)
    words = settings.words("; a configuration is named by --config")
    target = device_of(device, announce=True)
    mention_unused(device, target)
    if data is not None:
        from flowtrain.training import dial

        purpose, budget = purpose or "likelihood", budget or "30min"
        path = Path(data).resolve()
        run_dir = run_dir or Path("runs") / f"{path.name if path.is_dir() else path.stem}-{purpose}"
        loaded = dial.configured(data, budget, purpose, words, run_dir, target)
    elif budget or purpose:
        raise UserError(
            f"{'--for' if purpose else '--budget'}: is for DATA, such as a folder of images; with "
            "a configuration, set train.budget=TIME"
        )
    else:
        path = configfiles.find_config(config or configfiles.DEMO)
        run_dir = run_dir or Path("runs") / path.stem
        loaded = configuration.load_config(path, words)
    mention_slow_bf16(loaded.train.precision, target)
    if dry_run:
        from flowtrain.training.dry_run import dry_run as run_dry

        _print_cost(run_dry(loaded, target), loaded.train, target)
        return
    from flowtrain.training.loop import fit
    from flowtrain.training.resume import EXTEND
    from flowtrain.training.run_directory import RunDirectory

    fit(loaded, RunDirectory(run_dir), target, EXTEND if extend else resume, init_from, until)


def _data_and_settings(words: list[str], config: str | None) -> tuple[str | None, list[str]]:
    """DATA, if there is no `--config` and exactly one word is no setting, and the other words."""
    data = [word for word in words if "=" not in word or os.path.lexists(word)]
    if config is not None or len(data) != 1:
        return None, words
    if data[0] in configfiles.shipped_configs() and not os.path.lexists(data[0]):
        raise UserError(f"{data[0]}: a configuration is named by --config {data[0]}")
    return data[0], [word for word in words if word != data[0]]


def _print_cost(cost: "Cost", train: "Train", device: "torch.device") -> None:
    from flowtrain.system.console import console, duration
    from flowtrain.training.dry_run import TIMED_STEPS

    total = sum(cost.parameters.values())
    console.print(f"parameters: {total}")
    for name, count in cost.parameters.items():
        console.print(f"  {name}: {count:,} ({100 * count / total:.1f}%)")
    compute, memory = cost.compute, cost.memory
    console.print(
        f"compute: {compute.image_flops / 1e9:.4g} GFLOP of products and convolutions for the "
        f"likelihood of an image, {100 * compute.conditioners:.1f}% of it in conditioners; "
        f"{compute.step_flops / 1e9:.4g} GFLOP per training step"
    )
    console.print(
        f"memory: {memory.fixed_bytes / MIB:,.0f} MiB for weights, gradients and optimizer, and "
        f"for activations, with {memory.available_bytes / MIB:,.0f} MiB available:"
    )
    for each in memory.modes:
        console.print(
            f"  {each.mode}: {each.needed_bytes / MIB:,.0f} MiB for {train.batch_size} images, up "
            f"to {each.largest_batch:,} images would fit"
            f"{' (chosen)' if each.mode == train.memory else ''}"
        )
    console.print(
        f"checkpoints: {memory.copy_bytes / MIB:,.0f} MiB of the host's memory for a copy, which "
        f"is written during training"
        if memory.copy_bytes
        else "checkpoints: no memory for a copy, so training waits while one is written"
    )
    seconds = cost.step_seconds
    if seconds is None:
        elsewhere = train.cuda_graph and device.type != "cuda"
        reason = "train.cuda_graph needs a CUDA device" if elsewhere else "that would not fit"
        console.print(f"speed: not measured, because {reason}")
        return
    if cost.compile_seconds is not None:
        console.print(
            f"before the first step: {duration(cost.compile_seconds)} for compiling, capturing and "
            f"checking (train.compile={train.compile}); less the next time"
        )
    console.print(
        f"speed: {seconds:.3f} s per step, {cost.images / seconds:,.0f} images/s "
        f"(median of {TIMED_STEPS} steps)"
    )
    if train.num_steps is not None:
        length = f"time: {duration(seconds * train.num_steps)} for {train.num_steps:,} steps"
    else:
        assert train.budget is not None
        length = f"steps: {train.budget / seconds:,.0f} in {duration(train.budget)}"
    console.print(f"estimated {length}, without validation")
