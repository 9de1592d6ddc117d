"""`flowtrain list`."""

from flowtrain.cli import configs as configfiles
from flowtrain.cli.base import command, on_one_process

EPILOG = "Example: [cyan]flowtrain list[/cyan]"


@command
@on_one_process
def catalogue() -> None:
    """List the trained models, configurations, data sets and models of flowtrain."""
    from flowtrain.checkpoints import zoo
    from flowtrain.config import Data, Model, component, component_names
    from flowtrain.system.console import figure

    cards = {name: zoo.card_of(name) for name in zoo.names()}
    trained = {
        name: f"{card.title}: {figure(card.loss, card.error)} {card.unit}, {card.time}"
        for name, card in cards.items()
    }
    _print("trained models (MODEL)", trained)
    configs = configfiles.shipped_configs().items()
    for title, gpu in (("configurations (--config)", False), ("not yet measured", True)):
        found = {n: configfiles.headline(p) for n, p in configs if (p.parent.name == "gpu") == gpu}
        _print(title, found)
    for title, base in (("data sets (data.name)", Data), ("models (model.name)", Model)):
        about = {name: component(base, name).about for name in component_names(base)}
        _print(title, {name: text.removesuffix(".") for name, text in about.items()})


def _print(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    print(f"\n{title}")
    for name, text in rows.items():
        print(f"  {name:{width}}  {text}")
