"""The responses to the page, as numbers: places, ranks, neighbours, and limits of memory."""

import io
import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from explore_helpers import MEMORY, TAB, a_session, class_session
from PIL import Image

from flowtrain.data.splits import DataSet, Split
from flowtrain.errors import UserError
from flowtrain.evaluation.score import score
from flowtrain.latents import paths
from flowtrain.latents.files import read
from flowtrain.pictures import grid
from flowtrain.pictures.lossless import complexity
from flowtrain.pictures.sample import sample
from flowtrain.tools.explore import answers, requests
from flowtrain.tools.explore import session as module
from flowtrain.tools.explore.accounts import Accounts
from flowtrain.tools.explore.requests import Place, Refused
from flowtrain.tools.explore.session import KEPT, Session

pytestmark = pytest.mark.run

HOT = [1.0, 1.0]


def a_sample(seed=0, index=0, temperatures=HOT):
    return requests.Sample(kind="sample", seed=seed, index=index, temperatures=temperatures)


SAMPLE, OTHER = a_sample(index=3), a_sample(1, temperatures=[0.5, 0.5])
IMAGE = requests.Test(kind="test", index=7)


def check():
    pass


def ask(function, session, kind=requests.Show, **fields):
    """The response to a request; `place` may be the fields of a place."""
    if isinstance(fields.get("place"), dict):
        fields["place"] = Place(**fields["place"])
    return function(session, kind(tab=TAB, turn=0, **fields), check)


def samples(session, **fields):
    fields = {"seed": 0, "temperatures": HOT, "start": 0, **fields}
    return ask(answers.samples, session, requests.Samples, **fields)


def latent(session, source, **edits):
    return session.latent(Place(source=source, **edits), check)


@pytest.fixture(scope="module")
def session():
    session = a_session()
    session.read_data()
    while session.idle(check):
        pass
    return session


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    return class_session(tmp_path_factory.mktemp("classes"))


def test_an_image_of_the_data_is_itself(session):
    x = session.image(Place(source=IMAGE), check)
    assert torch.equal(x, session.data.test.take(slice(7, 8)))
    assert torch.equal(session.decode(latent(session, IMAGE), check), x)
    images = ask(answers.tests, session, requests.Tests, start=6, count=2)["images"]
    assert images[1] == answers.url(session, x[0])


def test_an_image_is_computed_once(session, monkeypatch):
    """Its facts and its neighbours follow it, and a sample of the grid is there already."""
    decode = Mock(wraps=session.flow.decode)
    monkeypatch.setattr(session.flow, "decode", decode)
    images = samples(session, seed=5, temperatures=[1.0, 0.5], start=2, count=3)["images"]
    last = a_sample(5, 4, [1.0, 0.5])
    for place in (Place(source=last), Place(source=last, other=OTHER, way=0.3)):
        shown = ask(answers.show, session, place=place)["image"]
        ask(answers.facts, session, place=place)
        for by in ("pixels", "latents"):
            near = ask(answers.neighbours, session, requests.Neighbours, place=place, by=by)
            assert len(near["images"]) == 8
        if place.other is None:
            assert shown == images[2]
    assert decode.call_count == 2  # the three samples together, and the place on the path


def test_few_images_and_latents_are_kept(session, monkeypatch):
    for seed in range(3):
        samples(session, seed=seed, count=40)
    assert len(session._images) == KEPT
    # Not views of all that were computed with them.
    assert all(each.untyped_storage().nbytes() <= 64 for each in session._images.values())
    monkeypatch.setattr(module, "KEPT", 3)
    for index in (0, 1, 2, 0, 3):
        session.latent_of(requests.Test(kind="test", index=index), check)
    assert [requests.Test.model_validate_json(key).index for key in session._latents] == [2, 0, 3]


def test_a_path_and_mixed_levels(session):
    a, b = latent(session, IMAGE), latent(session, OTHER)
    for way in (0.0, 0.3, 1.0):
        z = latent(session, IMAGE, other=OTHER, way=way)
        assert torch.equal(z, paths.slerp(a[0], b[0], torch.tensor([way])))
    z = latent(session, IMAGE, other=OTHER, from_other=[False, True])
    assert torch.equal(z[:, :32], a[:, :32]) and torch.equal(z[:, 32:], b[:, 32:])


@pytest.mark.parametrize("name", ["glow", "causal"])  # each class has a prior; networks see it
def test_two_classes_have_the_images_of_both(name, tmp_path):
    session = class_session(tmp_path, name)
    hot = [1.0] * len(session.levels)
    a, b = (a_sample(0, index, hot) for index in range(2))
    start, end, _ = samples(session, temperatures=hot, count=3)["images"]

    def image(**fields):
        return ask(answers.show, session, place={"source": a, "other": b, **fields})["image"]

    assert (image(), image(way=1.0)) == (start, end)
    assert image(from_other=[True] * len(hot)) == end
    place = {"source": a, "other": b}
    path = ask(answers.gif, session, requests.Animation, place=place, steps=3)
    frames = Image.open(io.BytesIO(path))
    for number, each in ((0, a), (2, b)):
        frames.seek(number)
        x = session.image(Place(source=each), check)
        expected = grid.grid(x, session.q, 1).movedim(0, -1).numpy().repeat(8, 0).repeat(8, 1)
        assert np.array_equal(np.asarray(frames.convert("RGB")), expected)
        assert frames.size == (256, 256)
    # `flowtrain decode` is told no class.
    (tmp_path / "z.npz").write_bytes(ask(answers.latent_file, session, place={"source": b}))
    z = read(tmp_path / "z.npz", session.model).z
    assert answers.url(session, session.flow.decode(z)[0]) == end


