"""The results of requests: images and figures for the page, files, and equivalent commands."""

import base64
import io
import math
import shlex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowtrain.flow.class_prior import ClassPrior
from flowtrain.latents.files import Latents, npz
from flowtrain.latents.nearest import CHUNK, nearest_images
from flowtrain.latents.paths import slerp
from flowtrain.pictures import grid
from flowtrain.system.random import Stream, uniform
from flowtrain.tools.explore import requests
from flowtrain.tools.explore.accounts import account
from flowtrain.tools.explore.background import Background, code_lengths
from flowtrain.tools.explore.requests import Refused
from flowtrain.tools.explore.session import Session
from flowtrain.tools.explore.worker import Check
from flowtrain.tools.ood.auroc import share_below
from flowtrain.tools.ood.scores import complexity_corrected, typicality

Answer = dict[str, Any]  # becomes JSON

NEAREST = 8  # training images
FAR = 3.0  # standard deviations of a hint at what a direction does
BYTES_OF_COMPARED = 32  # of a pixel of a training image, in float64 and twice in between


def upload(session: Session, data: bytes) -> Answer:
    name, x, words = session.upload(data)
    return {"id": name, "image": url(session, x), "said": words}


def describe(session: Session) -> Answer:
    flow, data = session.flow, session.data
    known = data if isinstance(data, Background) else None
    return {
        "model": session.word,
        "shape": list(flow.shape),
        "levels": [{"words": level.words, "entries": level.entries} for level in session.levels],
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
        "waits": session.waits,
        "test": 0 if known is None else len(known.test),
        "train": 0 if known is None else len(known.train),
        "progress": 0.0 if known is None else known.progress,
        "principal": [] if known is None else [len(each.deviations) for each in known.components],
        "attributes": [
            {"name": each.name, "accuracy": each.accuracy} for each in session.attributes.values()
        ],
    }


def samples(session: Session, request: requests.Samples, check: Check) -> Answer:
    z, labels = session.drawn(request, request.start, request.count)
    x = session.decode(z, check, labels)
    drawn = request.model_dump(include=set(requests.Drawn.model_fields))
    for index, image in enumerate(x, request.start):
        source = requests.Sample(kind="sample", index=index, **drawn)
        session.keep_image(requests.Place(source=source), image[None].clone())
    return {
        "images": [url(session, each) for each in x],
        "command": sampling(session, request, request.start + request.count),
    }


def tests(session: Session, request: requests.Tests, check: Check) -> Answer:
    session.require_count(request.count)
    test = session.background().test
    x = test.take(slice(request.start, request.start + request.count))
    return {"images": [url(session, each) for each in x]}


def show(session: Session, request: requests.Show, check: Check) -> Answer:
    return {
        "image": url(session, session.image(request.place, check)[0]),
        "command": command(session, "decode", "latent.npz", "--out", "images"),
    }


def facts(session: Session, request: requests.Show, check: Check) -> Answer:
    """The likelihood of an image with its maps, and its scores."""
    x = session.image(request.place, check)
    source = request.place.source
    first = source.index if isinstance(source, requests.Test) else 0
    x = x.to(session.flow.device)
    noise = uniform(x.shape, 0, Stream.EVALUATION, first, 0, x.device)
    found = account(session.flow, x, noise, check)
    if not math.isfinite(found.total):
        raise Refused("the likelihood of this image is not finite")

    def described(values: Tensor) -> Answer:
        numbers = values.numpy().astype("<f4").tobytes()  # row by row
        packed = base64.b64encode(numbers).decode()
        return {"size": list(values.shape), "values": packed, "loss": values.mean().item()}

    return {
        "loss": found.total,
        "map": described(found.map) if found.places else None,
        "levels": [
            {"name": f"{size[0]} x {size[1]}", **described(each)}
            for size, each in found.places.items()
        ],
        "noise": found.noise,
        "class": found.of_class and found.of_class._asdict(),
        "scores": scores(session, found.total, x.cpu()),
    }


