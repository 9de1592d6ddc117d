"""`flowtrain list`."""

import typer

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import command, on_one_process

EPILOG = "Example: [cyan]flowtrain list[/cyan]"


@command
@on_one_process
def catalogue() -> None:
    """List what comes with flowtrain: configurations, data sets and models."""
    from flowtrain.config import Data, Model, component_module, component_names

    configs = configfiles.shipped_configs().items()
    _print("configurations (--config)", {n: configfiles.headline(p) for n, p in configs})
    for title, base in (("data sets (data.name)", Data), ("models (model.name)", Model)):
        documented = {name: component_module(base, name).__doc__ for name in component_names(base)}
        _print(title, {name: _first_sentence(text or "") for name, text in documented.items()})


def _first_sentence(docstring: str) -> str:
    """The first paragraph of a docstring in one line, without its full stop."""
    return " ".join(docstring.partition("\n\n")[0].split()).removesuffix(".")


def _print(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    typer.echo(f"\n{title}")
    for name, text in rows.items():
        typer.echo(f"  {name:{width}}  {text}")
