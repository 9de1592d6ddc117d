"""Archives of causal flows, which have the distribution of each level."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import CAUSAL, sets
from cli_helpers import quick
from coding_helpers import GREY, RGB, causal_flow, smooth
from helpers import a_config, images

from flowtrain.checkpoints.format import Checkpoint
from flowtrain.checkpoints.load import LoadedModel
from flowtrain.errors import UserError
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.flow import Flow
from flowtrain.tools.archive import compress
from flowtrain.tools.archive.coder import coder_of, probe
from flowtrain.tools.archive.decompress import Opened
from flowtrain.tools.archive.direct import DirectCodec
from flowtrain.tools.archive.format import IDENTITY
from flowtrain.tools.archive.stack import Stack
from flowtrain.tools.archive.streams import decode_stream, encode_stream

pytest.importorskip("constriction")


def empty() -> Stack:
    return Stack(np.zeros(0, np.uint32))


def bits(flow: Flow, x: torch.Tensor) -> float:
    return flow.log_prob(x).sum().item() / -math.log(2)


EVERY_BLOCK = {"token": 1, "attention": 1, "downsample": 1, "dropout": 0.5}


@pytest.mark.parametrize(
    "shape, levels, options",
    [
        (RGB, 256, {}),
        (GREY, 17, {}),
        (GREY, 2, {}),
        (GREY, 3, {}),
        ((1, 6, 4), 250, {}),
        ((3, 5, 3), 256, {}),
        ((1, 1, 1), 5, {}),
        ((1, 6, 5), 17, EVERY_BLOCK),
    ],
)
def test_the_codelength_is_the_likelihood(shape, levels, options):
    flow = causal_flow(shape, levels, **options)
    x = torch.cat([images(40, shape, levels), torch.zeros(1, *shape, dtype=torch.uint8)])
    x[-1] = levels - 1
    coder, stack = coder_of(flow), empty()
    assert isinstance(coder, DirectCodec)
    coder.encode(x, stack)
    # The coder's own precision costs 0.001 bits for each of two choices, and 24 at the beginning.
    assert stack.bits == pytest.approx(bits(flow, x), abs=0.005 * x.numel() + 24)
    stack = Stack(stack.words(), again=True)
    assert torch.equal(coder.decode(len(x), stack), x)
    assert len(stack.first_words()) == 0


def test_a_stream_begins_with_nothing():
    flow = causal_flow(RGB)
    coder, x = coder_of(flow), smooth(150, RGB)
    ticks: list[int] = []
    stream = encode_stream(coder, x, list(range(150)), 0, ticks.append)
    assert (stream.initial_bits, stream.carriers) == (0, 0)
    assert stream.chunks == [128, 22] and sum(ticks) == 150
    assert 32 * len(stream.words) == pytest.approx(bits(flow, x), rel=1e-3, abs=64)
    back = decode_stream(coder, stream.words, stream.description(), lambda count: None)
    assert torch.equal(back, x)


def test_one_image_takes_few_bytes_more_than_its_likelihood():
    flow, x = causal_flow(RGB), smooth(1, RGB)
    stream = encode_stream(coder_of(flow), x, [0], 0, lambda count: None)
    assert 32 * len(stream.words) < bits(flow, x) + 24 + 32


@pytest.mark.parametrize("options", [{}, EVERY_BLOCK])
@pytest.mark.run  # takes long
def test_the_probe_sees_every_weight(options):
    flow = causal_flow(RGB, **options)
    known = probe(coder_of(flow))
    assert probe(coder_of(flow)) == known
    for parameter in flow.parameters():
        before = parameter.clone()
        parameter += 1e-3
        assert probe(coder_of(flow)) != known
        parameter.copy_(before)
    assert probe(coder_of(flow)) == known


def test_weights_that_are_not_finite_are_named():
    flow = causal_flow(RGB)
    next(flow.bijection.parameters()).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        coder_of(flow).encode(smooth(1, RGB), empty())


@pytest.fixture
def model():
    file = Checkpoint(Path("causal.safetensors"), {"config": a_config("causal").resolved()}, {})
    flow = causal_flow((3, 4, 4), scale=0.01, x=faint(64))
    return LoadedModel(flow, a_config("causal"), "raw", file)


def faint(count: int) -> torch.Tensor:
    """Images that take far fewer than eight bits for each entry."""
    return smooth(count, (3, 4, 4)) // 8 + 112


def archive(model: LoadedModel, x: torch.Tensor) -> bytes:
    return compress.choose(compress.prepare(model, x), "test").data


@pytest.mark.run  # takes long
def test_threads_change_no_byte_of_an_archive(model, tmp_path):
    x, path = faint(150), tmp_path / "a"
    torch.set_num_threads(1)
    data = archive(model, x)
    torch.set_num_threads(2)
    assert archive(model, x) == data
    path.write_bytes(data)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        opened = Opened(path)
        assert [s.chunks for s in opened.streams] == [[75], [75]] and not any(
            s.carriers for s in opened.streams
        )
        assert torch.equal(opened.images(model), x)


def test_an_archive_is_little_larger_than_its_streams(model, tmp_path):
    x, path = faint(150), tmp_path / "a"
    path.write_bytes(archive(model, x))
    found = Opened(path)
    assert found.description.checked == 128
    assert len(found.parts[0]) == 2 * 4 + IDENTITY.size
    assert path.stat().st_size - sum(map(len, found.parts)) < 180
    damaged = x.clone()
    damaged[149, 0, 0, 0] += 1
    found._decode = lambda images, model, progress: images.copy_(damaged)
    with pytest.raises(UserError, match="22 of 150 images do not match their checksums"):
        found.images(model)


@pytest.mark.parametrize("torch_version, most", [("2.13.0+cpu", 45), ("2.15.0+cu132", 60)])
def test_an_image_alone_takes_little_more_than_its_stream(
    torch_version, most, model, tmp_path, monkeypatch
):
    """Its likelihood and 64 bytes, with a short path of the model, and with versions of which the
    archive's dictionary knows the words. Others take some bytes more.
    """
    versions = {"flowtrain": "0.1.0", "torch": torch_version, "python": "3.11.7"}
    monkeypatch.setattr(compress, "versions", lambda: {**versions, "constriction": "0.5.0"})
    path = tmp_path / "a"
    path.write_bytes(archive(model, faint(1)))
    found = Opened(path)
    assert found.description.model is not None
    named = len(found.description.model.path)
    assert path.stat().st_size - len(found.parts[-1]) <= most + named


def test_other_numbers_are_refused(model, tmp_path, monkeypatch):
    path, x = tmp_path / "a", faint(3)
    path.write_bytes(archive(model, x))
    in_order = type(model.flow.bijection).in_order

    def other(self, next_level, batch, context=None):
        """As on a machine where two entries of the first image come out a little different."""

        def changed(entry, index):
            if index in (3, 30):
                entry.shift += 1e-4 * torch.rand(batch)  # never the same
            return next_level(entry, index)

        return in_order(self, changed, batch, context)

    monkeypatch.setattr(type(model.flow.bijection), "in_order", other)
    with pytest.raises(UserError, match="this machine does not reproduce the numbers"):
        Opened(path).images(model)
    monkeypatch.setattr(DirectCodec, "decode", lambda self, n, stack: torch.zeros_like(x))
    with pytest.raises(UserError, match="numerics do not reproduce on this machine"):
        archive(model, x)


OTHER_NUMBERS = """
import torch
from flowtrain.bijections.ordinal import OrdinalAutoregressive

in_order = OrdinalAutoregressive.in_order

def other(self, next_level, batch, context=None):
    def changed(entry, index):
        entry.shift += 1e-3 * torch.rand(batch)  # never the same
        return next_level(entry, index)
    return in_order(self, changed, batch, context)

OrdinalAutoregressive.in_order = other
"""


def test_compress_writes_nothing_where_numbers_are_never_the_same(tmp_path):
    train = sets(train__num_steps=20, train__validate_every=20, model__attention=1)
    quick("train", *CAUSAL, *train, "--run-dir", "run", cwd=tmp_path).ok()
    command = ["compress", "run", "--split", "test", "--num-images", 6, "--out", "test.fta"]
    quick(*command, cwd=tmp_path, first=OTHER_NUMBERS).failed(2, "numerics do not reproduce")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    quick(*command, cwd=tmp_path).ok()
    assert (tmp_path / "test.fta").exists()


def test_classes_are_refused_by_name():
    flow = causal_flow(RGB)
    flow.class_prior = ClassPrior(3, RGB)
    with pytest.raises(UserError, match="model.classes is 3"):
        coder_of(flow)
