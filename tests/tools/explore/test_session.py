"""What the page shows, as numbers: places, ranks, neighbours, and what memory allows."""

import io

import numpy as np
import pytest
import torch
from explore_helpers import MEMORY, TAB, a_session, class_session
from PIL import Image

from flowtrain.errors import UserError
from flowtrain.latents.files import read
from flowtrain.latents.paths import slerp
from flowtrain.pictures import grid
from flowtrain.tools.explore import answers, asked
from flowtrain.tools.explore.asked import Refused
from flowtrain.tools.explore.session import KEPT, Session

pytestmark = pytest.mark.run

SAMPLE = asked.Sample(kind="sample", seed=0, index=3, temperatures=[1.0, 1.0])
OTHER = asked.Sample(kind="sample", seed=1, index=0, temperatures=[0.5, 0.5])
IMAGE = asked.Test(kind="test", index=7)


def check():
    pass


def show(place):
    return asked.Show(tab=TAB, turn=0, place=place)


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


# --- places ---------------------------------------------------------------------------------------


def test_an_image_of_the_data_is_itself(session):
    x = session.image(asked.Place(source=IMAGE), check)
    assert torch.equal(x, session.data.test.take(slice(7, 8)))
    z = session.latent(asked.Place(source=IMAGE), check)
    assert torch.equal(session.decode(z, check), x)


def test_an_image_is_computed_once(session, monkeypatch):
    """Its facts and its neighbours follow it, and a sample of the grid is there already."""
    calls = []
    decode = session.flow.decode
    monkeypatch.setattr(session.flow, "decode", lambda *args: calls.append(1) or decode(*args))
    drawn = asked.Samples(tab=TAB, turn=0, seed=5, temperatures=[1.0, 0.5], start=2, count=3)
    images = answers.samples(session, drawn, check)["images"]
    last = asked.Sample(kind="sample", seed=5, index=4, temperatures=[1.0, 0.5])
    for place in (asked.Place(source=last), asked.Place(source=last, other=OTHER, way=0.3)):
        shown = answers.show(session, show(place), check)["image"]
        answers.facts(session, show(place), check)
        for by in ("pixels", "latents"):
            near = asked.Neighbours(tab=TAB, turn=0, place=place, by=by)
            assert len(answers.neighbours(session, near, check)["images"]) == 8
        if place.other is None:
            assert shown == images[2]
    assert len(calls) == 2  # the three samples together, and the place on the path


def test_images_that_are_kept_are_few(session):
    for seed in range(3):
        drawn = asked.Samples(tab=TAB, turn=0, seed=seed, temperatures=[1.0] * 2, start=0, count=40)
        answers.samples(session, drawn, check)
    assert len(session._images) == KEPT
    # Not views of all that were computed with them.
    assert all(each.untyped_storage().nbytes() <= 64 for each in session._images.values())


def test_a_path_has_both_ends(session):
    a, b = (session.latent(asked.Place(source=each), check) for each in (IMAGE, OTHER))
    for way in (0.0, 0.3, 1.0):
        place = asked.Place(source=IMAGE, other=OTHER, way=way)
        assert torch.equal(session.latent(place, check), slerp(a[0], b[0], torch.tensor([way])))


@pytest.mark.parametrize("name", ["glow", "causal"])  # each class has a prior; networks see it
def test_what_is_made_of_two_classes_has_the_images_of_both(name, tmp_path):
    session = class_session(tmp_path, name)
    hot = [1.0] * len(session.levels)
    drawn = asked.Samples(tab=TAB, turn=0, seed=0, temperatures=hot, start=0, count=3)
    a, b = (
        asked.Sample(kind="sample", seed=0, index=index, temperatures=hot) for index in range(2)
    )
    start, end, _ = answers.samples(session, drawn, check)["images"]

    def image(**fields):
        return answers.show(session, show(asked.Place(source=a, other=b, **fields)), check)["image"]

    assert (image(), image(way=1.0)) == (start, end)
    assert image(from_other=[True] * len(hot)) == end
    path = asked.Animation(tab=TAB, turn=0, place=asked.Place(source=a, other=b), steps=3)
    frames = Image.open(io.BytesIO(answers.gif(session, path, check)))
    for number, each in ((0, a), (2, b)):
        frames.seek(number)
        x = session.image(asked.Place(source=each), check)
        expected = grid.grid(x, session.q, 1).movedim(0, -1).numpy()
        assert np.array_equal(np.asarray(frames.convert("RGB")), expected)
    # `flowtrain decode` is told no class.
    (tmp_path / "z.npz").write_bytes(
        answers.latent_file(session, show(asked.Place(source=b)), check)
    )
    z = read(tmp_path / "z.npz", session.model).z
    assert answers.url(session, session.flow.decode(z)[0]) == end


