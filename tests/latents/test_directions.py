"""Directions of attributes: what they point to, what their accuracy counts, and their files."""

import dataclasses
import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded

from flowtrain.checkpoints.load import load_model, model_hash
from flowtrain.errors import UserError
from flowtrain.latents import directions
from flowtrain.latents.directions import measured, of_attributes

D = 12
every_method = pytest.mark.parametrize("method", directions.METHODS)


def two_kinds(count=4000, gap=2.0, seed=0):
    """Latents of which the first entry is `gap` larger with the attribute, `(count, D)` each."""
    z = torch.randn(2 * count, D, generator=seeded(seed))
    z[:count, 0] += gap
    return z[:count], z[count:]


@pytest.fixture(scope="module")
def model():
    return load_model("glow_digits", torch.device("cpu"))


@every_method
def test_a_direction_points_to_the_images_that_have_it(method):
    """Two Gaussians are 2 standard deviations apart: Phi(1) of each are on the right side."""
    found = measured("a", *two_kinds(), method)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert found.vector[0] > 0.97
    assert found.low == pytest.approx(0, abs=0.1) and found.high == pytest.approx(2, abs=0.1)
    assert found.target(-1) == pytest.approx(found.low, abs=1e-6)
    assert found.target(1) == pytest.approx(found.high, abs=1e-6)
    expected = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert found.held_out == 2000
    assert found.error == pytest.approx(math.sqrt(expected * (1 - expected) / 2000), rel=0.05)
    assert abs(found.accuracy - expected) < 3 * found.error
    # Noise cannot be learned by heart: D + 1 entries and 10 images separate any two kinds.
    noise = torch.randn(2, 10, 40, generator=seeded(1)).unbind()
    assert measured("a", *noise, method).accuracy < 0.9
    chance = measured("a", *two_kinds(gap=0.0), method)
    assert abs(chance.accuracy - 0.5) < 4 * chance.error


def test_kinds_of_other_sizes_have_the_same_weight():
    """All of a small kind are missed where the threshold is that of the large one."""
    positive, negative = two_kinds()
    found = measured("a", positive[:100], negative, "logistic")
    assert found.accuracy > 0.7 and found.held_out == 1025
    own, held = directions.divided(100, 3)
    assert len(held) == 25 and sorted([*own.tolist(), *held.tolist()]) == list(range(100))
    assert torch.equal(held, directions.divided(100, 3)[1])
    assert not torch.equal(held, directions.divided(100, 4)[1])


@every_method
def test_orthogonal_directions_leave_the_others_alone(method):
    """Two attributes that often come together have directions that are alike."""
    generator = seeded(0)
    z = torch.randn(2000, D, generator=generator)
    a = torch.rand(2000, generator=generator) < 0.5
    b = torch.where(torch.rand(2000, generator=generator) < 0.9, a, ~a)
    z[:, :2] += 2 * torch.stack([a, b], dim=1)
    labels = {"a": a, "b": b, "c": z[:, 1] + z[:, 2] > 1}
    plain = of_attributes(z, labels, method)
    apart = of_attributes(z, labels, method, orthogonal=True)
    assert not plain[0].orthogonal and apart[0].orthogonal
    for one, other in itertools.product(apart, plain):
        assert one.name == other.name or abs(float(one.vector @ other.vector)) < 1e-6
    if method == "difference":
        assert plain[0].vector @ plain[1].vector > 0.5
    known = plain[1]
    (again,) = of_attributes(z, {"a": a}, method, [known], orthogonal=True)
    assert abs(float(again.vector @ known.vector)) < 1e-6
    # One of its own name is replaced, not avoided.
    (same,) = of_attributes(z, {"b": b}, method, [known], orthogonal=True)
    torch.testing.assert_close(same.vector, known.vector)


SAME = torch.ones(20, D)


@pytest.mark.parametrize(
    "positive, negative, others, said",
    [
        (3, 20, [], "a: there are 3 images with it, and at least 4"),
        (20, 0, [], "a: there are 0 images without it"),
        (SAME, SAME, [], "nothing is left .* the images are the same"),
        (20, 20, ["own"], "a mixture of the others"),
    ],
)
def test_directions_that_are_none_are_refused(positive, negative, others, said):
    if isinstance(positive, int):
        one, other = two_kinds(20)
        own = measured("a", one, other, "difference").vector
        positive, negative, others = one[:positive], other[:negative], [own for _ in others]
    with pytest.raises(UserError, match=said):
        measured("a", positive, negative, "difference", others)


