"""benchmarks/gpu_session.py, in miniature on the CPU."""

import dataclasses
import json
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY
from run_files import SUMMARY, TEST
from torch.autograd import DeviceType

from flowtrain.cli.configs import find_config

sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # its programs import each other

import gpu_session as session_module
from gpu_session import MINI, Part, Session

pytestmark = pytest.mark.run


@pytest.fixture
def session(tmp_path):
    return Session(MINI, torch.device("cpu"), tmp_path)


def words_for(session):
    return ["--plan", "mini", "--device", "cpu", "--out", str(session.out)]


def outcome(session, name):
    return json.loads((session.out / f"{name}.json").read_text())


def test_every_part_and_the_tables(session):
    parts = {part.name: part for part in session_module.parts_of(MINI)}
    for part in parts.values():
        session_module.measure(session, part)
    assert {name: outcome(session, name).get("error") for name in parts} == dict.fromkeys(parts)
    assert sorted(path.stem for path in session.out.glob("*")) == sorted(
        [*parts, "random"]
    )  # no run is left

    kernels = outcome(session, "kernels-glow")["result"]
    assert kernels["kernels"] > 100 and kernels["busy"] is None
    assert "aten::convolution_backward" in kernels["longest"]
    steps = outcome(session, "step-glow-store-8")["result"]
    assert steps["images_per_second"] == pytest.approx(8 / steps["seconds"])
    for model in ("causal_cifar", "causal_cifar_day"):  # the GPU configurations, smaller
        first = outcome(session, f"first-{model}")["result"]
        assert first["images_per_second"] == pytest.approx(2 / first["seconds"])
        speed = first["images_per_second"] * first["flops"] / 1e12
        assert f"| {session_module.shown(speed)} |" in session_module.report(session)
    dry = outcome(session, "dry-run-glow")["result"]
    assert set(dry["modes"]) == {"store", "checkpoint", "reversible"} and dry["flops"] > 1e4
    assert outcome(session, "use-causal")["result"]["sequential"] is True

    text = session_module.report(session)
    for title in ["first minutes", "Steps of", "Kernels", "Dry run", "Evaluation"]:
        assert title in text
    assert "Not measured" not in text
    assert "| glow | store | 8 | " in text and "| only CUDA can say |" in text


def test_a_part_that_fails_or_takes_too_long_is_reported(session):
    def fail(session):
        raise ValueError("too much\nof everything")

    session_module.measure(session, Part("bad", 1, fail))
    session_module.measure_apart(session, Part("slow", 0.01, fail), words_for(session))
    assert outcome(session, "slow")["error"] == "not done after 0 s"
    assert "| bad | too much |" in session_module.report(session)


def test_it_continues_where_it_was(session, capsys):
    words = [*words_for(session), "--only", "waits-glow"]
    session_module.main(words)
    measured = (session.out / "waits-glow.json").read_text()
    assert "only CUDA can say" in (session.out / "report.md").read_text()
    assert capsys.readouterr().out.startswith("waits-glow: ")
    session_module.main(words)
    assert (session.out / "waits-glow.json").read_text() == measured
    assert "waits-glow: " not in capsys.readouterr().out


def test_the_rest_of_the_time_is_for_a_training_run(session, monkeypatch):
    given = []
    monkeypatch.setattr(session_module, "measure_apart", lambda *words: given.append(words))
    words = [*words_for(session), "--minutes", "10", "--train-minutes", "11"]
    session_module.main(words)  # so no time is left for the others
    ((_, part, passed),) = given
    assert part.name == "training" and 470 < float(passed[-1]) <= 480 < part.limit