def test_encoding_asks_often_whether_it_is_wanted(tmp_path):
    session = class_session(tmp_path, "causal")
    source = asked.Sample(kind="sample", seed=0, index=0, temperatures=[1.0])
    session.image(asked.Place(source=source), check)  # is kept
    calls = []
    session.latent_of(source, lambda: calls.append(1))
    assert len(calls) >= 16  # entries


def test_levels_come_from_one_or_the_other(session):
    a, b = (session.latent(asked.Place(source=each), check) for each in (SAMPLE, OTHER))
    place = asked.Place(source=SAMPLE, other=OTHER, from_other=[False, True])
    z = session.latent(place, check)
    assert torch.equal(z[:, :32], a[:, :32]) and torch.equal(z[:, 32:], b[:, 32:])


def test_a_direction_moves_its_level_alone(session):
    a = session.latent(asked.Place(source=SAMPLE), check)
    move = asked.Principal(level=1, component=2, amount=-1.5)
    z = session.latent(asked.Place(source=SAMPLE, principal=[move]), check)
    found = session.data.components[1]
    assert torch.equal(z[:, :32], a[:, :32])
    expected = a[:, 32:] - 1.5 * found.deviations[2] * found.directions[2]
    torch.testing.assert_close(z[:, 32:], expected)
    assert torch.equal(session.latent(asked.Place(source=SAMPLE), check), a)  # not changed


def test_attributes_and_classes_move_the_latent(of_classes):
    one = asked.Sample(kind="sample", seed=0, index=4, temperatures=[1.0, 1.0])
    a = of_classes.latent(asked.Place(source=one), check)
    prior, direction = of_classes.flow.class_prior, of_classes.attributes["thick"]
    assert prior.by_class(a).argmax() == 1  # all classes in turn
    to_class = asked.Class(label=2, amount=1.0)
    z = of_classes.latent(asked.Place(source=one, to_class=to_class), check)
    assert prior.by_class(z).argmax() == 2
    more = asked.Attribute(name="thick", amount=0.5)
    z = of_classes.latent(asked.Place(source=one, attributes=[more]), check)
    assert float(direction.strength(z) - direction.strength(a)) == pytest.approx(0.5, abs=1e-4)


def test_samples_of_a_class_are_those_of_the_command(of_classes):
    request = asked.Samples(
        tab=TAB, turn=0, seed=2, temperatures=[0.8, 0.8], label=1, start=1, count=2
    )
    from flowtrain.pictures.sample import sample

    answer = answers.samples(of_classes, request, check)
    expected = sample(of_classes.flow, 3, [0.8], 2, classes=[1])[1:]
    assert answer["images"] == [answers.url(of_classes, x) for x in expected]
    assert answer["command"].endswith("--num-images 3 --temperature 0.8 --seed 2 --classes 1")
    with pytest.raises(Refused, match="3 classes"):
        answers.samples(of_classes, request.model_copy(update={"label": 3}), check)


def test_commands_mean_the_same_weights(tmp_path):
    session = class_session(tmp_path, options=["--weights", "raw", "--trust-code"])
    assert answers.sampling(session, SAMPLE, 4) == (
        "flowtrain sample tiny --num-images 4 --temperature 1 --seed 0 --weights raw --trust-code"
    )
    assert answers.show(session, show(asked.Place(source=SAMPLE)), check)["command"] == (
        "flowtrain decode tiny latent.npz --out images --weights raw --trust-code"
    )


def test_several_temperatures_have_no_command(session):
    request = asked.Samples(
        tab=TAB, turn=0, seed=0, temperatures=[0.0, 1.0], label=None, start=0, count=4
    )
    assert answers.samples(session, request, check)["command"] is None
    z, _ = session.drawn(request, 0, 4)
    assert not z[:, :32].any() and z[:, 32:].all()


def test_a_latent_is_saved_as_it_is_read(session, tmp_path):
    place = asked.Place(source=IMAGE, other=OTHER, way=0.5)
    (tmp_path / "latent.npz").write_bytes(answers.latent_file(session, show(place), check))
    found = read(tmp_path / "latent.npz", session.model)
    assert torch.equal(found.z, session.latent(place, check)) and len(found.names) == 1


def test_latents_that_are_kept_are_bounded(session, monkeypatch):
    from flowtrain.tools.explore import session as module

    monkeypatch.setattr(module, "KEPT", 3)
    for index in range(6):
        session.latent_of(asked.Test(kind="test", index=index), check)
    assert len(session._latents) == 3


