"""What a GPU does with flowtrain, in 45 minutes: `make gpu-session`.

Each part is a process of its own with a limit of time, and its result is a JSON file in `--out`. A
part that has a file is skipped, so the same command goes on after an interruption. Without its file
a part is measured again. The tables of all results are in `report.md` there.

The first minutes of the causal configurations come before everything else. If they are slower than
expected, so are hours of training, and the session ends there.

The steps run in the loop of `flowtrain train`, with data, noise, optimizer and logging.

    python benchmarks/gpu_session.py --data data.name=npz --data data.path=cifar10.npz

`--data` names CIFAR-10 for the last part, a training run. All other parts use random images.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import images
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.config import Config, load_config
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.pictures.sample import sample
from flowtrain.system import device as devices
from flowtrain.system.files import write_atomically
from flowtrain.training import loop, step
from flowtrain.training.dry_run import dry_run
from flowtrain.training.run_directory import RunDirectory
from flowtrain.training.state import State

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
GIB = 2**30
FOR_EVALUATION = 120.0  # seconds kept for starting the training run and for evaluating it

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured. `first`, and `models` after them, are words after `--config` by name."""

    first: Mapping[str, Sequence[str]]
    models: Mapping[str, Sequence[str]]
    modes: Mapping[str, Sequence[str]]  # name: modes of `train.memory`, if these are varied
    batches: Sequence[int]
    variants: Sequence[int]  # the batches at which precision, compile and graphs are varied
    first_steps: int = 1000
    least: float = 150.0  # TFLOP/s that the first models must reach
    warm_up: int = 5  # steps before those that are measured
    steps: int = 20
    profiled: int = 3
    images: int = 4096  # random ones, to train on
    evaluated: int = 1000
    training: str = "causal_cifar.yaml"
    tests: bool = True  # those that need a GPU


FULL = Plan(
    first={name: [f"{name}.yaml"] for name in ("causal_cifar", "causal_cifar_day")},
    models={"glow_cifar": ["glow_cifar.yaml"], "causal_cifar": ["causal_cifar.yaml"]},
    modes={"glow_cifar": ["store", "checkpoint", "reversible"]},
    batches=(64, 256, 512, 1024),
    variants=(64, 512),
)
# For a CPU: every part, in seconds.
PLAIN = ["train.batch_size=2", "train.accumulate=1", "train.compile=off", "train.cuda_graph=false"]
TINY = ["model.width=8", "model.blocks=2", "model.attention=1", "model.units=4", *PLAIN]
MINI = Plan(
    first={name: [*words, *TINY] for name, words in FULL.first.items()},
    models={
        "glow": ["glow_digits.yaml", "model.steps=1", "model.width=8"],
        "causal": ["causal_digits.yaml", "model.width=8", "model.blocks=1"],
    },
    modes={"glow": ["store"]},
    batches=(8,),
    variants=(),
    first_steps=2,
    least=0.0,
    warm_up=1,
    steps=2,
    profiled=1,
    images=128,
    evaluated=2,
    training="glow_digits.yaml",
    tests=False,
)
PLANS = {"full": FULL, "mini": MINI}


@dataclass(frozen=True)
class Session:
    """What all parts know."""

    plan: Plan
    device: torch.device
    out: Path
    data: Sequence[str] = ()  # `data.*` keys of the training run

    def config(self, model: str, **train: object) -> Config:
        """The configuration of a model of the plan, on random images."""
        name, *overrides = {**self.plan.first, **self.plan.models}[model]
        settings = [f"train.{key}={value}" for key, value in train.items()]
        data = self._random_images() if "cifar" in name else []
        return load_config(find_config(name), [*overrides, *data, *settings])

    def _random_images(self) -> list[str]:
        path = self.out / "random.npz"
        if not path.exists():
            x = images(self.plan.images).movedim(1, -1).numpy()
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, x_train=x, x_test=x[:1024])
            temporary.rename(path)
        return ["data.name=npz", f"data.path={path}", "data.validation=64"]


@dataclass(frozen=True)
class Part:
    """A part of a session. `limit` is in seconds. `about` is what a row of a table names."""

    name: str
    limit: float
    measure: Callable[[Session], Result]
    about: Result = field(default_factory=dict)