def test_names_that_cannot_be_printed_are_refused():
    for name in ("", "-4", "a\nb", "n" * 61, "a\0", " a"):
        with pytest.raises(UserError, match="cannot be the name of an attribute"):
            directions.check_name(name)


def some(model):
    generator = seeded(0)
    pairs = [torch.randn(2, 30, model.flow.latent_dims, generator=generator) for _ in range(2)]
    return [
        measured(name, positive + 0.5, negative, "logistic")
        for name, (positive, negative) in zip(("a", "4-to-9"), pairs, strict=True)
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": np.array("0123456789abcdef")}, "attributes of the model 0123456789abcdef; "),
        ({"vector": np.zeros((2, 64), np.float32)}, "a: its numbers are not a direction"),
        ({"vector": np.zeros((2, 63), np.float32)}, r"vector has the shape \(2, 63\)"),
        ({"low": np.array([np.nan, 0])}, "a: its numbers are not a direction"),
        ({"low": np.array([9.0, 9.0])}, "a: it is not the description of a direction"),
        ({"method": np.array(["guess", "guess"])}, "a: it is not the description"),
        ({"name": np.array(["a", "a"])}, "a: it is not the description"),
        ({"name": np.array(["a", ""])}, "attributes.npz: '' cannot be the name of an attribute"),
        ({"orthogonal": np.array([1, 0])}, "orthogonal has the type int64, expected yes or no"),
    ],
)
def test_files_from_strangers_are_read_with_care(model, tmp_path, change, said):
    path = tmp_path / "attributes.npz"
    directions.save(path, some(model), model_hash(model))
    with np.load(path) as good:
        arrays = {**good, **change}
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=said):
        directions.load(path, model)


def test_attributes_of_other_weights_are_kept_under_another_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, (one, other) = directions.file_of(model), some(model)
    directions.save(path, [one], "0123456789")
    with pytest.raises(UserError, match="attributes of the model 0123456789"):
        directions.named(model, "a")
    assert list(directions.add(model, [other])) == list(directions.existing(model)) == ["4-to-9"]
    assert {each.name for each in path.parent.iterdir()} == {path.name, "attributes-01234567.npz"}
    directions.save(path, [other], "0123456789")  # found since, and nothing is lost
    directions.add(model, [other])
    for number, name in (("", "a"), ("-2", "4-to-9")):
        assert np.load(path.with_stem(f"attributes-01234567{number}"))["name"].tolist() == [name]
    one = dataclasses.replace(other, accuracy=0.25)
    assert directions.add(model, [one])["4-to-9"].accuracy == 0.25  # the newer one of a name
    (tmp_path / "own.py").write_text("")
    code = dataclasses.replace(model.checkpoint, path=Path("own.py:flow"))  # has no file itself
    assert "4-to-9" in directions.add(dataclasses.replace(model, checkpoint=code), [one])


def test_an_attribute_that_is_not_there(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert directions.existing(model) == {}
    with pytest.raises(UserError, match="smile: no such attribute.*there are: none"):
        directions.named(model, "smile")
    existing = directions.existing

    def slow(model):
        known = existing(model)
        time.sleep(0.1)  # the other thread could read, too
        return known

    monkeypatch.setattr(directions, "existing", slow)
    with ThreadPoolExecutor() as threads:  # each keeps those of the others
        list(threads.map(lambda each: directions.add(model, [each]), some(model)))
    assert str(directions.file_of(model)) == "runs/zoo/glow_digits/attributes.npz"
    for saved in some(model):
        found = directions.named(model, saved.name)
        assert torch.equal(saved.vector, found.vector)
        own, its = ({**dataclasses.asdict(d), "vector": None} for d in (saved, found))
        assert own == its
    with pytest.raises(UserError, match=r"4-to-8: .*\(there are: 4-to-9, a\); did you mean 4-to-9"):
        directions.named(model, "4-to-8")
