"""The dial: configurations chosen for data, a budget and a purpose."""

import numpy as np
import pytest
import yaml
from cli_helpers import quick
from helpers import CPU, npz
from PIL import Image

from flowtrain.cli.configs import find_config
from flowtrain.config import load_config
from flowtrain.errors import UserError
from flowtrain.training import dial
from flowtrain.training.dial_rules import FAMILIES

PERIODS = ("log_every", "validate_every", "checkpoint_every", "sample_every")


@pytest.fixture
def pace(monkeypatch):
    """Sets the seconds of a step."""

    def steps_take(seconds, precision="bf16"):
        def measured(config, data, device, divides):
            train = config.train
            time = seconds * (1 + (train.precision != precision))
            return dial.Step(train.precision, train.batch_size, train.accumulate, time)

        monkeypatch.setattr(dial, "_measured", measured)

    return steps_take


def choose(data, budget=1800.0, purpose="likelihood", settings=()):
    return dial.choose(str(data), budget, purpose, settings, CPU)


@pytest.mark.parametrize(
    ("name", "purpose", "shape"),
    [
        ("causal_cifar_small", "likelihood", (32, 32, 3)),
        ("glow_cifar_small", "latents", (32, 32, 3)),
        ("causal_mnist_small", "likelihood", (28, 28)),
        ("glow_mnist_small", "latents", (28, 28)),
    ],
)
def test_half_an_hour_has_the_configuration_tuned_by_hand(tmp_path, pace, name, purpose, shape):
    npz(tmp_path / "x.npz", 9200, shape=shape)
    pixels = dict(np.load(tmp_path / "x.npz"))
    if shape == (28, 28):  # MNIST is mostly black
        pixels["x_train"][:, 4:] = 0
        np.savez(tmp_path / "x.npz", **pixels)
    pace(0.5)
    found = choose(tmp_path / "x.npz", 1800.0, purpose)
    expected = load_config(find_config(name), ["train.budget=30min"])
    given = expected.model.options()
    if "steps" in given and isinstance(given["steps"], int):
        given["steps"] = [given["steps"]] * given["levels"]
    assert found.model.options() == given
    assert found.dequantization == expected.dequantization
    left_out = dict.fromkeys(PERIODS, 1)
    assert found.train.model_copy(update=left_out) == expected.train.model_copy(update=left_out)


def test_a_size_needs_its_steps(tmp_path, pace):
    data = tmp_path / "x.npz"
    npz(data, 17_000, shape=(8, 8, 3))
    widths = []
    for size in FAMILIES["likelihood"].sizes["colour"]:
        pace(0.1)
        for steps in (size.steps - 1, size.steps):
            if steps > 0:
                widths.append(choose(data, 0.1 * steps + 0.01).model.options()["width"])
    assert widths == [48, 96, 96, 160, 160, 192, 192, 224]
    npz(data, 800, shape=(32, 32, 3))  # for 1,000 steps, however long they take
    assert choose(data, 1e4).model.options()["width"] == 160


def test_a_run_ends_before_its_images_are_learned_by_heart(tmp_path, pace):
    pace(0.01)
    for shape, count, kept in (((32, 32, 3), 2000, 1800), ((8, 8, 3), 12000, 11000)):
        npz(tmp_path / "x.npz", count, shape=shape)
        assert choose(tmp_path / "x.npz", 3600).train.num_steps == 30 * kept // 32
        assert choose(tmp_path / "x.npz", 10).train.budget == 10
    two = choose(tmp_path / "x.npz", 3600, settings=["train.accumulate=2"]).train
    assert two.num_steps == 30 * 11000 // 64


def test_few_images_get_the_smallest_size_and_a_limited_number_of_passes(tmp_path, pace, capsys):
    data = tmp_path / "x.npz"
    npz(data, 20, shape=(8, 8, 3))
    pace(0.001)
    train = choose(data).train
    assert (train.num_steps, train.budget, train.batch_size) == (1000, None, 18)
    assert "1,000 steps, or 1,000 passes" in capsys.readouterr().out
    for given in ("train.budget=30min", "train.num_steps=9"):
        other = choose(data, settings=[given]).train
        assert "more would not help" not in capsys.readouterr().out
    assert (other.num_steps, other.validate_every, other.warmup_steps) == (9, 1, 0)
    assert (train.schedule, train.weight_decay) == ("constant", 1.0)
    assert train.sample_every > 1000
    assert choose(data, purpose="latents").train.sample_every < 1000
    pace(10)
    train = choose(data).train
    assert (train.budget, train.warmup_steps) == (1800, 9)  # of 90 steps


