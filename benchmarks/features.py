"""Trains the classifiers whose features `flowtrain quality` compares, and writes their files.

`python benchmarks/features.py --data mnist-cnn data.name=mnist` takes two minutes of one core, and
`--data cifar-cnn data.name=cifar10` ten. Further KEY=VALUE name the place of the data. Choices were
made on the validation split; the accuracy on the test split goes into the file.
"""

import argparse

import safetensors.torch
import torch

from flowtrain import config as configuration
from flowtrain.data.batches import augment
from flowtrain.data.splits import DataSet, Split
from flowtrain.tools.quality.features import FOLDER, SHAPES, Classifier

BATCH = 64
STEPS = {"mnist-cnn": 2000, "cifar-cnn": 5000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", action="append", metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--steps", type=int)
    for name, *settings in parser.parse_args().data:
        config = configuration.parse(configuration.override({}, settings), "--data")
        train(name, DataSet(config.data), parser.parse_args().steps or STEPS[name])


def train(name: str, data: DataSet, steps: int) -> None:
    torch.manual_seed(0)
    net = Classifier(SHAPES[name][0]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    split = data.split("train")
    x, labels = split.take(slice(None)), split.labels
    assert labels is not None
    for step in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        batch = augment(x[chosen], data.flip, 2, 0, step * BATCH)
        loss = torch.nn.functional.cross_entropy(net(batch), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"{name}: step {step + 1} of {steps}, {loss.item():.3f}", flush=True)
    net.half().float()  # as in the file
    found = {which: accuracy(net.eval(), data.split(which)) for which in ("validation", "test")}
    print(name, found, flush=True)
    tensors = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    file = FOLDER / f"{name}.safetensors"
    safetensors.torch.save_file(tensors, file, {"accuracy": f"{found['test']:.4f}"})
    print(f"wrote {file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


@torch.no_grad()
def accuracy(net: Classifier, split: Split) -> float:
    assert split.labels is not None
    found = torch.cat([net(part).argmax(dim=1) for part in split.take(slice(None)).split(500)])
    return (found == split.labels).double().mean().item()


if __name__ == "__main__":
    main()
