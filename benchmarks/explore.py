"""The explorer: milliseconds of a move, from the request of a page to its answer, over a socket.

A move, of a slider or along a path, decodes one image. Facts are the maps and scores that follow
when the slider rests. What is computed in idle times is left out. Weights do not change how long
anything takes, so the models are those of configurations, initialized from random images, with as
many random training images as their data set has.
"""

import contextlib
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from common import arguments, begin
from sampling import flow_of

from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import Split
from flowtrain.explore import guard, server
from flowtrain.explore.session import Session
from flowtrain.explore.worker import Worker

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
MEMORY = 2**30


class RandomData:
    """Random images in place of a data set: what `Session` asks of a `DataSet`."""

    def __init__(self, shape: tuple[int, int, int], levels: int, count: int):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, levels, (count, *shape), dtype=np.uint8)

    def require(self, *about_the_model: object) -> None:
        pass

    def split(self, name: str) -> Split:
        count = len(self.pixels) if name == "train" else 256
        return Split(self.pixels, np.arange(count), 0)


class Page:
    """Asks as a page does, over one connection."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self.origin = f"http://127.0.0.1:{port}"
        self.turn = 0

    def ask(self, topic: str, **fields: Any) -> Any:
        self.turn += 1
        body = json.dumps({"tab": "benchmark", "turn": self.turn, **fields})
        self.connection.request("POST", f"/api/{topic}", body, {"Origin": self.origin})
        answer = self.connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        return found


@contextlib.contextmanager
def page_on(session: Session):  # type: ignore[no-untyped-def]
    worker = Worker()
    at = server.listening("127.0.0.1", 0)
    port = at.getsockname()[1]
    application = server.app(session, worker, guard.names_of("127.0.0.1", port), None)
    running = uvicorn.Server(server.settings(application))
    thread = threading.Thread(target=running.run, args=([at],))
    thread.start()
    try:
        yield Page(port)
    finally:
        running.should_exit = True
        thread.join()
        worker.end()


def moves(session: Session, page: Page) -> dict[str, Callable[[int], object]]:
    """What is timed, each a function of the number of the repeat."""
    levels = len(session.levels)
    one = {"kind": "sample", "seed": 0, "index": 0, "temperatures": [1.0] * levels}
    other = {**one, "index": 1}

    def move(i: int) -> object:
        return page.ask("show", place={"source": one, "other": other, "way": i / 100})

    def samples(count: int) -> Callable[[int], object]:
        drawn = {"temperatures": [1.0] * levels, "start": 0, "count": count}
        return lambda i: page.ask("samples", seed=i, **drawn)

    def facts(i: int) -> object:
        return page.ask("facts", place={"source": {**one, "index": i}})

    def nearest(by: str) -> Callable[[int], object]:
        return lambda i: page.ask("neighbours", place={"source": one}, by=by)

    return {
        "a move": move,
        "4 samples": samples(4),
        "36 samples": samples(36),
        "facts": facts,
        "nearest by pixels": nearest("pixels"),
        "nearest by latents": nearest("latents"),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--configs", nargs="*", default=CONFIGS, help="the configurations")
    options = parser.parse_args()
    begin("A move in the explorer, in milliseconds (median)", options)
    heads_are_printed = False
    for name in options.configs:
        flow, config = flow_of(name), load_config(find_config(name))
        levels = flow.levels
        assert levels is not None
        count = TRAINING_IMAGES.get(config.data.name, 50_000)
        data: Any = RandomData(flow.shape, levels, count)
        with tempfile.TemporaryDirectory() as folder:
            meta = {"config": config.resolved(), "step": 0}
            checkpoint = Checkpoint(Path(folder) / "model.safetensors", meta, {})
            model = LoadedModel(flow, config, "raw", checkpoint)
            session = Session(model, name, lambda data=data: data, MEMORY)
            session.read_data()
        with page_on(session) as page:
            session.idle(lambda: None)  # for neighbours by latents
            timed = moves(session, page)
            found = []
            for run in timed.values():
                run(100)  # warm
                seconds = []
                for i in range(options.repeats):
                    began = time.perf_counter()
                    run(i)
                    seconds.append(time.perf_counter() - began)
                    if sum(seconds) > 30:
                        break
                found.append(f"{1000 * statistics.median(seconds):,.0f}")
        parameters = sum(p.numel() for p in flow.parameters()) / 1e6
        if not heads_are_printed:
            print("| model | " + " | ".join(timed) + " |\n|---|" + "---|" * len(timed))
            heads_are_printed = True
        print(f"| {name} ({parameters:.2g} M) | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
