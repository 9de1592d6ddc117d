"""The explorer: milliseconds of a move, from the request of a page to its answer over a socket, and
the memory of its server under requests that take as much as they may.

Each model is served by a process of its own, and asked by this one over HTTP. A second table has
the CPU time of the server for each request, which other programs change little. A move of a slider
or along a path decodes one image. Facts are the maps and scores that follow when the slider rests.
Idle work is left out. Weights do not change how long anything takes, so the models are those of
configurations, initialized from random images, with random training images.

`--memory MIB` asks for all that `--max-memory MIB` allows, one after the other and then at once,
and prints by how much the peak of the server's memory grows (VmHWM, Linux).
"""

import concurrent.futures
import contextlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from common import arguments, begin
from PIL import Image
from sampling import flow_of

from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import Split
from flowtrain.explore import guard, server
from flowtrain.explore.background import Background
from flowtrain.explore.session import BYTES_OF_PIXEL, Session
from flowtrain.explore.worker import Worker
from flowtrain.system.allocator import keep_freed_memory

CONFIGS = (
    "glow_digits",
    "glow_mnist_small",
    "glow_cifar_small",
    "glow_cifar",
    "causal_digits",
    "causal_mnist_small",
    "causal_cifar_small",
)
TRAINING_IMAGES = {"digits": 1455}
OTHERS = 32  # images of the test split, of validation, and those encoded
TAB = "benchmark"
PATIENCE = 20.0  # seconds after which a large request is overtaken


class RandomData:
    """Random images in place of a data set: what `Session` asks of a `DataSet`."""

    def __init__(self, shape: tuple[int, int, int], levels: int, count: int):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, levels, (count, *shape), dtype=np.uint8)

    def require(self, *about_the_model: object) -> None:
        pass

    def split(self, name: str) -> Split:
        count = len(self.pixels) if name == "train" else OTHERS
        return Split(self.pixels, np.arange(count), 0)


def served(name: str, memory: int, options: Any, told: Connection) -> None:
    """A process: tells its port and what the page has to know of the model, and answers."""
    torch.set_num_threads(options.threads)
    if options.malloc == "kept":
        keep_freed_memory()
    torch.set_grad_enabled(False)
    flow, config = flow_of(name), load_config(find_config(name))
    assert flow.levels is not None
    data: Any = RandomData(flow.shape, flow.levels, TRAINING_IMAGES.get(config.data.name, 50_000))
    with tempfile.TemporaryDirectory() as folder:
        meta = {"config": config.resolved(), "step": 0}
        checkpoint = Checkpoint(Path(folder) / "model.safetensors", meta, {})
        session = Session(LoadedModel(flow, config, "raw", checkpoint), name, lambda: data, memory)
        session.read_data()
        assert isinstance(session.data, Background)
        session.data.encoded = min(session.data.encoded, OTHERS)
        while session.idle(lambda: None):
            pass
        at = server.listening("127.0.0.1", 0)
        port = at.getsockname()[1]
        worker = Worker()
        application = server.app(session, worker, guard.names_of("127.0.0.1", port), None)
        told.send((port, session.describe()))
        uvicorn.Server(server.settings(application)).run([at])


