"""`flowtrain compare`: the table, the notes below it, and wrong arguments."""

import json
from pathlib import Path

import pytest
from cli_helpers import flowtrain, quick, trained
from PIL import Image
from run_files import ROWS, TEST, a_run, train_row, validation_row

from flowtrain.checkpoints import record
from flowtrain.tools.report import compare


def compared(*runs, cwd):
    """The rows and notes of `--json -`."""
    done = quick("compare", *runs, "--json", "-", cwd=cwd).ok()
    assert (cwd / "compare.png").exists()
    result = json.loads(done.out)
    return result["runs"], result["notes"]


def test_the_table_has_what_the_files_say(tmp_path):
    a_run(tmp_path / "a")
    nothing = {
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "best_validation_loss": None,
        "best_step": None,
    }
    a_run(tmp_path / "b", [ROWS[0]], None, **nothing)
    done = quick(
        "compare", "a", "b", "--out", "new/picture.png", "--json", "new/table.json", cwd=tmp_path
    ).ok()
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in done.out.splitlines()
        if "│" in line
    ]
    assert cells == [
        [
            "a",
            "glow",
            "digits",
            "12,345",
            "40",
            "0:10",
            "3.1250",
            "3.2500 +- 0.0125",
            "7",
        ],
        ["b", "glow", "digits", "12,345", "10", "0:02", "-", "-", "6"],
    ]
    assert "validation, bits/dim" in done.out
    assert "flowtrain evaluate b" in done.out and "b has no validation figure" in done.out
    assert "wrote new/picture.png" in done.out and "wrote new/table.json" in done.out
    picture = Image.open(tmp_path / "new" / "picture.png")
    assert picture.format == "PNG" and picture.width > picture.height > 400
    a, b = json.loads((tmp_path / "new" / "table.json").read_text())["runs"]
    expected = {
        "run": "a",
        "model": "glow",
        "data": "digits",
        "finished": True,
        "parameters": 12345,
        "step": 4,
    }
    expected |= {"images": 40, "seconds": 9.5, "unit": "bits/dim", "images_per_second": 7.0}
    expected |= {"validation": 3.125, "validation_step": 4}
    assert {key: value for key, value in a.items() if key != "test"} == expected
    absent = ["nats_per_image_stderr", "sampling", "edition", "sigma", "given"]
    assert a["test"].items() <= {**TEST, **dict.fromkeys(absent)}.items()
    assert a["test"]["bits_per_dim"] == 3.25
    assert b["test"] is None and b["validation"] is None


def test_the_table_fits_a_terminal_of_eighty_columns(tmp_path):
    names = ["glow_cifar_small_again", "b"]
    for name in names:
        a_run(tmp_path / name, parameters=44_000_000, images=123_456_789)
    lines = flowtrain("compare", *names, cwd=tmp_path, COLUMNS="80").ok().out.splitlines()
    table = [line for line in lines if not line.startswith(("wrote ", "- "))]
    assert max(map(len, table)) <= 80 and names[0] in "".join(table)
    for kept in ("validation, bits/dim", "test", "time", "3.2500 +- 0.0125"):
        assert any(kept in line for line in table), kept
    assert not any("images/s" in line for line in table)


