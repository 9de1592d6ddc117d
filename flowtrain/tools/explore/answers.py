"""What the page shows, and the files and commands that it offers: answers of a session."""

import base64
import io
import math
import shlex
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowtrain.flow.class_prior import ClassPrior
from flowtrain.latents.files import Latents, npz
from flowtrain.latents.nearest import CHUNK, nearest_images
from flowtrain.latents.paths import slerp
from flowtrain.pictures import grid
from flowtrain.pictures.lossless import picture_of
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.explore import asked
from flowtrain.tools.explore.accounts import account
from flowtrain.tools.explore.asked import Refused
from flowtrain.tools.explore.background import Background, coded
from flowtrain.tools.explore.session import Check, Session
from flowtrain.tools.ood.auroc import share_below
from flowtrain.tools.ood.scores import complexity_corrected, typicality

Answer = dict[str, Any]  # what becomes JSON

NEAREST = 8  # training images
BYTES_OF_COMPARED = 32  # of a pixel of a training image, in float64 and twice in between


def upload(session: Session, data: bytes) -> Answer:
    name, x, said = session.upload(data)
    return {"id": name, "image": url(session, x), "said": said}


def describe(session: Session) -> Answer:
    """What the page has to know of the model."""
    flow, data = session.flow, session.data
    known = data if isinstance(data, Background) else None
    return {
        "model": session.word,
        "shape": list(flow.shape),
        "levels": [
            {"words": level.words, "entries": level.where.stop - level.where.start}
            for level in session.levels
        ],
        "grey": session.q,
        "classes": flow.classes,
        "moves_classes": isinstance(flow.class_prior, ClassPrior),
        "sequential": flow.bijection.inverse_is_sequential,
        "exact": flow.exact,
        "bound": flow.kind.bound,
        "unit": flow.kind.unit,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "dataset": session.model.config.data.name,
        "largest_count": session.largest_count,
        "largest_file": session.largest_file,
        "data": data if isinstance(data, str) else None,
        "test": 0 if known is None else len(known.test),
        "train": 0 if known is None else len(known.train),
        "progress": 0.0 if known is None else known.progress,
        "principal": [] if known is None else [len(each.deviations) for each in known.components],
        "attributes": [
            {"name": each.name, "accuracy": each.accuracy} for each in session.attributes.values()
        ],
    }


def samples(session: Session, request: asked.Samples, check: Check) -> Answer:
    z, labels = session.drawn(request, request.start, request.count)
    x = session.decode(z, check, labels)
    for index, image in enumerate(x, request.start):
        source = asked.Sample(
            kind="sample",
            seed=request.seed,
            index=index,
            temperatures=request.temperatures,
            label=request.label,
        )
        session.keep_image(asked.Place(source=source), image[None].clone())
    return {
        "images": [url(session, each) for each in x],
        "command": sampling(session, request, request.start + request.count),
    }


def tests(session: Session, request: asked.Tests, check: Check) -> Answer:
    session.require_count(request.count)
    test = session.known().test
    x = test.take(slice(request.start, request.start + request.count))
    return {"images": [url(session, each) for each in x]}


def show(session: Session, request: asked.Show, check: Check) -> Answer:
    return {
        "image": url(session, session.image(request.place, check)[0]),
        "command": command(session, "decode", "latent.npz", "--out", "images"),
    }


def facts(session: Session, request: asked.Show, check: Check) -> Answer:
    """What the model says about an image."""
    x = session.image(request.place, check)
    source = request.place.source
    first = source.index if isinstance(source, asked.Test) else 0
    x = x.to(session.flow.device)
    noise = uniform(x.shape, 0, Stream.EVALUATION, first, 0, x.device)
    found = account(session.flow, x, noise, check)
    if not math.isfinite(found.total):
        raise Refused("the likelihood of this image is not finite")
    parts = [
        {
            "name": f"{size[0]} x {size[1]}",
            "loss": each.mean().item(),
            "size": list(size),
            "values": packed(each),
        }
        for size, each in found.places.items()
    ]
    whole = found.map if found.places else None
    of_class = found.of_class
    return {
        "loss": found.total,
        "map": None
        if whole is None
        else {"size": list(whole.shape), "values": packed(whole), "loss": whole.mean().item()},
        "levels": parts,
        "noise": found.noise,
        "class": None
        if of_class is None
        else {
            "label": of_class.label,
            "probability": of_class.probability,
            "loss": of_class.loss,
        },
        "scores": scores(session, found.total, x.cpu()),
    }


