"""`flowtrain doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    DataOptions,
    JsonOption,
    SeedOption,
    command,
    on_one_process,
    output,
    require_file,
    write_json,
)

if TYPE_CHECKING:
    from flowtrain.tools.doctor.findings import Finding

EPILOG = "Example: [cyan]flowtrain doctor runs/glow_digits --json doctor.json[/cyan]"

SHOWN = 3  # layers that are to be watched or bad, per check and kind of input


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Check")(doctor)


@command
@on_one_process
def doctor(
    num_images: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Number each of test images, noise images, and samples."
        ),
    ] = 64,
    seed: SeedOption = 0,
    json_out: JsonOption = None,
    *,
    options: DataOptions,
) -> None:
    """Check inverses and log-determinants of each layer and of the whole flow.

    Every number has a verdict: ok, watch or bad. The exit code is 1 if anything is bad.
    """
    from flowtrain.system.console import ProgressBar, console
    from flowtrain.tools.doctor import findings as diagnosis
    from flowtrain.tools.doctor.examine import examine

    require_file(json_out, "--json")
    console.stderr = json_out == "-"
    loaded = options.load_model(conditional=True)
    path = output(json_out, loaded, "doctor.json", "--json")
    console.print(f"examining {loaded.checkpoint.path}")
    if loaded.flow.kind.no_bits and loaded.flow.num_bins is not None:
        console.print(f"no check of bits/dim: {loaded.flow.kind.no_bits}")
    data = options.data(loaded)
    with ProgressBar("examining") as bar:
        findings = examine(loaded, data, num_images=num_images, seed=seed, progress=bar)
    write_json(diagnosis.as_json(findings, loaded, data, num_images, seed), json_out, path)
    for check in diagnosis.BOUNDS:
        _print(check, [finding for finding in findings if finding.check == check])
    if not any(finding.check == "integral" for finding in findings):
        console.print("the integral of the density was not checked")
    console.print(f"verdict: {diagnosis.overall(findings)} ({_counts(findings)})")
    diagnosis.require_none_bad(findings)


def _print(check: str, findings: "list[Finding]") -> None:
    """A table of one check, eighty columns wide.

    Per kind of input, it has a row for the worst layer, and for layers to be watched or bad. Noise
    and extreme images have none if all is ok.
    """
    from rich.table import Table

    from flowtrain.system.console import console, figure
    from flowtrain.tools.doctor.findings import BOUNDS, UNLIKELY

    watch, bad = BOUNDS[check]
    beyond = "below" if bad < watch else "above"
    table = Table(box=None, show_header=False, title_justify="left", padding=(0, 1))
    table.title = f"{check} (watch {beyond} {watch:.3g}, bad {beyond} {bad:.3g})"
    table.add_column(min_width=5, overflow="fold")
    table.add_column(min_width=13, overflow="fold")
    table.add_column(min_width=10, overflow="fold", justify="right")
    table.add_column(overflow="fold")
    groups: dict[tuple[bool, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.layer == "", finding.inputs), []).append(finding)
    for (whole, inputs), group in groups.items():
        group.sort(key=lambda finding: -finding.severity)
        if inputs in UNLIKELY and group[0].verdict == "ok":
            continue
        shown = max(1, sum(finding.verdict != "ok" for finding in group[:SHOWN]))
        for i, finding in enumerate(group[:shown]):
            layer = "the whole model" if whole else finding.layer
            if i == 0 and len(group) > 1:
                layer += f" (of {_counts(group)})"
            layer += f": {finding.reason}" if finding.reason else ""
            table.add_row(finding.verdict, inputs, figure(finding.value, form=".3g"), layer)
    if groups:
        console.print(table)


def _counts(findings: "list[Finding]") -> str:
    from flowtrain.tools.doctor.findings import count

    return ", ".join(f"{number} {kind}" for kind, number in count(findings).items() if number)