def test_a_batch_is_divided_unless_it_is_given(tmp_path, monkeypatch):
    npz(tmp_path / "x.npz", 20)
    asked, found = [], dial.Step("fp32", 8, 4, 0.25)
    monkeypatch.setattr(dial, "_measured", lambda *given: asked.append(given[3]) or found)
    train = choose(tmp_path / "x.npz").train
    assert (train.batch_size, train.accumulate) == (8, 4)
    found = None
    for setting, step in (
        ("train.batch_size=128", "the batch given"),
        ("train.accumulate=3", "the batch given"),
        ("train.lr=1", "one image"),
    ):
        with pytest.raises(UserError, match=f"a step of {step} does not fit"):
            choose(tmp_path / "x.npz", settings=[setting])
    assert asked == [True, False, False, True]


def test_the_measured_step_fits_into_the_memory(tmp_path, monkeypatch):
    npz(tmp_path / "x.npz", 20)
    words = ["data.name=npz", f"data.path={tmp_path / 'x.npz'}"]
    config = load_config(find_config("causal_digits"), words)
    data = dial.DataSet(config.data)
    flow = dial.build_flow(config, data.shape, data.num_bins)
    image = dial.activations_of_an_image(flow, config)
    monkeypatch.setattr(dial, "left", lambda device: dial.ROOM * 20 * image)
    step = dial._measured(config, data, CPU)
    assert (step.batch_size, step.accumulate) == (16, 4)
    assert step.seconds > 0
    whole = dial._measured(config, data, CPU, divides=False)
    assert (whole.batch_size, whole.accumulate) == (64, 1)
    monkeypatch.setattr(dial, "left", lambda device: 63 * image)
    assert dial._measured(config, data, CPU, divides=False) is None
    monkeypatch.setattr(dial, "left", lambda device: dial.ROOM * image - 1)
    assert dial._measured(config, data, CPU) is None


def test_a_size_that_one_process_alone_refuses_is_refused_by_all(tmp_path, monkeypatch):
    npz(tmp_path / "x.npz", 20)
    words = ["data.name=npz", f"data.path={tmp_path / 'x.npz'}"]
    config = load_config(find_config("causal_digits"), words)
    gathered = dial.distributed.all_gather_object

    def with_another(value):
        return [value, "no room"] if value == "" else gathered(value)

    monkeypatch.setattr(dial.distributed, "all_gather_object", with_another)
    with pytest.raises(UserError, match="no room"):
        dial._measured(config, dial.DataSet(config.data), CPU)


@pytest.mark.run
def test_images_too_small_for_a_larger_size_get_the_smaller_one(tmp_path, capsys):
    npz(tmp_path / "x.npz", 15000, shape=(3, 50))
    assert choose(tmp_path / "x.npz").model.options()["width"] == 48
    assert "width 64 is not possible: model.downsample: 2 needs" in capsys.readouterr().out


def test_the_faster_precision_is_chosen(tmp_path, pace):
    npz(tmp_path / "x.npz", 800, shape=(32, 32, 3))
    for precision in ("bf16", "fp32"):
        pace(0.25, precision=precision)
        assert choose(tmp_path / "x.npz").train.precision == precision


def photos(folder, sizes, mode):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), "u1")
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return folder


def test_a_folder_decides_size_and_colour(tmp_path, pace, capsys):
    pace(1)
    mixed = [(70, 40), (33, 90), (20, 50), (400, 300)]
    colour = choose(photos(tmp_path / "a", mixed, "RGB")).data
    assert (colour.size, colour.channels, colour.flip) == (32, 3, True)
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    small = choose(photos(tmp_path / "b", [(12, 9), (9, 30), (9, 9), (9, 9)], "L")).data
    assert (small.size, small.channels, small.flip) == (8, 1, None)
    assert "size: 8 pixels" in capsys.readouterr().out
    given = ("data.size=4", "data.flip=false")
    assert choose(tmp_path / "a", settings=given).data.options()["size"] == 4
    assert "pixels, as half" not in capsys.readouterr().out
    assert choose(tmp_path / "a", settings=given).data.flip is False
    tiny = choose(photos(tmp_path / "c", [(5, 5)] * 4, "RGB")).data
    assert tiny.size == 5