class Page:
    """Asks a server as a page does, a request on a connection of its own each time."""

    def __init__(self, name: str, memory: int, options: Any):
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.process = context.Process(target=served, args=(name, memory, options, there))
        self.process.start()
        there.close()
        self.port, self.about = here.recv()
        self.turns = itertools.count()
        self.lock = threading.Lock()

    def post(self, path: str, body: str | bytes) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            origin = f"http://127.0.0.1:{self.port}"
            connection.request("POST", f"/api/{path}", body, {"Origin": origin})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def ask(self, topic: str, tab: str = TAB, **fields: Any) -> tuple[int, Any]:
        return self.post(topic, json.dumps({"tab": tab, "turn": next(self.turns), **fields}))

    def answer(self, topic: str, **fields: Any) -> bytes:
        status, found = self.ask(topic, **fields)
        assert status == 200, found
        return bytes(found)

    def cpu_seconds(self) -> float:
        """CPU time of the server. The clock of another process has this number (Linux)."""
        assert self.process.pid is not None
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def peak(self) -> float:
        """MiB of memory that the server has had at most."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = (each for each in lines if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def page_on(name: str, memory: int, options: Any) -> Iterator[Page]:
    page = Page(name, memory, options)
    try:
        yield page
    finally:
        page.end()


def moves(page: Page) -> dict[str, Callable[[int], object]]:
    """What is timed, each a function of the number of the repeat, which changes the image."""
    levels = len(page.about["levels"])
    hot = [1.0] * levels
    one = {"kind": "sample", "seed": 0, "index": 0, "temperatures": hot}
    other = {**one, "index": 1}

    def along(i: int) -> dict[str, Any]:
        return {"source": one, "other": other, "way": (i + 1) / 1000}

    def slider(i: int) -> object:
        move = {"level": levels - 1, "component": 0, "amount": (i + 1) / 100}
        return page.answer("show", place={"source": one, "principal": [move]})

    def samples(count: int) -> Callable[[int], object]:
        drawn = {"temperatures": hot, "start": 0, "count": count}
        return lambda i: page.answer("samples", seed=i + 1, **drawn)

    def nearest(by: str) -> Callable[[int], object]:
        return lambda i: page.answer("neighbours", place=along(i), by=by)

    return {
        "a slider": slider,
        "a path": lambda i: page.answer("show", place=along(i)),
        "facts after it": lambda i: page.answer("facts", place=along(i)),
        "nearest by pixels": nearest("pixels"),
        "by latents": nearest("latents"),
        "4 samples": samples(4),
        "36 samples": samples(36),
    }


def cell(seconds: list[float]) -> str:
    """The median and the ninth decile, in milliseconds."""
    high = sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
    return f"{1000 * statistics.median(seconds):,.0f} / {1000 * high:,.0f}"


def timed(page: Page, options: Any) -> tuple[list[str], list[str]]:
    """A cell for each kind of move, of whole requests and of CPU times."""
    kinds = moves(page)
    kinds["a path"](options.repeats)  # warm
    whole, of_cpu = [], []
    for run in kinds.values():
        seconds: list[float] = []
        cpu_seconds: list[float] = []
        for i in range(options.repeats):
            cpu, began = page.cpu_seconds(), time.perf_counter()
            run(i)
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(page.cpu_seconds() - cpu)
            if sum(seconds) > options.seconds:
                break
        whole.append(cell(seconds))
        of_cpu.append(cell(cpu_seconds))
    return whole, of_cpu


def largest(page: Page, memory: int) -> dict[str, Callable[[str], object]]:
    """Requests for all that is allowed, each a function of the tab that asks."""
    count = page.about["largest_count"]
    hot = [1.0] * len(page.about["levels"])
    seed = random.Random(0)

    def source(index: int = 0) -> dict[str, Any]:
        at = seed.randrange(2**53)
        return {"kind": "sample", "seed": at, "index": index, "temperatures": hot}

    def overtaken(topic: str, **fields: Any) -> Callable[[str], object]:
        """Asks, and after a while for less of the same, so that the first is given up."""

        def run(tab: str) -> object:
            small = {"count": 1} if topic == "samples" else {"steps": 2}
            timer = threading.Timer(PATIENCE, lambda: page.ask(topic, tab, **{**fields, **small}))
            timer.start()
            found = page.ask(topic, tab, **fields)
            timer.cancel()
            return found

        return run

    side = math.isqrt(memory // BYTES_OF_PIXEL)
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    padding = page.about["largest_file"] - len(file.getvalue())
    whole = file.getvalue() + b"\0" * max(0, padding)
    place = {"source": source(count - 1), "other": source(count - 1), "way": 0.5}
    drawn = {"seed": 1, "temperatures": hot, "start": 0, "count": count}
    return {
        "samples": overtaken("samples", **drawn),
        "an animation": overtaken("gif", place=place, steps=max(2, min(1000, count // 8))),
        "the last of many samples": lambda tab: page.ask("show", tab, place=place),
        "facts": lambda tab: page.ask("facts", tab, place=place),
        "nearest by pixels": lambda tab: page.ask("neighbours", tab, place=place, by="pixels"),
        "test images": lambda tab: page.ask("tests", tab, start=0, count=count),
        "a large image file": lambda tab: page.post("upload", whole),
    }


def hungry(page: Page, memory: int) -> list[str]:
    """A cell for each large request: the peak beyond that of a server that has shown one image."""
    moves(page)["a path"](0)
    start = page.peak()
    found = [f"{start:,.0f}"]
    requests = largest(page, memory)
    for run in requests.values():
        run(TAB)
        found.append(f"{page.peak() - start:+,.0f}")
    with concurrent.futures.ThreadPoolExecutor(8 * len(requests)) as pool:
        for tab in range(8):
            for run in requests.values():
                pool.submit(run, f"tab{tab:05}")
    return [*found, f"{page.peak() - start:+,.0f}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--configs", nargs="*", default=CONFIGS, help="the configurations")
    parser.add_argument("--memory", type=int, metavar="MIB", help="memory instead of times")
    parser.add_argument(
        "--seconds", type=float, default=30, help="after which a kind of move is timed no more"
    )
    options = parser.parse_args()
    memory = (options.memory or 1024) * 2**20
    if options.memory:
        begin(
            f"MiB of the explorer's server beyond its start, --max-memory {options.memory}", options
        )
    else:
        begin("Moves in the explorer, ms of whole requests: median / ninth decile", options)
    heads = ""
    later = []
    for name in options.configs:
        with page_on(name, memory, options) as page:
            if options.memory:
                titles = ["at the start", *largest(page, memory), "all, 8 times at once"]
            else:
                titles = list(moves(page))
            if not heads:
                heads = "| model | " + " | ".join(titles) + " |\n|---|" + "---|" * len(titles)
                print(heads)
            begins = f"| {name} ({page.about['parameters'] / 1e6:.2g} M) | "
            if options.memory:
                cells = hungry(page, memory)
            else:
                cells, of_cpu = timed(page, options)
                later.append(begins + " | ".join(of_cpu) + " |")
            print(begins + " | ".join(cells) + " |", flush=True)
    if later:
        print("\n### The same, CPU time of the server\n", heads, *later, sep="\n")


if __name__ == "__main__":
    main()
