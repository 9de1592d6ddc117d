"""Class-conditional models: the prior, the likelihoods, labels through the data sets, and the
commands.
"""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from catalogue import TINY, sets
from cli_helpers import FOLDER, begin, last, metrics, quick
from helpers import SHARED, a_config, batch_of, images, npz, perturb, seeded, shared
from PIL import Image
from torch.distributions import Normal

from flowtrain.bijections.context import Guided
from flowtrain.bijections.inverses import Iterating
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints.build import build_flow
from flowtrain.data.batches import Batches
from flowtrain.data.splits import DataSet
from flowtrain.errors import UserError
from flowtrain.evaluation.score import score
from flowtrain.flow.class_prior import ClassPrior
from flowtrain.flow.dequantize import draw_noise
from flowtrain.flow.flow import initialize
from flowtrain.system import distributed
from flowtrain.training.dry_run import dry_run
from flowtrain.training.loop import fit
from flowtrain.training.run_directory import RunDirectory

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def prior():
    return perturb(ClassPrior(3, (2, 1, 2)), 0.7)


def test_the_prior_is_a_gaussian_for_each_class_on_the_coarsest_level(prior):
    z = torch.randn(5, 10, generator=seeded())
    log_scale = 8 * torch.tanh(prior.log_scale / 8)
    for label in range(3):
        mean, scale = prior.mean[label], log_scale[label].exp()
        expected = Normal(0, 1).log_prob(z[:, :6]).sum(1) + Normal(mean, scale).log_prob(
            z[:, 6:]
        ).sum(1)
        torch.testing.assert_close(prior.log_prob(z, torch.full((5,), label)), expected)
        torch.testing.assert_close(prior.by_class(z)[:, label], expected)
    of_each = prior.log_prob(z, torch.tensor([0, 1, 2, 0, 1]))
    torch.testing.assert_close(of_each, prior.by_class(z)[range(5), [0, 1, 2, 0, 1]])


def test_draws_of_a_class(prior):
    draws = prior.latents_of_classes(
        torch.randn(20_000, 10, generator=seeded()), torch.full((20_000,), 1)
    ).detach()
    mean, scale = draws[:, 6:].mean(0), draws[:, 6:].std(0)
    torch.testing.assert_close(mean, prior.mean[1].detach(), atol=0.08, rtol=0)
    expected = (8 * torch.tanh(prior.log_scale[1] / 8)).exp().detach()
    torch.testing.assert_close(scale, expected, rtol=0.03, atol=0)
    torch.testing.assert_close(draws[:, :6].std(0), torch.ones(6), rtol=0.03, atol=0)


def test_before_training_all_classes_are_the_standard_normal():
    z = torch.randn(4, 6, generator=seeded())
    torch.testing.assert_close(
        ClassPrior(5, (6,)).by_class(z), Normal(0, 1).log_prob(z).sum(1, True).expand(4, 5)
    )


def conditional(model="glow", classes=3, **options):
    config = a_config({"name": model, "classes": classes, **TINY[model], **options})
    flow = perturb(build_flow(config, SHAPE, 256))
    x = images(64, SHAPE)
    initialize(flow, x, draw_noise(x.shape, seeded(), x.device))
    return flow


