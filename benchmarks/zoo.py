"""Trains the models that come with flowtrain, and writes their checkpoints and cards.

`python benchmarks/zoo.py` trains all, which takes two hours. `--only NAME...` trains some of them.
A run that exists is resumed, so only its checkpoint and card are written again. `--pack RUN` does
so for a run anywhere, and trains nothing. `--cifar` and `--mnist` name the place of the data, as
KEY=VALUE of `flowtrain train` does. Each checkpoint holds the averaged weights, networks in half
precision. One that is worse than its run by more than `WORSE` is refused, and so is a run of
another configuration than the card's. `docs/models.md` is written, too.
"""

import argparse
import hashlib
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from common import flowtrain
from torch import nn

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import load_model
from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.data.splits import DataSet
from flowtrain.evaluation.evaluate import evaluate
from flowtrain.evaluation.score import mean_loss
from flowtrain.system.console import duration
from flowtrain.system.device import machine

WORSE = 0.001  # bits/dim, or nats
FIRST = 64
CPU = torch.device("cpu")
DOCS = Path(__file__).resolve().parents[1] / "docs"
# The keys of `data` in which a run may differ from its configuration: the place of the data.
PLACES = {"name", "root", "path"}


@dataclass(frozen=True)
class Trained:
    title: str
    config: str
    data: str
    licence: str
    where: str = ""  # the option with the place of the data


DIGITS = "Optical digits, Alpaydin & Kaynak 1998, as in scikit-learn", "CC BY 4.0"
MNIST = "MNIST, LeCun, Bottou, Bengio & Haffner 1998", "CC BY-SA 3.0", "mnist"
CIFAR = "CIFAR-10, Krizhevsky 2009", "no licence is stated; research use", "cifar"
MODELS = {
    "glow_digits": Trained("Glow on the 8x8 digits", "glow_digits", *DIGITS),
    "two_moons": Trained("RealNVP on two moons", "realnvp_two_moons", "made by a seed", "none"),
    "glow_mnist_small": Trained("Glow on MNIST", "glow_mnist_small", *MNIST),
    "glow_mnist_conditional": Trained(
        "Glow on MNIST with a prior for each class", "glow_mnist_conditional", *MNIST
    ),
    "glow_cifar_small": Trained("Glow on CIFAR-10", "glow_cifar_small", *CIFAR),
    "causal_cifar_small": Trained("Causal flow on CIFAR-10", "causal_cifar_small", *CIFAR),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=Path, default=Path("runs/models"))
    parser.add_argument("--pack", type=Path, metavar="RUN", help="of the one model of --only")
    for name in ("cifar", "mnist"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="data.KEY=VALUE")
    options = parser.parse_args()
    if options.pack is not None and len(options.only) != 1:
        parser.error("--pack RUN: say which model it is, by --only NAME")
    for name in options.only:
        run = options.pack or options.runs / name
        if options.pack is None:
            model = MODELS[name]
            place = getattr(options, model.where) if model.where else []
            flowtrain("train", "--config", model.config, *place, "--run-dir", str(run))
        print(packed(name, run), flush=True)
        page = runpy.run_path(str(DOCS / "models.py"))["page"]()
        (DOCS / "models.md").write_text(page, encoding="utf-8")


def packed(name: str, run: Path) -> str:
    """Writes the checkpoint, the card and the picture of a finished run. Returns its figure."""
    model = MODELS[name]
    summary = json.loads((run / "summary.json").read_text())
    file = zoo.checkpoint_of(name)
    loaded = load_model(str(run), CPU)
    # The place of the data belongs to the machine that trained the model.
    config = load_config(find_config(model.config)).resolved()
    config["data"]["root"] = "data"
    own = loaded.config.resolved()
    data_keys = (own["data"].keys() & config["data"].keys()) - PLACES
    other = [f"data.{key}" for key in data_keys if own["data"][key] != config["data"][key]]
    other += [key for key in config if key != "data" and own[key] != config[key]]
    if other or not summary["finished"]:
        raise SystemExit(f"{run}: not a finished run of {model.config} {' '.join(other)}")
    # The weights of networks, which are most of a model. A small error in the data path would
    # change the likelihood of every pixel.
    modules = loaded.flow.named_modules()
    halved = {f"{key}.weight" for key, layer in modules if isinstance(layer, nn.Linear)}
    tensors = {
        f"model.{key}": value.half() if key in halved else value
        for key, value in loaded.flow.state_dict().items()
    }
    meta = loaded.checkpoint.meta
    described = {key: meta[key] for key in ("shape", "levels", "step")} | {"config": config}
    checkpoint_format.write(file, described, tensors)

    data = DataSet(loaded.config.data)
    half = load_model(str(file), CPU)
    before, after = (evaluate(each, data, "test")[0] for each in (loaded, half))
    whole, loss, error = before.loss, after.loss, after.loss_stderr
    assert whole is not None and loss is not None and error is not None
    if loss - whole > WORSE:
        raise SystemExit(f"{name}: {loss} in half precision, {whole} before")
    test, flow = data.split("test"), half.flow
    first = min(FIRST, len(test))
    card = zoo.Card(
        title=model.title,
        command=f"flowtrain train --config {model.config}",
        machine=machine(CPU),
        time=duration(summary["seconds"]),
        data=model.data,
        licence=model.licence,
        parameters=summary["parameters"],
        unit=flow.kind.unit,
        loss=round(loss, 4),
        error=round(error, 5),  # 0.00248 is printed as 0.002, and 0.0025 as 0.003
        likelihood="exact" if flow.exact else f"{flow.kind.bound} from one draw of noise",
        images=after.num_images,
        loss_of_first=round(mean_loss(flow, test.at(np.arange(first)), seed=0), 4),
        first=first,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    text = yaml.safe_dump(card.model_dump(), sort_keys=False, width=96, allow_unicode=True)
    (zoo.FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")
    flowtrain("sample", str(file), "--out", str(DOCS / "models" / f"{name}.png"))
    return f"{name}: {loss:.3f} +- {error:.3f} {card.unit}, {file.stat().st_size / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
