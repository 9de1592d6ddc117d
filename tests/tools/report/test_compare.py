"""`flowtrain compare`: the table, and the notes below it."""

import json
import re
from pathlib import Path

import pytest
from cli_helpers import flowtrain, quick
from PIL import Image
from run_files import ROWS, TEST, a_run, train_row, validation_row

from flowtrain.tools.report import charts
from flowtrain.tools.report.compare import compare


def compared(*names):
    """The rows by run, and the notes, of runs in the working directory."""
    content = compare([Path(name) for name in names]).content()
    return {row["run"]: row for row in content["runs"]}, content["notes"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in messages are as given
    monkeypatch.setattr(charts, "losses_png", lambda runs, unit: b"")  # takes long; not in commands
    return tmp_path


@pytest.mark.run
def test_the_table_has_the_figures_of_the_files(here):
    a_run(here / "a")
    nothing = {"step": 0, "images": 0, "seconds": 0.0}
    a_run(here / "b", [ROWS[0]], None, best_validation_loss=None, best_step=None, **nothing)
    words = ("--out", "new/picture.png", "--json", "new/table.json")
    done = quick("compare", "a", "b", *words, cwd=here).ok()
    lines = [line.split("│")[1:-1] for line in done.out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    of_a = ["a", "glow", "digits", "12,345", "40", "0:10", "3.1250", "3.2500 +- 0.0125", "7"]
    assert cells == [of_a, ["b", "glow", "digits", "12,345", "10", "0:02", "-", "-", "6"]]
    assert "validation, bits/dim" in done.out
    assert "flowtrain evaluate b" in done.out and "b has no validation figure" in done.out
    assert "wrote new/picture.png" in done.out and "wrote new/table.json" in done.out
    picture = Image.open(here / "new" / "picture.png")
    assert picture.format == "PNG" and picture.width > picture.height > 400
    a, b = json.loads((here / "new" / "table.json").read_text())["runs"]
    expected = {"run": "a", "model": "glow", "data": "digits", "finished": True}
    expected |= {"parameters": 12345, "step": 4, "images": 40, "seconds": 9.5, "unit": "bits/dim"}
    expected |= {"images_per_second": 7.0, "validation": 3.125, "validation_step": 4}
    assert {key: value for key, value in a.items() if key in expected} == expected
    absent = ["nats_per_image_stderr", "sampling", "edition", "sigma", "given"]
    assert a["test"].items() <= {**TEST, **dict.fromkeys(absent), "sides": 1}.items()
    assert b["test"] is None and b["validation"] is None


@pytest.mark.run
def test_the_table_fits_a_terminal_of_eighty_columns(here):
    names = ["glow_cifar_small_again", "b"]
    for name in names:
        a_run(here / name, parameters=44_000_000, images=123_456_789)
    lines = flowtrain("compare", *names, cwd=here, COLUMNS="80").ok().out.splitlines()
    table = [line for line in lines if not line.startswith(("wrote ", "- "))]
    assert max(map(len, table)) <= 80 and names[0] in "".join(table)
    for kept in ("validation, bits/dim", "test", "time", "3.2500 +- 0.0125"):
        assert any(kept in line for line in table), kept
    assert not any("images/s" in line for line in table)


@pytest.mark.run
def test_figures_of_the_mirror_mixture_and_of_several_draws_have_columns(here):
    both = {**TEST, "sides": 2, "loss": 3.125, "step": 2}
    weighted = {**TEST, "bound": "iwbo", "draws": 16, "loss": 3.0, "step": 2}
    (a_run(here / "a b") / "evaluate-mirror-test.json").write_text(json.dumps(both))
    (here / "a b" / "evaluate-16-draws-test.json").write_text(json.dumps(weighted))
    for other in ("mnist-test", "16-draws-mnist-test", "16-draws-validation"):
        (here / "a b" / f"evaluate-{other}.json").write_text("no figure of its test images")
    a_run(here / "b")
    done = quick("compare", "a b", "b", "--json", "table.json", cwd=here).ok()
    lines = [line for line in done.out.splitlines() if "│" in line or "┃" in line]
    title, a, b = ([cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines)
    assert title[-4:-1] == ["test", "16 draws", "mirror"]
    assert a[-4:-1] == [f"{loss} +- 0.0125" for loss in ("3.2500", "3.0000", "3.1250")]
    assert b[-4:-1] == ["3.2500 +- 0.0125", "-", "-"]
    mixture = "a b: its mirror figure is the mean over the image and its mirror image"
    assert mixture in done.out and "flowtrain evaluate 'a b' --mirror brings it up" in done.out
    assert "flowtrain evaluate 'a b' --draws 16 brings it up to date" in done.out
    a, b = json.loads((here / "table.json").read_text())["runs"]
    assert a["mirror"]["loss"] == 3.125 and a["mirror"]["sides"] == 2 and a["test"]["sides"] == 1
    assert a["16 draws"]["loss"] == 3.0 and b["mirror"] is None


def test_unfinished_runs_are_shown(here):
    rows = [*ROWS, train_row(6, 2.9), validation_row(6, 3.0)]
    going = a_run(here / "going", rows, None, finished=False)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "images": 7')
    nothing = {"step": 0, "images": 0, "seconds": 0.0, "finished": False, "best_step": None}
    new = a_run(here / "new", [], None, **nothing)
    (new / "metrics.jsonl").unlink()
    rows, notes = compared("going", "new")
    row = rows["going"]
    assert (row["step"], row["images"], row["seconds"]) == (6, 60, 13.0)
    assert (row["validation"], row["validation_step"]) == (3.0, 6)  # not yet in the summary
    assert "going is not finished: it is at step 6" in notes
    assert rows["new"]["images_per_second"] is None
    assert "new has no metrics, so no curve" in notes


@pytest.mark.run
def test_other_units_and_losses_that_were_not_finite(here):
    rows = [{**row, "loss": row["loss"] / 2, "bits_per_dim": None} for row in ROWS]
    test = {**TEST, "unit": "nats", "loss": 1.75, "loss_stderr": 0.5, "dataset": "two_moons"}
    summary = {"unit": "nats", "best_validation_loss": 1.5625}
    a_run(here / "a", rows, test, {"name": "two_moons"}, **summary)
    lost = {**TEST, "loss": None, "loss_stderr": None}
    a_run(here / "b", [*ROWS, validation_row(5, None)], lost)
    done = quick("compare", "a", "b", "--json", "-", cwd=here).ok()
    assert [row["unit"] for row in json.loads(done.out)["runs"]] == ["nats", "bits/dim"]
    line = next(line for line in done.err.splitlines() if "two_moons" in line)
    assert all(text in line for text in ("1.5625", "1.7500 +- 0.5000", "nats"))
    assert "3.1250" in done.err and "not finite" in done.err
    different = "b and a have different data (data.name: digits (two_moons)): their losses do not"
    assert different in done.err


def test_one_run_twice_is_shown_once_and_same_names_by_their_paths(here):
    a_run(here / "x" / "a")
    a_run(here / "y" / "a")
    assert list(compared("x/a", "y/a", "x/../x/a")[0]) == ["x/a", "y/a"]


@pytest.mark.run
def test_names_are_shown_as_they_are(here):
    """Brackets are no markup, and letters that the font of pictures lacks are no warning."""
    names = ["x[/a]", "y/a]", "\u5b57"]
    for name in names:
        a_run(here / name)
    done = quick("compare", *names, cwd=here).ok()
    assert all(f"│ {name} " in done.out for name in names) and not done.err


def with_test(**changes):
    return {"test": {**TEST, **changes}}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"data": {"name": "npz", "path": "d.npz"}}, "(data.name: npz (digits)): their losses do"),
        ({"data": {"n_bits": 5}}, "b and a have different data (data.n_bits: 5 (8)): their losses"),
        ({"data": {"validation": 50}}, "b and a hold out different images"),
        ({"data": {"flip": True}}, "b differs from a in data.flip: True (None)"),
        ({"model": "nice"}, "b differs from a in model.name: nice (glow)"),
        ({"train": {"lr": 0.5}}, "b differs from a in train.lr: 0.5 (0.001)"),
        (with_test(dataset="mnist"), "b: its test figure is of other data than its own (mnist)"),
        (with_test(step=2), "of step 2, its best checkpoint of step 4: flowtrain evaluate b"),
        (with_test(bound="exact"), "test figures were not measured alike (180 images of digits: e"),
        (with_test(weights="raw"), "180 images of digits: elbo, ema weights, 180 images of digits"),
        (with_test(bound="iwbo", draws=8), "b has no test figure of one draw: flowtrain evalua"),
        (with_test(num_images=10), "10 images of digits"),
        (with_test(sampling="sequential"), "b samples one entry after the other"),
    ],
)
def test_reasons_why_runs_do_not_compare(changes, expected, here):
    a_run(here / "a")
    a_run(here / "b", **changes)
    notes = compared("a", "b")[1]
    assert len([note for note in notes if expected in note]) == 1, notes


def test_places_of_data_and_times_of_outputs_are_no_differences(here):
    a_run(here / "a")
    train = {"log_every": 3, "keep_checkpoints": 2}
    a_run(here / "b", data={"root": "/elsewhere", "workers": 1}, train=train)
    measured = "the test figures are of 180 images of digits: elbo, ema weights"
    assert compared("a", "b")[1] == [measured]