@pytest.mark.parametrize("model", TINY)
def test_without_a_label_the_likelihood_is_the_mean_over_the_classes(model):
    flow = conditional(model).double()
    x = images(6, SHAPE)
    given = torch.stack([flow.log_prob(x, seeded(), torch.full((6,), label)) for label in range(3)])
    assert given.std(dim=0).min() > 1e-3
    torch.testing.assert_close(flow.log_prob(x, seeded()), given.logsumexp(dim=0) - math.log(3))
    mixed = flow.log_prob(x, seeded(), torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(mixed, given[[0, 1, 2, 0, 1, 2], range(6)])
    mixed.sum().backward()
    names = ("class_prior.", "conditioner.context.")
    of_classes = [p for name, p in flow.named_parameters() if any(n in name for n in names)]
    assert of_classes
    assert all(parameter.grad.abs().min() > 0 for parameter in of_classes)


@pytest.mark.parametrize("model", ["glow", "causal", "tarflow", "jet"])
def test_images_come_back_and_samples_have_a_class(model):
    flow = conditional(model)
    x = images(8, SHAPE)
    assert torch.equal(flow.decode(flow.encode(x)), x)
    labels = torch.tensor([2] * 8)
    of_class = flow.sample(8, generator=seeded(), labels=labels)
    by_turns = flow.sample(8, generator=seeded())
    assert torch.equal(of_class[2::3], by_turns[2::3]) and not torch.equal(of_class[0], by_turns[0])
    with pytest.raises(ValueError, match="classes in 0..2, got .3."):
        flow.sample(1, labels=torch.tensor([3]))
    with pytest.raises(ValueError, match="not class-conditional"):
        build_flow(a_config("nice"), SHAPE, 256).latents_of_classes(
            torch.zeros(1, 16), torch.tensor([0])
        )


def test_networks_that_see_the_class_give_a_distribution_for_each():
    config = a_config({"name": "causal", "classes": 3, **TINY["causal"]})
    flow = perturb(build_flow(config, (1, 2, 2), 4), 0.5)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4).reshape(-1, 1, 2, 2).to(torch.uint8)
    initialize(flow, every, torch.full(every.shape, 0.5))
    with torch.no_grad():
        parts = flow(every, torch.rand(every.shape, generator=seeded()))
        given = [flow.log_prob(every, seeded(), torch.full((256,), label)) for label in range(3)]
    assert (given[0] - given[1]).abs().max() > 0.05
    for label in range(3):
        assert given[label].exp().sum().item() == pytest.approx(1, abs=1e-5)
        of_class = parts.by_class[:, label] + parts.log_det
        torch.testing.assert_close(of_class, given[label], rtol=1e-4, atol=1e-4)
    assert parts.total.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_without_a_class_the_networks_see_the_mean_of_all():
    flow = conditional("causal")
    x, mean = images(5, SHAPE), torch.full((5, 3), 1 / 3)
    v = flow.dequantizer.middle(x)
    z = flow.encode(x)
    torch.testing.assert_close(flow.bijection(v, mean)[0], z)
    assert torch.equal(flow.decode(z), x)
    labels = torch.tensor([0, 1, 2, 0, 1])
    assert not torch.equal(flow.decode(z, labels), x)


def test_without_a_class_the_networks_see_zeros_if_labels_were_dropped_in_training():
    flow = conditional("causal", label_dropout=0.1)
    x = images(5, SHAPE)
    v = flow.dequantizer.middle(x)
    z = flow.encode(x)
    torch.testing.assert_close(flow.bijection(v, torch.zeros(5, 3))[0], z)
    assert torch.equal(flow.decode(z), x)
    noise = torch.full(x.shape, 0.5)
    without = flow(x, noise, torch.full((5,), 3)).total  # the label beyond those of the classes
    base = Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(
        without, base + flow.bijection(v, torch.zeros(5, 3))[1] - 16 * math.log(256)
    )
    given = torch.stack([flow(x, noise, torch.full((5,), label)).total for label in range(3)])
    # The likelihood of unlabelled images is that of Bayes' rule, as for any model with classes.
    torch.testing.assert_close(flow(x, noise).total, given.logsumexp(dim=0) - math.log(3))
    assert (flow(x, noise).total - without).abs().min() > 1e-3


def test_guidance_needs_a_model_that_knows_images_without_a_class():
    said = {
        "not class-conditional": build_flow(a_config("causal"), SHAPE, 256),
        "each class has its own prior": conditional("glow"),
        "model.label_dropout, for example 0.1": conditional("causal"),
    }
    for words, flow in said.items():
        with pytest.raises(ValueError, match=f"guidance: .*{words}"):
            flow.sample(2, guidance=0.0)
    flow = conditional("causal", label_dropout=0.1)
    plain, guided = (flow.sample(9, generator=seeded(), guidance=w) for w in (None, 2.0))
    assert torch.equal(flow.sample(9, generator=seeded(), guidance=0.0), plain)
    assert not torch.equal(guided, plain)