def test_decoding_and_encoding_check_often_whether_they_are_wanted(tmp_path):
    session, wanted = class_session(tmp_path, "causal"), Mock()
    source = a_sample(temperatures=[1.0])
    session.image(Place(source=source), wanted)
    assert wanted.call_count >= 16  # entries
    wanted.reset_mock()
    session.latent_of(source, wanted)  # of the image that is kept
    assert wanted.call_count >= 16


def test_a_direction_moves_its_level_alone(session):
    a = latent(session, SAMPLE)
    move = requests.Principal(level=1, component=2, amount=-1.5)
    z = latent(session, SAMPLE, principal=[move])
    found = session.data.components[1]
    assert torch.equal(z[:, :32], a[:, :32])
    expected = a[:, 32:] - 1.5 * found.deviations[2] * found.directions[2]
    torch.testing.assert_close(z[:, 32:], expected)
    assert torch.equal(latent(session, SAMPLE), a)  # not changed


def test_attributes_and_classes_move_the_latent(of_classes):
    one = a_sample(index=4)
    a = latent(of_classes, one)
    prior, direction = of_classes.flow.class_prior, of_classes.attributes["thick"]
    assert prior.by_class(a).argmax() == 1  # all classes in turn
    end = prior.carried(a, 1, 2, paths.KEPT)  # as `flowtrain interpolate` moves it
    for share in (0.0, 0.5, 1.0):
        z = latent(of_classes, one, to_class=requests.Class(label=2, amount=share))
        torch.testing.assert_close(z, a + share * (end - a))
    assert prior.by_class(z).argmax() == 2
    for amount in (0.0, 0.5):
        z = latent(of_classes, one, attributes=[requests.Attribute(name="thick", amount=amount)])
        step = amount * (direction.high - direction.low) / 2
        torch.testing.assert_close((z - a) @ direction.vector, torch.tensor([step]))
        torch.testing.assert_close(z.norm(), a.norm())  # as typical as it was


def test_samples_of_a_class_are_those_of_the_command(of_classes):
    fields = {"seed": 2, "temperatures": [0.8, 0.8], "start": 1, "count": 2}
    answer = samples(of_classes, label=1, **fields)
    expected = sample(of_classes.flow, 3, [0.8], 2, classes=[1])[1:]
    assert answer["images"] == [answers.url(of_classes, x) for x in expected]
    expected = "flowtrain sample tiny --num-images 3 --temperature 0.8 --seed 2 --classes 1"
    assert answer["command"] == expected
    with pytest.raises(Refused, match="3 classes"):
        samples(of_classes, label=3, **fields)


def test_several_temperatures_have_no_command(session):
    assert samples(session, temperatures=[0.0, 1.0], count=4)["command"] is None
    z, _ = session.drawn(a_sample(temperatures=[0.0, 1.0]), 0, 4)
    assert not z[:, :32].any() and z[:, 32:].all()