def test_the_training_run_is_two_commands(session, monkeypatch):
    commands = []

    def run(command, cwd, check):
        commands.append(command[1:])
        folder = session.out / "training"
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_text(json.dumps(TEST | {"bits_per_dim": 3.1}))
        (folder / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(session_module.subprocess, "run", run)
    with_data = dataclasses.replace(session, data=["data.name=npz"])
    part = Part("training", 1, lambda s: session_module.measure_run(s, 99.7))
    session_module.measure(with_data, part)
    train, evaluate = commands
    assert train[:5] == ["-m", "flowtrain", "train", "--config", "glow_digits.yaml"]
    assert {"train.budget=100s", "data.name=npz"} <= set(train) and evaluate[2] == "evaluate"
    assert "| 3.1 |" in session_module.report(session)


@pytest.mark.parametrize(
    "speed, message",
    [(1499.0, "149.9 TFLOP/s, and at least 150 are"), (None, "out of memory"), (1500.0, None)],
)
def test_nothing_else_is_measured_if_the_first_minutes_are_slow(
    speed, message, session, monkeypatch
):
    def measure(session, part, words):
        measured.append(part.name)
        result = {"result": {"flops": 1e11, "images_per_second": speed}}
        session_module.write(session, part, 0.0, **result if speed else {"error": "out of memory"})

    measured = []
    monkeypatch.setitem(session_module.PLANS, "mini", dataclasses.replace(MINI, least=150.0))
    monkeypatch.setattr(session_module, "measure_apart", measure)
    monkeypatch.setattr(session_module, "write_report", lambda session: None)
    if message is None:
        session_module.main(words_for(session))
        parts = [part.name for part in session_module.parts_of(MINI)]
        assert measured == [*parts, "training"]
        return
    for _ in range(2):  # the same command ends again, without measuring again
        with pytest.raises(SystemExit, match=f"^first-causal_cifar: {message}.*; the session ends"):
            session_module.main(words_for(session))
        assert measured == ["first-causal_cifar"]


def test_precision_compiling_and_graphs_are_varied():
    names = [part.name for part in session_module.variants("glow", 64)]
    assert names == [
        f"step-glow-store-64-{words}"
        for words in ["fp32", "off-true", "layers-false", "layers-true", "step-false", "step-true"]
    ]


def test_the_full_plan_has_the_models_of_the_repository(tmp_path):
    full = Session(session_module.FULL, torch.device("cpu"), tmp_path)
    small = dataclasses.replace(full, plan=dataclasses.replace(full.plan, images=8))
    for model in {**full.plan.first, **full.plan.models}:
        config = small.config(model, num_steps=3, memory="store")
        assert config.train.num_steps == 3 and config.data.name == "npz"
        assert config.train.optimizer == "muon"
    names = [part.name for part in session_module.parts_of(full.plan)]
    assert len(set(names)) == len(names)
    assert find_config(full.plan.training).parent.name == "gpu"


def test_where_the_host_waits(monkeypatch):
    modes, waits = [], Counter()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with session_module.noting_waits(waits):
        for line in (7, 7, 9):
            warnings.warn_explicit(
                "called a synchronizing CUDA operation", UserWarning, "a.py", line
            )
        warnings.warn_explicit("something else", UserWarning, "a.py", 7)
    assert modes == ["warn", "default"] and waits == {"a.py:7": 2, "a.py:9": 1}
    assert session_module.waits_in_words({"a.py:7": 0.5, "a.py:9": 1.0}) == "a.py:7: 0.5, a.py:9: 1"
    assert session_module.waits_in_words({}) == "none"


def test_kernels_and_the_time_that_they_cover():
    def event(name, device, named=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=named)

    operator, kernel = event("aten::mul", DeviceType.CPU), event("gemm", DeviceType.CUDA)
    on_both = [event("Optimizer.step", d, True) for d in (DeviceType.CPU, DeviceType.CUDA)]
    events = [operator, kernel, event("cudaLaunchKernel", DeviceType.CPU), *on_both]
    assert [each for each in events if session_module.counts(each, on_cpu=True)] == [operator]
    assert [each for each in events if session_module.counts(each, on_cpu=False)] == [kernel]
    assert session_module.covered([]) == 0
    assert session_module.covered([(0, 2), (1, 3), (1.5, 2), (5, 6)]) == 4