@pytest.mark.parametrize("model", ["causal", "tarflow"])
def test_guided_samples_are_by_the_extrapolated_parameters(model):
    flow = conditional(model, label_dropout=0.1).double()
    z, labels = flow.draw_latents(6, seeded()), torch.arange(6) % 3
    context = torch.nn.functional.one_hot(labels, 3).double()
    guided = Guided(context, torch.zeros_like(context), 1.5)
    v, log_det = flow.bijection.inverse(z, guided)
    back, log_det_back = flow.bijection(v, guided)
    torch.testing.assert_close(back, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-5, atol=1e-5)
    x = flow.decode(z, labels, guidance=1.5)
    assert torch.equal(x, flow.dequantizer.to_data(v))
    assert torch.equal(flow.decode(z, labels, Iterating(lambda share: None), 1.5), x)
    assert torch.equal(flow.sample(6, 1, seeded(), labels, 1.5), x)


def test_only_networks_that_see_the_class_have_labels_to_drop():
    for model, words in (
        ("glow", "networks of glow do not see the class"),
        ("causal", "set model.classes"),
    ):
        classes = 3 if model == "glow" else 0
        config = a_config({"name": model, "classes": classes, **TINY[model], "label_dropout": 0.1})
        with pytest.raises(UserError, match=f"model.label_dropout: 0.1, but .*{words}"):
            build_flow(config, SHAPE, 256)


# --- labels ---------------------------------------------------------------------------------------


def labelled(path, count=50, **options):
    """Images whose class is in their first pixel."""
    section = npz(path, train=count, test=20, validation=10, **options)
    arrays = dict(np.load(path))
    arrays |= {f"y_{part}": arrays[f"x_{part}"][:, :1, 0, 0] % 3 for part in ("train", "test")}
    np.savez(path, **arrays)
    return section


@pytest.mark.parametrize("streamed", [{}, {"max_in_memory": 0, "workers": 1}])
def test_labels_go_with_their_images(tmp_path, streamed, monkeypatch):
    section = labelled(tmp_path / "a.npz")
    config = a_config({"name": "glow", "classes": 3, **TINY["glow"]}, data={**section, **streamed})
    data = DataSet(config.data)
    for rank, world in [(0, 1), (1, 2)]:
        monkeypatch.setattr(
            distributed, "group", distributed.Group(None, rank, world) if world > 1 else None
        )
        batches = Batches(data, config, 7, torch.device("cpu"))
        for step in range(4, 16):  # over the end of the data
            x, labels = batch_of(batches, step)
            assert torch.equal(labels, (x[:, 0, 0, 0] % 3).long())
        batches.close()
    for name, count in [("train", 40), ("validation", 10), ("test", 20)]:
        split = data.split(name)
        assert (
            torch.equal(split.labels, (split.take(slice(None))[:, 0, 0, 0] % 3).long())
            and len(split) == count
        )
    unlabelled = Batches(data, a_config("glow", data=section), 7, torch.device("cpu"))
    assert batch_of(unlabelled, 0)[1] is None