# --- the steps of the trainer ---------------------------------------------------------------------


class Enough(Exception):
    """Ends a run after the steps that are measured."""


def now(device: torch.device) -> float:
    """Seconds of a clock, after the work of the device."""
    devices.synchronize(device)
    return time.perf_counter()


@dataclass
class Watch:
    """Stands for `train_step` in the trainer's loop. It measures whole steps of the loop, from one
    call to the next, and then ends the run.
    """

    device: torch.device
    warm_up: int
    steps: int
    around: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    count: int = 0
    first: float = 0.0  # seconds of the first step
    seconds: float = 0.0  # of the measured steps
    state: State | None = None

    def __call__(
        self, state: State, x: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.count == 0:
            self.state, self.begun = state, time.perf_counter()
        if self.count == 1:
            self.first = now(self.device) - self.begun
        if self.count == self.warm_up:
            devices.synchronize(self.device)
            if self.device.type in devices.NUMBERED:
                torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
            self.around.__enter__()
            self.begun = time.perf_counter()
        if self.count == self.warm_up + self.steps:
            self.seconds = now(self.device) - self.begun
            self.around.__exit__(None, None, None)
            raise Enough
        self.count += 1
        return step.train_step(state, x, labels)


def run_steps(
    session: Session,
    config: Config,
    watch: Watch,
    then: Callable[[RunDirectory], Any] = lambda run: None,
) -> Any:
    """Trains until the watch raises `Enough`. Returns `then` of the run, which is then removed."""
    with tempfile.TemporaryDirectory(dir=session.out) as folder:
        run = RunDirectory(Path(folder) / "run")
        with mock.patch.object(loop, "train_step", watch), contextlib.suppress(Enough):
            loop.fit(config, run, session.device)
        return then(run)


def measure_step(session: Session, model: str, steps: int | None = None, **train: object) -> Result:
    """Seconds of a step, images/s and memory."""
    plan, device = session.plan, session.device
    config = session.config(model, **train, num_steps=100_000, log_every=10)
    watch = Watch(device, plan.warm_up, steps or plan.steps)
    run_steps(session, config, watch)
    seconds = watch.seconds / watch.steps
    batch = config.train.batch_size * config.train.accumulate
    numbered = device.type in devices.NUMBERED
    peak = torch.get_device_module(device).max_memory_allocated(device) if numbered else None
    assert watch.state is not None
    return {
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "peak": peak,
        "first_step": watch.first,
        "compiling": watch.state.compile_seconds or None,
    }


def measure_first(session: Session, model: str) -> Result:
    """The first steps of a model as configured, with the operations of an image."""
    flops = measure_dry_run(session, model)["flops"]
    return {**measure_step(session, model, session.plan.first_steps), "flops": flops}


def part(
    kind: str, model: str, limit: float, measure: Callable[..., Result], *words: object, **keys: Any
) -> Part:
    """A part that measures a model with these keys. The words end its name."""
    name = "-".join(map(str, (kind, model, *words)))
    return Part(name, limit, lambda s: measure(s, model, **keys), {"model": model, **keys})


def step_part(model: str, limit: float, **train: object) -> Part:
    """A part that measures the steps of a model with these keys of `train`."""
    return part("step", model, limit, measure_step, *train.values(), **train)


def variants(model: str, batch: int) -> Iterator[Part]:
    """Precision, compiling and graphs."""
    base = {"memory": "store", "batch_size": batch}
    yield step_part(model, 90, **base, precision="fp32")
    for compiled in ("off", "layers", "step"):
        for graph in ("false", "true")[compiled == "off" :]:
            keys = {"compile": compiled, "cuda_graph": graph}
            yield step_part(model, 90 if compiled == "off" else 240, **base, **keys)


# --- what a step consists of ----------------------------------------------------------------------


def measure_kernels(session: Session, model: str) -> Result:
    """Kernels of a step, and the share of time in which the GPU works. On a CPU, operators."""
    on_cpu = session.device.type == "cpu"
    activities = {ProfilerActivity.CPU, getattr(ProfilerActivity, session.device.type.upper())}
    trace = profile(activities=sorted(activities, key=str))
    watch = Watch(session.device, session.plan.warm_up, session.plan.profiled, trace)
    run_steps(session, session.config(model, num_steps=100_000), watch)
    events = [event for event in trace.events() if counts(event, on_cpu)]
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event.name[:90]] += event.time_range.elapsed_us()
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    return {
        "kernels": len(events) / session.plan.profiled,
        "busy": None if on_cpu else covered(spans) / 1e6 / watch.seconds,
        "seconds": watch.seconds / session.plan.profiled,
        "longest": {name: us / 1e6 / session.plan.profiled for name, us in by_name.most_common(12)},
    }