def scores(session: Session, loss: float, x: Tensor) -> list[Answer]:
    """The scores of an image, and the share of test images that have smaller ones."""
    if isinstance(session.data, str):
        return []
    known, entropy = session.data, session.data.entropy
    # The image, then the test images.
    losses = np.array([loss, *known.losses])
    lengths = np.array([*code_lengths(session.flow, x.numpy()), *known.complexities])
    rows = {"likelihood": losses}
    if entropy is not None:
        rows["typicality"] = typicality(losses, entropy)
    rows["complexity_corrected"] = complexity_corrected(losses, lengths)
    return [
        {
            "name": name,
            "value": float(values[0]),
            "below": float(share_below(values[1:], values[:1])[0]) if len(values) > 1 else None,
            "of": len(values) - 1,
            "entropy": entropy,
        }
        for name, values in rows.items()
    ]


def neighbours(session: Session, request: requests.Neighbours, check: Check) -> Answer:
    """The nearest training images, of all by their pixels, or of those encoded by latents."""
    known = session.background()
    x = session.image(request.place, check)
    if request.by == "pixels":
        chunk = min(CHUNK, session.memory // BYTES_OF_COMPARED)
        distances, where = nearest_images(x, known.train, session.q, NEAREST, check, chunk)
        distances, indices = distances[0], where[0].numpy()
        found, compared = known.train.take(indices), len(known.train)
    else:
        compared = len(known.latents)
        if not compared:
            raise Refused("no training image is encoded yet")
        z = session.latent(request.place, check)
        every = (known.latents - z.cpu()).square().mean(dim=1).sqrt()
        distances, nearest = every.topk(min(NEAREST, compared), largest=False)
        found, indices = known.images[nearest], known.positions[nearest.numpy()]
    return {
        "images": [url(session, each) for each in found],
        "distances": distances.tolist(),
        "indices": indices.tolist(),
        "compared": compared,
    }


def ends(session: Session, request: requests.Ends, check: Check) -> Answer:
    """The image at a place, moved back along each principal direction of a level, then forth."""
    found = session.background().components
    if request.level >= len(found):
        raise Refused(f"level: {request.level} has no principal directions (yet)")
    each, where = found[request.level], session.levels[request.level].where
    steps = FAR * each.deviations[:, None] * each.directions
    session.require_count(2 * len(steps))
    z = session.latent(request.place, check).repeat(2 * len(steps), 1)
    z[:, where] += torch.cat([-steps, steps]).to(z)
    return {"images": [url(session, x) for x in session.decode(z, check)]}


def png(session: Session, request: requests.Show, check: Check) -> bytes:
    x = session.image(request.place, check)
    return grid.png(grid.grid(x, session.q, 1))


def latent_file(session: Session, request: requests.Show, check: Check) -> bytes:
    """The latent of a place, as `flowtrain decode` reads it."""
    z = session.latent(request.place, check)
    return npz(Latents(z.cpu().float(), ["image"]), session.model)


def gif(session: Session, request: requests.Animation, check: Check) -> bytes:
    """The path from a source to another, there and back."""
    place, steps = request.place, request.steps
    if place.other is None:
        raise Refused("a path needs a second image")
    session.require_count(8 * steps)  # frames are enlarged
    a, b = (session.latent_of(each, check)[0] for each in (place.source, place.other))
    x = session.decode(slerp(a, b, torch.linspace(0, 1, steps).to(a)), check)
    frames = [grid.grid(each[None], session.q, 1) for each in x]
    return grid.animation([*frames, *frames[-2:0:-1]])


def sampling(session: Session, drawn: requests.Drawn, count: int) -> str | None:
    """The command that draws the same samples. There is none for several temperatures."""
    if len(set(drawn.temperatures)) > 1:
        return None
    words = ["--num-images", str(count)]
    words += ["--temperature", f"{drawn.temperatures[0]:g}", "--seed", str(drawn.seed)]
    if drawn.label is not None:
        words += ["--classes", str(drawn.label)]
    return command(session, "sample", *words)


def command(session: Session, name: str, *words: str) -> str:
    """A command on the model. `decode` makes the image of a latent that was saved."""
    return shlex.join(["flowtrain", name, session.word, *words, *session.options])


def url(session: Session, x: Tensor) -> str:
    """An image `(C, H, W)` as a PNG in a data URL."""
    buffer = io.BytesIO()
    grid.picture_of(grid.to_8bit(x, session.q).numpy()).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