def test_labels_that_do_not_fit(tmp_path):
    def batches(section):
        """All that refuses labels does it with the same words."""
        config = a_config({"name": "glow", "classes": 2, **TINY["glow"]}, data=section)
        with pytest.raises(UserError) as refused:
            Batches(DataSet(config.data), config, 7, torch.device("cpu"))
        for start in (dry_run, lambda *of: fit(of[0], RunDirectory(tmp_path / "run"), of[1])):
            with pytest.raises(UserError, match=re.escape(str(refused.value))):
                start(config, torch.device("cpu"))
        assert not (tmp_path / "run").exists()
        raise refused.value

    with pytest.raises(UserError, match="model.classes: 2, but npz has the labels 0..2"):
        batches(labelled(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="model.classes: 2, but npz has no labels"):
        batches(npz(tmp_path / "b.npz"))
    section = labelled(tmp_path / "c.npz")
    for labels in (np.zeros(49, int), np.zeros(50)):
        np.savez(tmp_path / "c.npz", **{**np.load(tmp_path / "c.npz"), "y_train": labels})
        with pytest.raises(
            UserError, match="y_train in .*c.npz is .*: expected a whole number for each of the 50"
        ):
            batches(section)


def test_labels_without_a_test_split_of_their_own(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 4, 4), "u1")
    np.savez(tmp_path / "a.npz", x_train=x, y_train=x[:, 0, 0])
    data = DataSet(
        a_config(data={"name": "npz", "path": str(tmp_path / "a.npz"), "validation": 0}).data
    )
    for name, count in [("train", 27), ("test", 3)]:
        split = data.split(name)
        assert (
            torch.equal(split.labels, split.take(slice(None))[:, 0, 0, 0].long())
            and len(split) == count
        )


def test_labels_of_the_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    known = {
        image.tobytes(): target
        for image, target in zip(digits.images.astype("u1"), digits.target, strict=True)
    }
    for name in ("train", "test"):
        split = DataSet(a_config().data).split(name)
        assert [
            known[x.numpy().tobytes()] for x in split.take(slice(None))
        ] == split.labels.tolist()


@shared
def test_labels_of_mnist():
    split = DataSet(a_config(data={"name": "mnist", "root": str(SHARED)}).data).split("test")
    assert split.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


# --- the commands ---------------------------------------------------------------------------------

RUN = [
    *sets(
        model__classes=10,
        model__steps=2,
        model__width=16,
        train__num_steps=150,
        train__batch_size=64,
    )
]
RUN += sets(
    train__lr=5e-3, train__log_every=10, train__validate_every=50, train__checkpoint_every=75
)
RUN += sets(train__keep_checkpoints=2)


@pytest.fixture(scope="module")
def run():
    quick("train", *RUN, "--run-dir", "conditional", cwd=FOLDER).ok()
    return FOLDER / "conditional"


def test_evaluation_adds_the_accuracy(run, tmp_path):
    result = json.loads(
        quick("evaluate", run, "--json", "-", "--scores", "s.csv", cwd=tmp_path).ok().out
    )
    assert 0.3 < result["accuracy"] < 1
    assert result["accuracy_stderr"] == pytest.approx(
        math.sqrt(result["accuracy"] * (1 - result["accuracy"]) / 180), rel=1e-6
    )
    # log P(x) is at least log P(x | class) - log 10, and for most images less than log P(x |
    # class).
    assert result["bits_per_dim"] - math.log2(10) / 64 < result["loss_given_class"]
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = DataSet(a_config().data).split("test").labels.tolist()
    hits = [int(row["predicted_class"]) == label for row, label in zip(rows, labels, strict=True)]
    assert np.mean(hits) == pytest.approx(result["accuracy"])
    several = json.loads(quick("evaluate", run, "--json", "-", "--draws", 3, cwd=tmp_path).ok().out)
    assert (
        several["accuracy"] != result["accuracy"]
        or several["bits_per_dim"] < result["bits_per_dim"]
    )


def test_bounds_by_class_are_those_of_the_draws(run):
    flow = conditional().eval().requires_grad_(False)
    x = images(9, SHAPE).numpy()
    from flowtrain.data.splits import Split

    scores = score(flow, Split(x, np.arange(9), 0), samples=2, batch_size=4)
    assert scores.draws_by_class.shape == (2, 3, 9)
    torch.testing.assert_close(scores.draws, scores.draws_by_class.logsumexp(dim=1) - math.log(3))
    torch.testing.assert_close(scores.base + scores.log_det, scores.draws[0])


