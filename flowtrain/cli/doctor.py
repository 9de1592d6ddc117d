"""`flowtrain doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from flowtrain.cli.base import (
    DataSetOption,
    DeviceOption,
    ModelArgument,
    SeedOption,
    TrustOption,
    WeightsOption,
    command,
    data_of,
    load,
    on_one_process,
    write_json,
)
from flowtrain.errors import RunError

if TYPE_CHECKING:
    from flowtrain.evaluation.doctor import Finding

EPILOG = "Example: [cyan]flowtrain doctor runs/glow_digits --json doctor.json[/cyan]"

SHOWN = 3  # layers of a check and a kind of input that are to be watched, or bad


@command
@on_one_process
def doctor(
    model: ModelArgument = None,
    num_images: Annotated[
        int,
        typer.Option(
            "--num-images",
            min=1,
            metavar="N",
            help="Test images, and as many of noise and of samples.",
        ),
    ] = 64,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE|-",
            help="Where all findings go.",
            show_default="doctor.json in the run",
        ),
    ] = None,
    overrides: DataSetOption = None,
    trust_code: TrustOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Whether each layer of a flow, and the whole, can be inverted and reports its log-determinant.

    Every number has a verdict: ok, watch or bad. Exit code 1 if anything is bad.
    """
    import dataclasses

    from flowtrain.checkpoints.load import run_of
    from flowtrain.evaluation import doctor as diagnosis
    from flowtrain.system.console import ProgressBar, console

    console.stderr = json_out == "-"
    loaded = load(model, device, weights, trust_code)
    console.print(f"examining {loaded.checkpoint.path}")
    data = data_of(loaded, overrides)
    with ProgressBar("examining") as bar:
        findings = diagnosis.examine(loaded, data, num_images=num_images, seed=seed, progress=bar)
    verdict = diagnosis.overall(findings)
    counts = {
        kind: sum(finding.verdict == kind for finding in findings)
        for kind in ("ok", "watch", "bad")
    }
    result = {
        "verdict": verdict,
        "counts": counts,
        "checkpoint": str(loaded.checkpoint.path),
        "weights": loaded.weights,
        "step": loaded.checkpoint.meta["step"],
        "dataset": data.config.name,
        "num_images": min(num_images, len(data.split("test"))),
        "seed": seed,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    _print(findings)
    write_json(result, json_out, run_of(loaded.checkpoint.path) / "doctor.json")
    console.print(f"verdict: {verdict} ({', '.join(_counts(findings))})")
    if verdict == "bad":
        names = list(
            dict.fromkeys(
                finding.layer or "the whole model" for finding in diagnosis.worst(findings)
            )
        )
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise RunError(
            f"{counts['bad']} of {len(findings)} findings are bad, the worst first: "
            f"{', '.join(names[:5])}{more}"
        )


def _print(findings: "list[Finding]") -> None:
    """A table for each check, a row for each kind of input, with its worst layer; more where there
    is something to see.

    Eighty columns are enough.
    """
    from rich.table import Table

    from flowtrain.evaluation.doctor import BOUNDS
    from flowtrain.system.console import console

    for check, (watch, bad) in BOUNDS.items():
        beyond = "below" if bad < watch else "above"
        table = Table(box=None, show_header=False, title_justify="left", padding=(0, 1))
        table.title = f"{check} (watch {beyond} {watch:.3g}, bad {beyond} {bad:.3g})"
        for width in (5, 13, 10, None):
            table.add_column(
                min_width=width, justify="right" if width == 10 else "left", overflow="fold"
            )
        groups: dict[tuple[bool, str], list[Finding]] = {}
        for finding in findings:
            if finding.check == check:
                groups.setdefault((finding.layer == "", finding.inputs), []).append(finding)
        for (whole, inputs), group in groups.items():
            group.sort(key=lambda finding: -finding.severity)
            counts = ", ".join(_counts(group)) if len(group) > 1 else ""
            for i, finding in enumerate(
                group[: max(1, sum(f.verdict != "ok" for f in group[:SHOWN]))]
            ):
                value = "not finite" if finding.value is None else f"{finding.value:.3g}"
                layer = "the whole model" if whole else finding.layer
                table.add_row(
                    finding.verdict,
                    inputs,
                    value,
                    f"{layer} (of {counts})" if counts and i == 0 else layer,
                )
        if groups:
            console.print(table)


def _counts(findings: "list[Finding]") -> list[str]:
    counts = {
        kind: sum(finding.verdict == kind for finding in findings)
        for kind in ("ok", "watch", "bad")
    }
    return [f"{count} {kind}" for kind, count in counts.items() if count]
