"""The two versions of ImageNet are told apart wherever a figure is."""

import json

import pytest
from dataset_helpers import chrabaszcz, oord
from helpers import CPU, a_config
from typer.testing import CliRunner

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.main import app
from flowtrain.tools.report import report
from flowtrain.tools.report.compare import compare
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

VERSIONS = {"oord2016": oord, "chrabaszcz2017": chrabaszcz}


@pytest.mark.run
def test_the_version_is_beside_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {}
    for version, make in VERSIONS.items():
        section = {**make(tmp_path, monkeypatch), "root": str(tmp_path), "validation": 0.2}
        config = a_config("nice", data=section, train={"num_steps": 1, "batch_size": 8})
        run = RunDirectory(tmp_path / version)
        fit(config, run, CPU)
        edition = f"{version}: ImageNet 32x32"
        assert edition in capsys.readouterr().out
        printed = CliRunner().invoke(app, ["evaluate", str(run.path), "--device", "cpu"])
        assert edition in " ".join(printed.output.replace("│", " ").split()), printed
        for name in ("summary", "evaluate-test"):
            assert edition in json.loads((run.path / f"{name}.json").read_text())["edition"]
        paths[version] = run.path
    page, _ = report.page(load_model(str(run.path), CPU), "no data here")
    assert page.count(edition) == 2
    comparison = compare(list(paths.values()))
    notes = " ".join(comparison.notes)
    assert all(f"{version}: its data are {version}: ImageNet" in notes for version in paths)
    assert "chrabaszcz2017 and oord2016 have different data (data.version" in notes
    for version, row in zip(paths, comparison.content()["runs"], strict=True):
        assert row["test"]["edition"].startswith(f"{version}: ")