def test_samples_have_a_row_a_class(run, tmp_path):
    quick("sample", run, "--classes", "3,0", "--num-images", 5, "--out", "s.npz", cwd=tmp_path).ok()
    drawn = np.load(tmp_path / "s.npz")
    assert drawn["classes"].tolist() == [3] * 5 + [0] * 5 and len(drawn["images"]) == 10
    quick("sample", run, "--classes", "0", "--num-images", 5, "--out", "0.npz", cwd=tmp_path).ok()
    assert np.array_equal(np.load(tmp_path / "0.npz")["images"], drawn["images"][5:])
    quick("sample", run, "--classes", "3,0", "--num-images", 5, "--out", "s.png", cwd=tmp_path).ok()
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (5 * 162 + 2, 2 * 162 + 2)  # 20 times as large


def test_resumed_with_labels(run, tmp_path):
    losses = [row["bits_per_dim"] for row in metrics(run) if row["split"] == "train"]
    assert losses[0] - losses[-1] > 0.5
    middle = run / "checkpoints" / "step-00000075.safetensors"
    quick("train", *RUN, "--run-dir", "r", "--resume", middle, cwd=tmp_path).ok()
    assert_same_weights(run, tmp_path / "r")


def assert_same_weights(one, other):
    tensors = [checkpoint_format.read(last(folder)).tensors for folder in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_resuming_notices_other_labels(tmp_path):
    section = labelled(tmp_path / "a.npz")
    options = [
        *sets(
            data__name="npz",
            data__path="a.npz",
            data__validation=10,
            model__levels=1,
            model__classes=4,
        )
    ]
    options += [
        *sets(model__steps=1, model__width=4, train__batch_size=8, train__checkpoint_every=2)
    ]
    quick("train", *options, *sets(train__num_steps=2), "--run-dir", "r", cwd=tmp_path).ok()
    arrays = dict(np.load(section["path"]))
    np.savez(tmp_path / "a.npz", **{**arrays, "y_train": (arrays["y_train"] + 1) % 4})
    command = ["train", *options, *sets(train__num_steps=4), "--run-dir", "s"]
    quick(*command, "--resume", "r", cwd=tmp_path).failed(2, "not the images that", "labels")


def test_a_checkpoint_from_before_there_were_classes(tmp_path):
    options = [
        *RUN[2:],
        *sets(train__num_steps=4, train__checkpoint_every=2, train__keep_checkpoints=5),
    ]
    quick("train", *options, "--run-dir", "r", cwd=tmp_path).ok()
    path = tmp_path / "r" / "checkpoints" / "step-00000002.safetensors"
    saved = checkpoint_format.read(path)
    meta = {key: value for key, value in saved.meta.items() if key not in ("format", "versions")}
    del meta["config"]["model"]["classes"]
    path.unlink()
    checkpoint_format.write(path, meta, saved.tensors)
    quick("train", *options, "--run-dir", "s", "--resume", path, cwd=tmp_path).ok()
    assert_same_weights(tmp_path / "r", tmp_path / "s")


def test_two_processes_train_and_evaluate_with_labels(run, tmp_path):
    words = ["train", *RUN, *sets(train__num_steps=10, train__log_every=1)]
    double = {"cwd": tmp_path, "first": "import torch; torch.set_default_dtype(torch.float64)"}
    quick(*words, "--run-dir", "1", **double).ok()
    begun = begin(2, *words, *sets(train__batch_size=32), "--run-dir", "2", **double)
    assert all(each.result().ok() for each in begun)
    one, two = ([row["bits_per_dim"] for row in metrics(tmp_path / name)] for name in "12")
    assert one == pytest.approx(two, abs=1e-9)
    alone = json.loads(quick("evaluate", run, "--json", "-", cwd=tmp_path).ok().out)
    together = [p.result() for p in begin(2, "evaluate", run, "--json", "-", cwd=tmp_path)]
    found = json.loads(together[0].ok().out)
    assert found["accuracy"] == alone["accuracy"]
    assert found["loss_given_class"] == pytest.approx(alone["loss_given_class"], abs=1e-6)


def test_other_data_have_other_classes(run, tmp_path):
    arrays = {"x_train": digits_images()[:40], "y_train": np.arange(40) + 100}
    np.savez(tmp_path / "b.npz", **arrays, x_test=arrays["x_train"], y_test=arrays["y_train"])
    labelled(tmp_path / "a.npz", shape=(8, 8, 1))
    done = quick("evaluate", run, "--data", "b.npz", "--json", "-", cwd=tmp_path)
    done.failed(2, "with 256 levels")  # the digits have 17
    quick("train", *RUN, *NPZ, "--run-dir", "r", cwd=tmp_path).ok()
    result = json.loads(
        quick("evaluate", "r", "--data", "b.npz", "--json", "-", cwd=tmp_path).ok().out
    )
    assert "accuracy" not in result and result["num_images"] == 40


NPZ = sets(data__name="npz", data__path="a.npz", train__num_steps=2, model__classes=3)


def digits_images():
    return digits_split().take(slice(None)).numpy()[:, 0]


def digits_split():
    return DataSet(a_config().data).split("test")


def test_no_accuracy_of_numbers_that_are_not_finite(run, tmp_path):
    saved = checkpoint_format.read(last(run))
    for name in ("model.class_prior.mean", "ema.class_prior.mean"):
        saved.tensors[name][:] = torch.nan
    meta = {key: value for key, value in saved.meta.items() if key not in ("format", "versions")}
    checkpoint_format.write(tmp_path / "bad.safetensors", meta, saved.tensors)
    options = ["--json", "r.json", "--scores", "s.csv"]
    quick("evaluate", "bad.safetensors", *options, cwd=tmp_path).failed(1, "180 of 180 images")
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["accuracy"], result["accuracy_stderr"], result["loss_given_class"]) == (
        None,
        None,
        None,
    )
    with (tmp_path / "s.csv").open() as file:
        assert {row["predicted_class"] for row in csv.DictReader(file)} == {""}