def test_ranks_are_those_of_an_evaluation(session):
    data = session.data
    x = data.test.take(slice(None)).numpy()
    losses = session.flow.loss(score(session.flow, Split(x, np.arange(len(x)))).log_prob).numpy()
    np.testing.assert_allclose(data.losses, losses, rtol=1e-4)
    facts = ask(answers.facts, session, place={"source": IMAGE})
    assert facts["loss"] == pytest.approx(losses[7], rel=1e-4)
    likelihood, typicality, corrected = facts["scores"]
    expected = (np.sum(losses < losses[7]) + 0.5) / len(losses)
    assert likelihood["below"] == pytest.approx(expected, abs=0.01) and likelihood["of"] == 180
    validation = DataSet(session.model.config.data).split("validation")
    entropy = session.flow.loss(score(session.flow, validation).log_prob).mean().item()
    assert typicality["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert typicality["value"] == pytest.approx(abs(losses[7] - entropy), abs=1e-3)
    expected = np.mean(abs(losses - entropy) < abs(losses[7] - entropy))
    assert typicality["below"] == pytest.approx(expected, abs=0.01)
    own = losses - complexity(x)
    assert corrected["value"] == pytest.approx(own[7], abs=1e-3)
    assert corrected["below"] == pytest.approx(np.mean(own < own[7]), abs=0.01)


def test_a_reference_without_a_finite_likelihood_is_no_entropy(session, monkeypatch):
    monkeypatch.setattr(session.data, "reference", np.array([3.0, math.inf]))
    facts = ask(answers.facts, session, place={"source": IMAGE})
    assert [each["name"] for each in facts["scores"]] == ["likelihood", "complexity_corrected"]
    json.dumps(facts, allow_nan=False)  # as the server writes it


def test_neighbours_of_a_training_image_begin_with_it(session):
    position = int(session.data.positions[11])  # of a sample, not of the first images
    assert session.data.positions[-1] > len(session.data.latents) > 11
    x = session.data.train.take(slice(position, position + 1))
    file = grid.png(grid.to_8bit(x, 17)[0].expand(3, -1, -1))
    source = {"kind": "upload", "id": answers.upload(session, file)["id"]}
    for by in ("pixels", "latents"):
        place = {"source": source}
        answer = ask(answers.neighbours, session, requests.Neighbours, place=place, by=by)
        assert answer["indices"][0] == position and len(answer["images"]) == 8
        # Latents at hand were computed without the steps of the inverse.
        assert answer["distances"][0] == pytest.approx(0, abs=1e-3 if by == "latents" else 0)
        assert answer["distances"] == sorted(answer["distances"])
        known = session.data.train if by == "pixels" else session.data.latents
        assert answer["compared"] == len(known)


def test_without_data_there_are_no_directions_and_ranks(of_classes):
    long = UserError(f"data.root: {'long ' * 100}/the/place")
    of_classes._read_data, read = Mock(side_effect=long), of_classes._read_data
    of_classes.read_data()
    assert answers.describe(of_classes)["data"].endswith("/the/place")
    of_classes._read_data = read
    of_classes.read_data()
    assert "no.npz" in answers.describe(of_classes)["data"]
    assert of_classes.idle(check) is False
    place = {"source": a_sample()}
    assert ask(answers.facts, of_classes, place=place)["scores"] == []
    with pytest.raises(Refused, match="no.npz"):
        ask(answers.tests, of_classes, requests.Tests, start=0, count=1)
    move = requests.Principal(level=0, component=0, amount=1.0)
    with pytest.raises(Refused, match="no test or training images"):
        latent(of_classes, OTHER, principal=[move])


def test_the_ends_of_directions(session, monkeypatch):
    decode = Mock(side_effect=lambda z, check: torch.zeros(len(z), 1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(session, "decode", decode)
    for level, each in enumerate(session.data.components):
        answer = ask(answers.ends, session, requests.Ends, place={"source": SAMPLE}, level=level)
        decoded, count = decode.call_args.args[0], len(each.deviations)
        assert len(answer["images"]) == len(decoded) == 2 * count
        for number, amount in ((0, -3.0), (count, 3.0), (2 * count - 1, 3.0)):
            move = requests.Principal(level=level, component=number % count, amount=amount)
            expected = latent(session, SAMPLE, principal=[move])[0]
            torch.testing.assert_close(decoded[number], expected)
    with pytest.raises(Refused, match="level: 2 has no"):
        ask(answers.ends, session, requests.Ends, place={"source": SAMPLE}, level=2)


def test_stale_attributes_are_named_and_left_out(tmp_path, capsys):
    model = class_session(tmp_path).model
    next(model.flow.parameters()).add_(1)
    assert answers.describe(Session(model, "tiny", lambda: None, MEMORY))["attributes"] == []
    assert "attributes.npz" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("later", [False, True])
def test_data_that_fail_unexpectedly_are_not_waited_for(later, monkeypatch, caplog):
    session, fails = a_session(), Mock(side_effect=ZeroDivisionError("secret"))
    if later:
        session.read_data()
        monkeypatch.setattr(session.data, "step", fails)
    else:
        session._read_data = fails
        session.read_data()
    assert not session.idle(check)
    assert "flowtrain failed (ZeroDivisionError)" in answers.describe(session)["data"]
    assert "secret" in caplog.text


def test_the_memory_bounds_the_images():
    few, many = a_session(2**20), a_session(2**22)
    assert 1 <= few.largest_count < many.largest_count
    assert few.at_a_time < many.at_a_time
    assert few.largest_file == 2**18
    with pytest.raises(UserError, match="--max-memory: one image of this model takes"):
        a_session(memory=2**13)


def test_images_are_decoded_in_batches_that_fit(session, monkeypatch):
    decode = Mock(wraps=session.flow.decode)
    monkeypatch.setattr(session, "at_a_time", 3)
    monkeypatch.setattr(session.flow, "decode", decode)
    assert len(samples(session, count=8)["images"]) == 8
    assert [len(call.args[0]) for call in decode.call_args_list] == [3, 3, 2]


def test_a_place_that_is_not_finite_is_refused(session, monkeypatch):
    monkeypatch.setattr(session.flow, "decode", Mock(side_effect=FloatingPointError))
    with pytest.raises(Refused, match="this latent is too far out"):
        ask(answers.show, session, place={"source": a_sample(1234)})
    monkeypatch.setattr(answers, "account", lambda *args: Accounts(math.inf, {}))
    with pytest.raises(Refused, match="the likelihood of this image is not finite"):
        ask(answers.facts, session, place={"source": IMAGE})
