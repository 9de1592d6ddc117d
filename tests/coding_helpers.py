"""Flows whose density is known, models in memory, and images, for the tests of tools."""

import math
import struct
import zlib
from pathlib import Path

import torch
from catalogue import TINY
from helpers import a_config, images, initialized, perturb, seeded
from PIL import Image
from torch import nn

from flowtrain.bijections import Bijection, DiagonalAffine, Flatten, Sequential
from flowtrain.checkpoints.build import build_flow
from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.flow.dequantize import Dequantizer
from flowtrain.flow.flow import Flow
from flowtrain.flow.variational import VariationalNoise
from flowtrain.tools.archive import format as archive
from flowtrain.tools.archive import strips
from flowtrain.tools.archive.decompress import Opened

GREY, RGB = (1, 4, 4), (3, 4, 4)


def loaded(flow: Flow, config=None, path="a.safetensors", **meta) -> LoadedModel:
    """A model as if it had been read from a file."""
    config = config or a_config()
    meta = {"config": config.resolved(), "step": 3, "versions": {}, **meta}
    flow = flow.eval().requires_grad_(False)
    return LoadedModel(flow, config, "raw", Checkpoint(Path(path), meta, {}))


def variational(flow: Flow, scale: float = 0.1) -> Flow:
    flow.dequantizer.noise_model = perturb(VariationalNoise(flow.shape, 2, 4), scale)
    return flow


def affine_flow(shape, levels=256, slope=3.0, shift=0.1) -> Flow:
    """`z = slope (y - 1/2) + shift`."""
    affine = DiagonalAffine((math.prod(shape),))
    nn.init.constant_(affine.log_scale, 8 * math.atanh(math.log(slope) / 8))
    nn.init.constant_(affine.shift, shift)
    return Flow(Sequential(Flatten(shape), affine), Dequantizer(levels), shape)


class Spoiled(Bijection):
    """The log-determinant is `value` `where` the first pixel is so, and the inverse is off."""

    def __init__(self, inner, where, value=math.nan, off=0.0):
        super().__init__()
        self.inner, self.where, self.value, self.off = inner, where, value, off

    def forward(self, x, context=None):
        z, log_det = self.inner(x)
        return z, torch.where(self.where(x[:, 0, 0, 0]), self.value, log_det)

    def inverse(self, z, context=None):
        x, log_det = self.inner.inverse(z)
        return x + self.off, log_det


def causal_flow(shape, levels=256, scale=0.2, x=None, **options) -> Flow:
    """A causal flow with every parameter moved, set from `x` or smooth images."""
    model = {"name": "causal", **TINY["causal"], **options}
    flow = build_flow(a_config(model, {"flip": False}), shape, levels)
    if x is None:
        x = (smooth(64, shape).long() * levels // 256).to(torch.uint8)
    return perturb(initialized(flow, x), scale).eval().requires_grad_(False)


def smooth(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Images of which neighbouring pixels are alike."""
    coarse = torch.rand(count, shape[0], 3, 3, generator=seeded())
    fine = nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    return (fine * 255).to(torch.uint8)


def picture(path, size=(8, 8), mode="L", value=0):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path, "PNG")


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size than its pixels have."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def opened(path: Path, data: bytes, memory: int | None = None) -> Opened:
    path.write_bytes(data)
    return Opened(path, memory)


def stored(strip: bytes | None = None, parts: list[bytes] | None = None, **changes) -> bytes:
    """An archive of two images without a model, with changes; None leaves a key out."""
    x = images(2, (1, 8, 8), 17)
    sums = b"".join(archive.checksum(image).to_bytes(4, "little") for image in x)
    described = {"shape": [1, 8, 8], "levels": 17, "names": ["a.png", "b.png"], **changes}
    described = {key: value for key, value in described.items() if value is not None}
    return archive.pack(described, [sums, strip or strips.strip(x), *(parts or [])])


def foreign_archive(path: str, model: bytes | None = None) -> bytes:
    """An archive of one image that a model has coded, which is in the archive or at `path`."""
    described = {
        **{"shape": [1, 8, 8], "levels": 17, "names": ["a.png"]},
        "streams": [{"images": 1, "carriers": 0, "carrier_bytes": 0, "chunks": [1]}],
        "versions": {"torch": torch.__version__},
        "model": {"path": path, "weights": "raw", "embedded": model is not None},
    }
    embedded = [] if model is None else [model]
    return archive.pack(described, [bytes(4 + archive.IDENTITY.size), bytes(8), *embedded])
