"""Archives: images per second each way, and the share of the flow's own passes."""

import functools
import statistics

import torch
from common import arguments, begin, flow_of, images, in_turns, table

from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.system.console import silent
from flowtrain.system.threads import one_thread
from flowtrain.tools.archive.codec import coder_of
from flowtrain.tools.archive.streams import EncodedStream, decode_stream, encode_stream, estimate
from flowtrain.tools.archive.threads import in_threads


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument(
        "--config", default="glow_cifar_small.yaml", help="a model for 3x32x32 images"
    )
    parser.add_argument(
        "--images", type=int, default=128, help="images per stream; each thread has one"
    )
    options = parser.parse_args()
    begin(f"Compression of {options.images} images per thread by {options.config}", options)
    flow = flow_of(load_config(find_config(options.config))).eval().requires_grad_(False)
    x = images(options.images * options.threads)
    coder = coder_of(flow)
    with one_thread():
        expected = estimate(coder, x[: coder.chunk])
    assert expected is not None
    parts = torch.arange(len(x)).view(options.threads, -1).tolist()

    def encode() -> list[EncodedStream]:
        tasks = [
            functools.partial(encode_stream, coder, x, part, expected.borrowed) for part in parts
        ]
        return in_threads(tasks, len(x), silent)

    streams = encode()

    def decode() -> None:
        tasks = [functools.partial(decode_stream, coder, s.words, s.described) for s in streams]
        in_threads(tasks, len(x), silent)

    contenders = {
        "forward passes, float32": lambda: flow.log_prob(x),
        "compress": encode,
        "decompress": decode,
    }
    seconds = in_turns(contenders, options.repeats, warmup=0)
    table(seconds, {"to the forward passes": "forward passes, float32"})
    coded = sum(len(stream.images) - stream.described.carriers for stream in streams)
    for name, times in seconds.items():
        print(f"- {name}: {coded / statistics.median(times):.1f} images/s")


if __name__ == "__main__":
    main()