# --- what the model says --------------------------------------------------------------------------


def test_ranks_are_those_of_an_evaluation(session):
    from flowtrain.data.splits import Split
    from flowtrain.evaluation.score import score

    test = session.data.test
    scores = score(session.flow, Split(test.take(slice(None)).numpy(), np.arange(len(test)), 0))
    losses = session.flow.loss(scores.log_prob).numpy()
    np.testing.assert_allclose(session.data.scores.loss, losses, rtol=1e-4)
    facts = answers.facts(session, show(asked.Place(source=IMAGE)), check)
    assert facts["loss"] == pytest.approx(losses[7], rel=1e-4)
    likelihood, typicality, corrected = facts["scores"]
    expected = (np.sum(losses < losses[7]) + 0.5) / len(losses)
    assert likelihood["below"] == pytest.approx(expected, abs=0.01) and likelihood["of"] == 180
    entropy = session.data.reference.mean()
    assert typicality["value"] == pytest.approx(abs(losses[7] - entropy), abs=1e-3)
    assert corrected["value"] < likelihood["value"]


def test_neighbours_of_a_training_image_begin_with_it(session):
    position = int(session.data.positions[11])  # of a sample, not of the first images
    assert session.data.positions[-1] > len(session.data.latents) > 11
    x = session.data.train.take(slice(position, position + 1))
    uploaded = answers.upload(session, png_of(x))
    source = asked.Upload(kind="upload", id=uploaded["id"])
    for by in ("pixels", "latents"):
        request = asked.Neighbours(tab=TAB, turn=0, place=asked.Place(source=source), by=by)
        answer = answers.neighbours(session, request, check)
        assert answer["indices"][0] == position and len(answer["images"]) == 8
        # Latents at hand were computed without the steps of the inverse.
        assert answer["distances"][0] == pytest.approx(0, abs=1e-3 if by == "latents" else 0)
        assert answer["distances"] == sorted(answer["distances"])


def png_of(x):
    return grid.png(grid.to_8bit(x, 17)[0].expand(3, -1, -1))


def test_without_data_there_are_no_directions(of_classes):
    of_classes.read_data()
    assert (
        "no.npz"
        in answers.describe(
            of_classes,
        )["data"]
    )
    assert of_classes.idle(check) is False
    move = asked.Principal(level=0, component=0, amount=1.0)
    with pytest.raises(Refused, match="no test or training images"):
        of_classes.latent(asked.Place(source=OTHER, principal=[move]), check)


def test_stale_attributes_are_named_and_left_out(tmp_path, capsys):
    model = class_session(tmp_path).model
    next(model.flow.parameters()).add_(1)
    assert answers.describe(Session(model, "tiny", lambda: None, MEMORY))["attributes"] == []
    assert "attributes.npz" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("later", [False, True])
def test_data_that_fail_unexpectedly_are_not_waited_for(later, monkeypatch, caplog):
    def fails(*args):
        raise ZeroDivisionError("secret")

    session = a_session()
    if later:
        session.read_data()
        monkeypatch.setattr(session.data, "step", fails)
    else:
        monkeypatch.setattr(session, "_read_data", fails)
        session.read_data()
    assert not session.idle(check)
    assert "flowtrain failed (ZeroDivisionError)" in answers.describe(session)["data"]
    assert "secret" in caplog.text


# --- memory ---------------------------------------------------------------------------------------


def test_a_model_too_large_for_the_memory_is_refused():
    with pytest.raises(UserError, match="--max-memory: one image of this model takes"):
        a_session(memory=2**13)


def test_images_are_decoded_as_many_at_a_time_as_fit(session, monkeypatch):
    sizes = []
    decode = session.flow.decode

    def watched(z, *others):
        sizes.append(len(z))
        return decode(z, *others)

    monkeypatch.setattr(session, "at_a_time", 3)
    monkeypatch.setattr(session.flow, "decode", watched)
    request = asked.Samples(
        tab=TAB, turn=0, seed=0, temperatures=[1.0, 1.0], label=None, start=0, count=8
    )
    assert len(answers.samples(session, request, check)["images"]) == 8
    assert sizes == [3, 3, 2]


def test_a_place_that_is_not_finite_is_refused(session, monkeypatch):
    def fails(z, *others):
        raise FloatingPointError

    monkeypatch.setattr(session.flow, "decode", fails)
    new = SAMPLE.model_copy(update={"seed": 1234})
    with pytest.raises(Refused, match="not finite"):
        answers.show(session, show(asked.Place(source=new)), check)