def test_real_runs_compare(tmp_path):
    runs = trained()
    (glow, nice), notes = compared(runs["glow"], runs["nice"], cwd=tmp_path)
    summary = json.loads((runs["glow"] / "summary.json").read_text())
    assert (
        glow["validation"] == summary["best_validation_bits_per_dim"]
        and glow["images"] == summary["images"]
    )
    assert (glow["model"], nice["model"]) == ("glow", "nice") and glow["images_per_second"] > 0
    assert any("nice differs from glow in model.name: nice (glow)" in note for note in notes)
    assert not (runs["glow"] / "evaluate-test.json").exists(), "it evaluated the test split"


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    run = a_run(
        tmp_path / "a", [*ROWS, train_row(6, 2.9), validation_row(6, 3.0)], None, finished=False
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "images": 7')
    (row,), notes = compared("a", cwd=tmp_path)
    assert (row["step"], row["images"], row["seconds"]) == (6, 60, 13.0)
    assert (row["validation"], row["validation_step"]) == (3.0, 6)  # not yet in the summary
    assert "a is not finished: it is at step 6" in notes


def test_a_run_that_has_logged_nothing_is_shown(tmp_path):
    run = a_run(
        tmp_path / "a", [], None, step=0, images=0, seconds=0.0, finished=False, best_step=None
    )
    (run / "metrics.jsonl").unlink()
    (row,), notes = compared("a", cwd=tmp_path)
    assert row["images_per_second"] is None
    assert "a has no metrics, so no curve" in notes


def test_losses_that_were_not_finite_are_left_out(tmp_path):
    a_run(
        tmp_path / "a",
        [*ROWS, validation_row(5, None)],
        {**TEST, "loss": None, "loss_stderr": None},
    )
    done = quick("compare", "a", cwd=tmp_path).ok()
    assert "3.1250" in done.out and "not finite" in done.out


def test_one_run_twice_is_shown_once_and_same_names_by_their_paths(tmp_path):
    a_run(tmp_path / "x" / "a")
    a_run(tmp_path / "y" / "a")
    rows, _ = compared("x/a", "y/a", "x/../x/a", cwd=tmp_path)
    assert [row["run"] for row in rows] == ["x/a", "y/a"]


NOTES = {
    "other data": (
        {"data": {"name": "npz", "path": "d.npz"}},
        "different data (data.name: npz (digits)): their losses",
    ),
    "other levels": (
        {"data": {"n_bits": 5}},
        "different data (data.n_bits: 5 (8)): their losses do not compare",
    ),
    "held out": ({"data": {"validation": 50}}, "b and a hold out different images"),
    "settings": ({"train": {"lr": 0.5}}, "b differs from a in train.lr: 0.5 (0.001)"),
    "a flip": ({"data": {"flip": True}}, "b differs from a in data.flip: True (None)"),
    "other test data": (
        {"test": {**TEST, "dataset": "mnist"}},
        "b: its test figure is of other data than its own",
    ),
    "an old figure": (
        {"test": {**TEST, "step": 2}},
        "of step 2, its best checkpoint of step 4: flowtrain evaluate b",
    ),
    "another bound": ({"test": {**TEST, "bound": "iwbo", "draws": 8}}, "iwbo, draws: 8"),
    "another way of sampling": (
        {"test": {**TEST, "sampling": "sequential"}},
        "b samples one entry after the other",
    ),
    "fewer images": ({"test": {**TEST, "num_images": 10}}, "10 images of digits"),
}


@pytest.mark.parametrize("changes, expected", NOTES.values(), ids=NOTES)
def test_what_keeps_runs_from_comparing_is_said(changes, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in messages are as given
    a_run(Path("a"))
    a_run(Path("b"), **changes)
    records = [record.read(Path(name)) for name in ("a", "b")]
    results = [compare.result(name, run) for name, run in zip(("a", "b"), records, strict=True)]
    (note,) = [note for note in compare.notes(results, records) if expected in note] or [None]
    assert note, compare.notes(results, records)
    alike = compare.notes([results[0]] * 2, [records[0]] * 2)
    assert alike == []


def test_where_data_lie_and_when_things_are_written_are_no_differences(tmp_path):
    a_run(tmp_path / "a")
    a_run(
        tmp_path / "b",
        data={"root": "/elsewhere", "workers": 1},
        train={"log_every": 3, "keep_checkpoints": 2},
    )
    assert compared("a", "b", cwd=tmp_path)[1] == []


def test_real_valued_runs_are_in_nats(tmp_path):
    rows = [{**row, "loss": row["loss"] / 2, "bits_per_dim": None} for row in ROWS]
    test = {**TEST, "unit": "nats", "loss": 1.75, "loss_stderr": 0.5, "dataset": "two_moons"}
    summary = {"unit": "nats", "best_validation_loss": 1.5625}
    a_run(tmp_path / "a", rows, test, {"name": "two_moons"}, **summary)
    a_run(tmp_path / "b")
    done = quick("compare", "a", "b", cwd=tmp_path).ok()
    line = next(line for line in done.out.splitlines() if "two_moons" in line)
    assert all(text in line for text in ("1.5625", "1.7500 +- 0.5000", "nats"))
    assert (
        "b and a have different data (data.name: digits (two_moons)): their losses do not compare"
        in done.out
    )