def test_labels_that_the_model_does_not_have():
    flow, x = conditional(), images(2, SHAPE)
    for labels in (torch.tensor([-1, 0]), torch.tensor([0, 3])):
        with pytest.raises(ValueError, match="classes in 0..2"):
            flow.log_prob(x, labels=labels)
    with pytest.raises(ValueError, match="expected 2 labels, got .1,."):
        flow.log_prob(x, labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="not class-conditional"):
        build_flow(a_config("nice"), SHAPE, 256).log_prob(x, labels=torch.tensor([0, 1]))


def test_a_dry_run(tmp_path):
    assert "parameters: " in quick("train", *RUN, "--dry-run", cwd=tmp_path).ok().out


def test_from_one_class_to_another(run, tmp_path):
    options = ["--from-class", 4, "--to-class", 9, "--pairs", 3, "--steps", 5]
    quick("interpolate", run, *options, "--out", "i.png", cwd=tmp_path).ok()
    with Image.open(tmp_path / "i.png") as picture:
        assert picture.size == (5 * 162 + 2, 3 * 162 + 2)
        first = np.asarray(picture.convert("L"))[2:162, 2:162][::20, ::20]
    split = DataSet(a_config().data).split("test")
    of_class = split.take((split.labels == 4).nonzero().flatten().numpy()[:1])
    assert np.array_equal(first, (of_class[0, 0].int() * 255 // 16).numpy())


def test_an_unconditional_model_moves_images_between_classes(tmp_path):
    quick("train", *RUN[8:], *sets(train__num_steps=1), "--run-dir", "r", cwd=tmp_path).ok()
    quick("interpolate", "r", "--from-class", 1, "--to-class", 2, cwd=tmp_path).ok()
