"""The mean log-density in the space that a flow sees, as MAF's paper reports it: nats per
dequantized logit image.

`python benchmarks/logit_space.py runs/maf_mnist`. It is the log-likelihood without the terms of the
data transform: -log q(u|x) - D log Q and the logit's log-determinant. Models with different alpha
cannot be compared by it.
"""

import argparse
import math

import torch

from flowtrain import config as configuration
from flowtrain.checkpoints.load import load_model
from flowtrain.data.splits import DataSet
from flowtrain.system.random import Stream, uniform


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run directory or a checkpoint")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="data.KEY=VALUE"
    )
    options = parser.parse_args()
    model = load_model(options.model, torch.device("cpu"))
    values = configuration.override(model.checkpoint.meta["config"], options.settings)
    split = DataSet(configuration.parse(values, "--set").data).split("test")
    flow, nats = model.flow, []
    for start in range(0, len(split), 500):
        x = split.take(slice(start, start + 500))
        noise = uniform(x.shape, 0, Stream.EVALUATION, start)
        nats.append((flow(x, noise).total - flow.dequantizer(x, noise)[1]).double())
    found = torch.cat(nats)
    error = found.std() / math.sqrt(len(found))
    print(
        f"{found.mean():.1f} +- {error:.1f} nats in the space that the flow sees, {len(found):,} "
        f"test images"
    )


if __name__ == "__main__":
    main()