def test_black_and_white_images_have_one_bit(tmp_path, pace):
    pace(1)
    x = np.random.default_rng(0).integers(0, 2, (300, 8, 8), "u1") * np.uint8(255)
    np.savez(tmp_path / "x.npz", x_train=x)
    assert choose(tmp_path / "x.npz").data.n_bits == 1
    x[-1, 0, 0] = 7
    np.savez(tmp_path / "x.npz", x_train=x)
    assert choose(tmp_path / "x.npz").data.n_bits == 8


def test_a_glow_has_the_levels_that_the_sides_allow(tmp_path, pace):
    pace(1)
    for sides, levels in (((32, 32), 3), ((28, 28), 2), ((8, 8), 2), ((6, 4), 1)):
        npz(tmp_path / "x.npz", shape=sides)
        model = choose(tmp_path / "x.npz", purpose="latents").model.options()
        assert (model["levels"], len(model["steps"])) == (levels, levels)
    npz(tmp_path / "x.npz", shape=(25, 32))
    with pytest.raises(UserError, match="even sides of 4 pixels or more, not 25x32"):
        choose(tmp_path / "x.npz", purpose="latents")


@pytest.mark.run
def test_the_same_command_goes_on_with_its_choice(tmp_path):
    photos(tmp_path / "photos.v1", [(10, 10)] * 30, "RGB")
    tiny = ["model.width=8", "model.blocks=1"]
    command = ["train", "photos.v1", "--budget", "1h", *tiny, "train.num_steps=3"]
    assert "27 colour images of 8x8" in quick(*command, cwd=tmp_path).ok().out
    run = tmp_path / "runs" / "photos.v1-likelihood"
    chosen = (run / "config.yaml").read_text()
    second = quick(*command, cwd=tmp_path).ok().out
    assert "as chosen before" in second
    assert "length: 3 steps, to which --budget does not apply" in second
    assert "is finished" in second
    assert (run / "config.yaml").read_text() == chosen
    quick(*command[:-1], "train.num_steps=5", "--extend", cwd=tmp_path).ok()
    quick("evaluate", run, cwd=tmp_path).ok()


CHOSEN = "{data: {name: npz, path: x.npz}, model: {name: causal}, train: {budget: 60}}"


def chosen_before(folder, config=CHOSEN, settings=(), name="x.npz"):
    (folder / "config.yaml").write_text(config)
    return dial.configured(name, "2h", "likelihood", settings, folder, CPU)


def test_a_budget_among_the_settings_counts(tmp_path, pace):
    data, words = tmp_path / "x.npz", ["train.budget=100"]
    npz(data, 800, shape=(32, 32, 3))
    pace(0.1)
    found = dial.configured(str(data), "2h", "likelihood", words, tmp_path / "run", CPU)
    assert found.resolved() == choose(data, 100.0, settings=words).resolved()
    assert found.model.options()["width"] == 160


def test_another_budget_is_for_the_configuration_chosen_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz("x.npz")
    found = chosen_before(tmp_path, settings=["seed=3"], name="./x.npz")
    assert (found.train.budget, found.seed) == (7200, 3)
    assert chosen_before(tmp_path, settings=["train.budget=9"]).train.budget == 9
    ended = CHOSEN.replace("budget: 60", "num_steps: 60")
    assert chosen_before(tmp_path, ended).train.num_steps == 60
    assert chosen_before(tmp_path, ended, settings=["train.num_steps=99"]).train.num_steps == 99
    glow = CHOSEN.replace("causal", "glow")
    assert chosen_before(tmp_path, glow, settings=["model.name=glow"]).model.name == "glow"


def test_one_process_reads_the_configuration_chosen_before(tmp_path, monkeypatch):
    """The others may be on machines without the run directory."""
    monkeypatch.chdir(tmp_path)
    npz("x.npz")
    monkeypatch.setattr(dial.distributed, "from_main", lambda function: yaml.safe_load(CHOSEN))
    found = dial.configured("x.npz", "2h", "likelihood", (), tmp_path / "elsewhere", CPU)
    assert (found.model.name, found.train.budget) == ("causal", 7200)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CHOSEN.replace("x.npz", "y.npz"), "is of other data; give another --run-dir"),
        ("", "is of other data"),
        (CHOSEN.replace("causal", "glow"), "--for likelihood: .* has the model glow; give another"),
        ("model: causal", "config.yaml: model: expected keys and values"),
        ("train: null", "config.yaml: train: expected keys and values"),
    ],
)
def test_a_run_directory_of_another_command(tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    npz("x.npz")
    with pytest.raises(UserError, match=message):
        chosen_before(tmp_path, config)
