"""Figures in pages agree with the files that they come from."""

import re

import pytest
import torch
from helpers import REPOSITORY

from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.build import build_flow
from flowtrain.cli.configs import find_config, headline
from flowtrain.config import load_config
from flowtrain.system import console
from flowtrain.training.dial_rules import FEW, LEAST_STEPS, PASSES, PASSES_OF_FEW


def page(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


README, RESULTS = page("README.md"), page("docs/results.md")
MEASURED = RESULTS[RESULTS.index("## Configurations") : RESULTS.index("not been measured yet")]
NUMBER = r"-?\d+\.\d+"
SHAPES = {"digits": ((1, 8, 8), 17), "mnist": ((1, 28, 28), 256), "cifar10": ((3, 32, 32), 256)}
SHAPES |= {"imagenet64": ((3, 64, 64), 256)}
SHAPES |= {"sphere": ((3, 1, 1), None)}  # all others in the table are points of the plane


def is_rounded(value, text):
    """Whether a figure is a value in as many digits as are written."""
    half = 0.5 * 10 ** -len(text.partition(".")[2])
    return abs(value - float(text)) <= half * (1 + 1e-9)


@pytest.mark.parametrize(
    "path, pattern, unit",
    [
        ("docs/explore.md", r"^\| `(\w+)` \(([\d.]+) M\)", 1e6),
        ("docs/results.md", r"`(\w+)\.yaml` has ([\d.]+) M parameters", 1e6),
        ("docs/results.md", r"`(\w+)\.yaml`\s\((\d+) M", 1e6),
        ("configs/gpu/causal_cifar.yaml", r"()counts ([\d.]+) M parameters", 1e6),
        ("configs/gpu/causal_cifar_day.yaml", r"()parameters, ([\d.]+) M", 1e6),
        ("docs/gallery.md", r"^\| `(\w+)\.yaml` \|[^|]*\|[^|]*\| ([\d,]+) \|", 1),
    ],
)
@pytest.mark.run  # takes long
def test_parameters(path, pattern, unit):
    rows = re.findall(pattern, page(path), re.MULTILINE)
    assert rows
    for name, text in rows:
        config = load_config(find_config(name or path.rpartition("/")[2]))
        shape, levels = SHAPES.get(config.data.name, ((2, 1, 1), None))
        with torch.device("meta"):
            flow = build_flow(config, shape, levels)
        count = sum(p.numel() for p in flow.parameters())
        assert is_rounded(count / unit, text.replace(",", "")), (name, count, text)


def test_figures_of_the_readme():
    unknown = set(re.findall(rf"\b{NUMBER}\d\d\b", README)) - set(re.findall(NUMBER, RESULTS))
    assert unknown == set(), "figures of README.md that are not in docs/results.md"
    rows = re.findall(rf"^\| `(\w+)` \|.*\| ({NUMBER})", README, re.MULTILINE)
    assert len(rows) > 5
    for name, figure in rows:
        row = rf"^\| `{name}\.yaml` \|.*\| {figure}\b"
        assert re.search(row, MEASURED, re.MULTILINE), f"{name}: {figure} is not in docs/results.md"


def test_a_name_has_the_figure_of_its_trained_model():
    for name in zoo.names():
        card = zoo.card_of(name)
        config = card.command.removeprefix("flowtrain train --config ")
        row = re.search(rf"^\| `{config}\.yaml` \|.*", MEASURED, re.MULTILINE)
        if card.unit == "bits/dim":  # others are not in the table
            assert row and f"| {console.figure(card.loss, card.error)}" in row[0], f"{name}: {row}"


def test_figures_of_configurations():
    rows = re.findall(rf"^\| `(\w+)\.yaml` \|.*?\| (?:none: )?({NUMBER}) ", MEASURED, re.MULTILINE)
    assert len(rows) > 15
    for name, figure in rows:
        text = re.search(rf"({NUMBER})(?: to {NUMBER})? (?:bits|nats)", headline(find_config(name)))
        stated = text and text[1]
        wrong = f"{name}.yaml states {stated}, not {figure}"
        assert is_rounded(float(figure), stated or "0"), wrong


def test_the_rules_of_few_images():
    text = page("docs/howto/own_images.md")
    found = re.search(r"Below ([\d,]+) values \((\d+) colour images of 32x32 pixels\)", text)
    assert [int(each.replace(",", "")) for each in found.groups()] == [FEW, FEW // 3072]
    passes = f"then {PASSES_OF_FEW}, and otherwise {PASSES}, but {LEAST_STEPS:,} steps"
    assert passes in " ".join(text.split())


def test_kills():
    """Those since the last change of the writing code."""
    row = r"^\| (.*\bkills?\b.*) \| (\d+) \| (\d+) \|$"
    rows = re.findall(row, page("docs/reliability.md"), re.MULTILINE)
    now = [(int(kills), int(kept)) for what, kills, kept in rows if "before" not in what]
    assert all(kills == kept for kills, kept in now)
    assert f"{sum(kills for kills, _ in now)} kills, none lost" in README