def counts(event: Any, on_cpu: bool) -> bool:
    """Whether an event of the profiler is a kernel or a copy on a GPU, or an operator on a CPU.

    Names that torch gives to parts of a program, such as an optimizer's step, are events of both.
    """
    if on_cpu:
        return bool(event.name.startswith("aten::"))
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, which are sorted by their beginnings."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def noting_waits(waits: "Counter[str]") -> Iterator[None]:
    """Counts where the host waits for a CUDA device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            waits[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def measure_waits(session: Session, model: str) -> Result:
    """How often the host waits in a step that logs nothing."""
    if session.device.type != "cuda":
        return {"waits": None}
    plan, waits = session.plan, Counter[str]()
    watch = Watch(session.device, plan.warm_up, plan.steps, noting_waits(waits))
    run_steps(session, session.config(model, num_steps=100_000, log_every=10_000), watch)
    return {"waits": {where: count / plan.steps for where, count in waits.most_common()}}


# --- predictions, evaluation, sampling, a run -----------------------------------------------------


def measure_dry_run(session: Session, model: str, **train: object) -> Result:
    """Memory and time as `--dry-run` predicts them, to be compared with the steps."""
    cost = dry_run(session.config(model, **train), session.device)
    return {
        "flops": cost.compute.step_flops / cost.images,  # for one image
        "fixed": cost.memory.fixed_bytes,
        "available": cost.memory.available_bytes,
        "modes": {each.mode: dataclasses.asdict(each) for each in cost.memory.modes},
        "seconds": cost.step_seconds,
    }


def measure_use(session: Session, model: str) -> Result:
    """Images/s of an evaluation, by batch size, and of sampling."""
    watch = Watch(session.device, 0, 1)
    config = session.config(model, num_steps=100_000, compile="off", cuda_graph="false")
    # A checkpoint is written before the first step.
    loaded = run_steps(
        session, config, watch, lambda run: load_model(str(run.path), session.device)
    )
    data = DataSet(config.data)
    count = session.plan.evaluated
    result: Result = {"evaluated": {}, "sequential": loaded.flow.sampling == "sequential"}
    for batch in (None, *session.plan.batches):
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            evaluate(loaded, data, "test", num_images=count, batch_size=batch)
        result["evaluated"][str(batch or "default")] = count / (time.perf_counter() - began)
    number = min(64, count)
    began = time.perf_counter()
    sample(loaded.flow, number, [1.0], seed=0)
    result["sampled"] = number / (time.perf_counter() - began)
    return result


def measure_tests(session: Session) -> Result:
    """`make test-gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"code": done.returncode, "summary": lines[-1] if lines else "", "failed": failed}


def measure_run(session: Session, seconds: float) -> Result:
    """Trains for so long, and evaluates, with the commands that a user gives."""
    run = session.out / "training"
    data = [word for each in session.data for word in ("--set", each)]
    device = ["--device", str(session.device)]
    words = ["train", "--config", session.plan.training, "--set", f"train.budget={seconds:.0f}s"]
    for command in (
        [*words, *data, "--run-dir", str(run), *device],
        ["evaluate", str(run), "--json", str(run / "result.json"), *device],
    ):
        subprocess.run([sys.executable, "-m", "flowtrain", *command], cwd=ROOT, check=True)
    keys = ("bits_per_dim", "bits_per_dim_stderr", "bound", "split", "num_images", "step")
    result = json.loads((run / "result.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    seen = {key: summary[key] for key in ("images", "seconds")}
    return {**{key: result[key] for key in keys}, "config": session.plan.training, **seen}


# --- the session ----------------------------------------------------------------------------------


def parts_of(plan: Plan) -> list[Part]:
    """All parts but the training run, in the order in which they are measured."""
    found = [part("first", model, 900, measure_first) for model in plan.first]
    found += [Part("tests", 300, measure_tests)] if plan.tests else []
    middle = plan.batches[len(plan.batches) // 2]
    for model in plan.models:
        found.append(part("waits", model, 240, measure_waits))
        if model in plan.modes:
            found += [
                *(
                    step_part(model, 90, memory=mode, batch_size=batch)
                    for mode in plan.modes[model]
                    for batch in plan.batches
                ),
                *(each for batch in plan.variants for each in variants(model, batch)),
                part("dry-run", model, 120, measure_dry_run, batch_size=middle),
            ]
        found.append(part("kernels", model, 240, measure_kernels))
        found.append(part("use", model, 240, measure_use))
    return found


def file_of(session: Session, name: str) -> Path:
    return session.out / f"{name}.json"


def write(session: Session, part: Part, began: float, **outcome: Any) -> None:
    """Writes the file of a part: its result, or its error."""
    content = {"part": part.name, "about": part.about, "took": time.time() - began, **outcome}
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomically(file_of(session, part.name), text.encode())


def measure(session: Session, part: Part) -> None:
    """Measures a part in this process."""
    began = time.time()
    try:
        write(session, part, began, result=part.measure(session))
    except Exception as error:  # of one part; the others go on
        traceback.print_exc()
        said = str(error).strip().splitlines() or [type(error).__name__]
        write(session, part, began, error=said[0][:200])


def measure_apart(session: Session, part: Part, words: Sequence[str]) -> None:
    """Measures a part in a process of its own. It gets these words, and ends at its limit."""
    began = time.time()
    command = [sys.executable, str(HERE), *words, "--part", part.name]
    with (session.out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(part.limit)
            reason = f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {part.limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
    if not file_of(session, part.name).exists():
        write(session, part, began, error=reason)


def require_speed(session: Session, name: str) -> None:
    """Ends the session if a model of `Plan.first` is too slow, or could not be measured."""
    found = json.loads(file_of(session, name).read_text())
    if "error" in found:
        reached = found["error"]
    else:
        step = found["result"]
        speed = step["flops"] * step["images_per_second"] / 1e12
        if speed >= session.plan.least:
            return
        reached = f"{speed:.4g} TFLOP/s, and at least {session.plan.least:.0f} are expected"
    raise SystemExit(f"{name}: {reached}; the session ends here. {session.out}/report.md")


def results(session: Session) -> dict[str, Result]:
    """The content of all files, by name, the oldest first."""
    files = sorted(session.out.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return {file.stem: json.loads(file.read_text()) for file in files}


def shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of all keys, or nothing if there are no rows."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([shown(row.get(key)) for key in keys] for row in rows)]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def ratio(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else value / unit


def report(session: Session) -> str:
    """The tables of all results."""
    found = results(session)
    good = {name: each for name, each in found.items() if "result" in each}

    def of(kind: str) -> list[tuple[Result, Result]]:
        parts = [each for name, each in good.items() if name.startswith(kind)]
        return [(each["about"], each["result"]) for each in parts]

    def result(name: str, key: str) -> Any:
        return good.get(name, {}).get("result", {}).get(key)

    def of_step(about: Result, step: Result) -> Result:
        rate = step["images_per_second"]
        flops = step.get("flops", result(f"dry-run-{about['model']}", "flops"))
        return {
            **about,
            "ms a step": 1e3 * step["seconds"],
            "images/s": rate,
            "TFLOP/s": None if flops is None else rate * flops / 1e12,
            "peak GiB": ratio(step["peak"], GIB),
            "first step s": step["first_step"],
        }

    def of_mode(about: Result, dry: Result, mode: str, cost: Result) -> Result:
        peak = result(f"step-{about['model']}-{mode}-{about['batch_size']}", "peak")
        predicted = dry["fixed"] + cost["needed_bytes"]
        return {
            **about,
            "memory": mode,
            "said GiB": predicted / GIB,
            "measured GiB": ratio(peak, GIB),
            "said / measured": ratio(predicted, peak),
            "largest batch said": cost["largest_batch"],
        }

    def of_kernels(about: Result, kernels: Result) -> Result:
        return {
            **about,
            "a step": kernels["kernels"],
            "GPU busy %": ratio(kernels["busy"], 0.01),
            "ms a step, profiled": 1e3 * kernels["seconds"],
        }

    def of_use(about: Result, use: Result) -> Result:
        evaluated = {f"evaluate, batch {k}": v for k, v in use["evaluated"].items()}
        sampled = {"sampling": use["sampled"], "sequential": use["sequential"]}
        return {**about, **evaluated, **sampled}

    tables: dict[str, list[Result]] = {
        "The first minutes": [of_step(*each) for each in of("first-")],
        "Tests": [{"tests": tests["summary"]} for _, tests in of("tests")],
        "Waits of the host, a step": [
            {**about, "waits": waits_in_words(waits["waits"])} for about, waits in of("waits-")
        ],
        "Steps of the trainer": [of_step(*each) for each in of("step-")],
        "Kernels": [of_kernels(*each) for each in of("kernels-")],
        "The longest kernels": [
            {"model": about["model"], "kernel": f"`{name}`", "ms a step": 1e3 * seconds}
            for about, kernels in of("kernels-")
            for name, seconds in kernels["longest"].items()
        ],
        "Dry run beside the peak": [
            of_mode(about, dry, *each)
            for about, dry in of("dry-run-")
            for each in dry["modes"].items()
        ],
        "Evaluation and sampling, images/s": [of_use(*each) for each in of("use-")],
        "Training": [{**about, **training} for about, training in of("training")],
        "Not measured": [
            {"part": name, "why": each["error"]} for name, each in found.items() if "error" in each
        ],
    }
    return "".join(table(title, rows) for title, rows in tables.items())


def waits_in_words(waits: Mapping[str, float] | None) -> str:
    if waits is None:
        return "only CUDA can say"
    return ", ".join(f"{where}: {shown(count)}" for where, count in waits.items()) or "none"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-session"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--minutes", type=float, default=45, help="in all, for this call")
    parser.add_argument("--train-minutes", type=float, default=12, help="kept for the training run")
    parser.add_argument("--data", action="append", default=[], metavar="data.KEY=VALUE")
    parser.add_argument("--only", default="", help="parts whose name begins so")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--train-seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(words)
    options.out.mkdir(parents=True, exist_ok=True)
    device = devices.resolve(options.device)
    session = Session(PLANS[options.plan], device, options.out.resolve(), options.data)
    parts = {part.name: part for part in parts_of(session.plan)}

    def left() -> float:
        return 60 * options.minutes - (time.monotonic() - began)

    def training(seconds: float) -> Part:
        about = {"budget": round(seconds)}
        return Part("training", seconds + 300, lambda s: measure_run(s, seconds), about)

    if options.part is not None:
        seconds = options.train_seconds
        measure(session, parts[options.part] if seconds is None else training(seconds))
        return
    given = list(sys.argv[1:] if words is None else words)
    for part in parts.values():
        if not part.name.startswith(options.only):
            continue
        if not file_of(session, part.name).exists():
            if left() < 60 * options.train_minutes:
                print(
                    "the rest is for the training run; the same command measures the missing parts"
                )
                break
            print(f"{part.name}: {left() / 60:.1f} minutes are left", flush=True)
            measure_apart(session, part, given)
            write_report(session)
        if part.name.startswith("first-"):
            require_speed(session, part.name)
    seconds = left() - FOR_EVALUATION
    if not options.only and not file_of(session, "training").exists() and seconds > 0:
        print(f"training for {seconds / 60:.1f} minutes", flush=True)
        measure_apart(session, training(seconds), [*given, "--train-seconds", str(seconds)])
    write_report(session)
    print(f"{session.out}/report.md")


def write_report(session: Session) -> None:
    where = f"{devices.machine(session.device)}, torch {torch.__version__}"
    heading_of = f"# A session on {where}, CUDA {torch.version.cuda}\n\n"
    (session.out / "report.md").write_text(heading_of + report(session))


if __name__ == "__main__":
    main()