def scores(session: Session, loss: float, x: Tensor) -> list[Answer]:
    """The scores of an image, and the share of test images that have smaller ones."""
    if isinstance(session.data, str):
        return []
    known, entropy = session.data, session.data.entropy
    of_test = known.scores
    code = coded(session.flow, x.numpy())
    value, all_of_test = np.array([loss]), of_test.loss
    rows = [("likelihood", value, all_of_test)]
    if entropy is not None:
        rows.append(("typicality", typicality(value, entropy), typicality(all_of_test, entropy)))
    rows.append(
        (
            "complexity_corrected",
            complexity_corrected(value, code),
            complexity_corrected(all_of_test, of_test.complexity),
        )
    )
    return [
        {
            "name": name,
            "value": float(own[0]),
            "below": float(share_below(others, own)[0]) if len(others) else None,
            "of": len(others),
            "entropy": entropy,
        }
        for name, own, others in rows
    ]


def neighbours(session: Session, request: asked.Neighbours, check: Check) -> Answer:
    """The nearest training images, of all by their pixels, or of those encoded by latents."""
    known = session.known()
    x = session.image(request.place, check)
    if request.by == "pixels":
        distances, where = nearest_images(
            x,
            known.train,
            session.q,
            NEAREST,
            check,
            min(CHUNK, session.memory // BYTES_OF_COMPARED),
        )
        found = known.train.take(where[0].numpy())
        compared = len(known.train)
    else:
        compared = len(known.latents)
        if not compared:
            raise Refused("no training image is encoded yet")
        z = session.latent(request.place, check)
        every = (known.latents - z.cpu()).square().mean(dim=1).sqrt()
        distances, where = (
            each[None] for each in every.topk(min(NEAREST, compared), largest=False)
        )
        found = known.images[where[0]]
        where = torch.from_numpy(known.positions)[where]
    return {
        "images": [url(session, each) for each in found],
        "distances": distances[0].tolist(),
        "indices": where[0].tolist(),
        "compared": compared,
    }


def png(session: Session, request: asked.Show, check: Check) -> bytes:
    x = session.image(request.place, check)
    return grid.png(grid.grid(x, session.q, 1))


def latent_file(session: Session, request: asked.Show, check: Check) -> bytes:
    """The latent of a place, as `flowtrain decode` reads it."""
    z = session.latent(request.place, check)
    return npz(Latents(z.cpu().float(), ["image"]), session.model)


def gif(session: Session, request: asked.Animation, check: Check) -> bytes:
    """The path from a source to another, there and back."""
    place, steps = request.place, request.steps
    if place.other is None:
        raise Refused("a path needs a second image")
    session.require_count(8 * steps)  # frames are enlarged
    a, b = (session.latent_of(each, check)[0] for each in (place.source, place.other))
    x = session.decode(slerp(a, b, torch.linspace(0, 1, steps).to(a)), check)
    frames = [
        Image.fromarray(grid.grid(each[None], session.q, 1).movedim(0, -1).contiguous().numpy())
        for each in x
    ]
    return grid.gif(frames + frames[-2:0:-1])


def sampling(session: Session, request: asked.Samples | asked.Sample, count: int) -> str | None:
    """The command that draws the same samples. There is none for several temperatures."""
    if len(set(request.temperatures)) > 1:
        return None
    words = ["--num-images", str(count)]
    words += ["--temperature", f"{request.temperatures[0]:g}", "--seed", str(request.seed)]
    if request.label is not None:
        words += ["--classes", str(request.label)]
    return command(session, "sample", *words)


def command(session: Session, name: str, *words: str) -> str:
    """A command on the model. `decode` makes the image of a latent that was saved."""
    return shlex.join(["flowtrain", name, session.word, *words, *session.options])


def url(session: Session, x: Tensor) -> str:
    """An image `(C, H, W)` as a PNG in a data URL."""
    buffer = io.BytesIO()
    picture_of(grid.to_8bit(x, session.q).numpy()).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def packed(values: Tensor) -> str:
    """Numbers as little-endian float32 in base64, row by row."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
