"""Writes docs/models.md from the cards of the trained models: `make docs`."""

import textwrap
from pathlib import Path

from flowtrain.checkpoints import zoo
from flowtrain.system.console import figure

PAGE = """\
<!-- Written by `make docs` from the cards in flowtrain/zoo; change docs/models.py or the cards. -->
# Trained models

They come with flowtrain, {size:.1f} MB in all, and stand wherever a command takes a MODEL:

    flowtrain sample {first}

Figures are of these files, on the test split in float32. Networks are stored in half precision,
which changes a figure by less than 0.001. `make models` trains them again.

| model | flow and data | figure | likelihood | parameters | size | trained in |
|---|---|---|---|---|---|---|
{rows}

A test checks each card (`flowtrain/zoo/NAME.yaml`) against the weights.

{parts}"""

PART = """\
## {name}

![Samples of {name}](models/{name}.png)

    {command}

- Machine: {card.machine}
- Data: {card.data} ({card.licence})
- SHA-256: `{card.sha256}`
"""


def _in_lines(command: str) -> str:
    """A command of a shell in lines that a page can show."""
    return " \\\n        ".join(textwrap.wrap(command, 88, break_on_hyphens=False))


def page() -> str:
    cards = {name: zoo.card_of(name) for name in zoo.names()}
    sizes = {name: zoo.checkpoint_of(name).stat().st_size / 1e6 for name in cards}
    rows = [
        f"| [`{name}`](#{name}) | {card.title} | {figure(card.loss, card.error)} {card.unit} | "
        f"{card.likelihood} | {card.parameters:,} | {sizes[name]:.2f} MB | {card.time} |"
        for name, card in cards.items()
    ]
    parts = "\n".join(
        PART.format(name=name, card=card, command=_in_lines(card.command))
        for name, card in cards.items()
    )
    size = sum(sizes.values())
    return PAGE.format(size=size, first=next(iter(cards)), rows="\n".join(rows), parts=parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
