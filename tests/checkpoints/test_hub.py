"""Models on the hub, in both directions, with a server that speaks its protocol."""

import json
import socket
from pathlib import Path

import fake_hub
import pytest
from catalogue import SMALL
from cli_helpers import copy_of, quick, trained
from helpers import CPU

from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.checkpoints import hub as hub_models
from flowtrain.checkpoints import zoo
from flowtrain.checkpoints.load import find, load_model
from flowtrain.errors import RunError, UserError

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

MODEL = zoo.checkpoint_of("glow_digits").read_bytes()
FILES = {"README.md": b"---\nlicense: mit\n---\n", hub_models.FILE: MODEL}


@pytest.fixture
def hub():
    with fake_hub.running() as running:
        yield running


def use(monkeypatch, url, **more):
    """Settings of the hub's package, which reads them from the environment at its import."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    here = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    for name, value in {**here, **more}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    huggingface_hub.close_session()  # which knows the proxies of before


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    use(monkeypatch, hub.url, HF_HUB_CACHE=str(tmp_path / "cache"))
    yield hub
    huggingface_hub.close_session()


@pytest.mark.run
def test_a_model_goes_to_the_hub_and_back_by_commands(hub, tmp_path):
    env = {**hub.environment, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_mine"}
    run = copy_of(trained()["glow"], tmp_path / "run")
    done = quick("push", "run", "me/digits", "--licence", "mit", cwd=tmp_path, **env).ok()
    assert f"uploaded to {hub.url}/me/digits" in done.out and "for everybody" in done.out
    (files,) = hub.repositories["me/digits"].commits.values()
    names = ["README.md", "config.yaml", "curves.png", "model.safetensors", "samples.png"]
    assert sorted(files) == names
    for name, content in files.items():
        assert (run / "push" / name).read_bytes() == content

    results = []
    for model in ("run", "hf://me/digits"):
        quick("evaluate", model, "--num-images", 8, "--json", "e.json", cwd=tmp_path, **env).ok()
        results.append(json.loads((tmp_path / "e.json").read_text())["bits_per_dim"])
    assert results[0] == results[1]
    quick("sample", "hf://me/digits@main", "--num-images", 2, cwd=tmp_path, **env).ok()
    assert (tmp_path / "runs/hf/me/digits/sample.png").exists()
    # Commands that read a model in other ways
    words = ["--init-from", "hf://me/digits", "train.num_steps=1", "--run-dir", "new"]
    quick("train", *SMALL, *words, cwd=tmp_path, **env).ok()
    done = quick("train", "--resume", "hf://me/digits", "--run-dir", "r", cwd=tmp_path, **env)
    done.failed(2, "it holds only a model, and no state of training")


def test_what_was_uploaded_is_downloaded(here, tmp_path, monkeypatch, caplog):
    url = hub_models.upload("me/digits", FILES, private=False)
    assert url == f"{here.url}/me/digits" and not here.repositories["me/digits"].private
    here.asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_format, "largest", lambda: 1000)
        with pytest.raises(UserError, match=f"has {len(MODEL):,} bytes, more than the 1,000"):
            find("hf://me/digits")
    assert [asked for asked in here.asked if asked.startswith("GET /me")] == []
    caplog.set_level("INFO", "flowtrain")
    path = find("hf://me/digits")
    size = f"{len(MODEL) / 2**20:.1f}"
    waits = [f"hf://me/digits: contacting {here.url}", f"downloading {size} MiB"]
    assert caplog.messages == waits
    assert path.read_bytes() == MODEL and path.is_relative_to(tmp_path / "cache")
    assert hub_models.repository_of(path) == "me/digits"
    here.asked.clear()
    assert find("hf://me/digits") == path
    assert caplog.messages == [*waits, waits[0]]
    assert {words.partition(" ")[0] for words in here.asked} == {"HEAD"}  # it is there already


def test_a_revision_and_the_cache(here, monkeypatch):
    hub_models.upload("me/digits", FILES, private=False)
    first = here.repositories["me/digits"].resolved("main")
    hub_models.upload("me/digits", {hub_models.FILE: MODEL[:-1]}, private=False)

    def check():
        assert find("hf://me/digits").read_bytes() == MODEL[:-1]
        assert find(f"hf://me/digits@{first}").read_bytes() == MODEL

    check()
    with pytest.raises(UserError, match="hf://me/digits@next: the repository has no such revision"):
        find("hf://me/digits@next")
    here.broken = True  # then the cache has to do
    check()
    here.broken = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here.asked.clear()
    check()
    with pytest.raises(RunError, match="hf://me/other: the hub cannot be reached, and its cache"):
        find("hf://me/other")
    assert here.asked == []


def test_a_private_repository(here, monkeypatch):
    hub_models.upload("me/secret", FILES, private=True)
    assert here.repositories["me/secret"].private
    find("hf://me/secret")
    hub_models.upload("me/secret", FILES, private=True)
    hub_models.upload("me/public", FILES, private=False)
    with pytest.raises(UserError, match="--private: me/public exists and is public"):
        hub_models.upload("me/public", {"README.md": b"other"}, private=True)
    assert len(here.repositories["me/public"].commits) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "elsewhere")
    with pytest.raises(UserError, match=r"hf://me/secret: there is no such .*`hf auth login`"):
        find("hf://me/secret")


@pytest.mark.parametrize("uploading", [True, False])
def test_the_hub_refuses(uploading, here, monkeypatch):
    def attempt(kind, message, repository="me/x"):
        with pytest.raises(kind, match=f"^hf://{repository}: .*{message}"):
            if uploading:
                hub_models.upload(repository, FILES, private=False)
            else:
                find(f"hf://{repository}")

    if uploading:
        attempt(UserError, "rights to create a model", "you/x")
    else:
        attempt(UserError, "there is no such repository")
        here.repositories["a/b"] = fake_hub.Repository(private=False, gated=True)
        attempt(UserError, "its owner has to give you access", "a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    attempt(UserError, r"the hub does not allow it .*HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    here.broken = True
    attempt(RunError, "500" if uploading else "cannot be reached")
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        use(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        attempt(RunError, "the hub cannot be reached")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "hf://a/b: the repository has no model.safetensors, so it is not from flowtrain"),
        (MODEL[:-1] + b"!", "models--a--b/.*/model.safetensors: damaged: its bytes do not match"),
    ],
    ids=["nothing", "damaged"],
)
def test_a_repository_without_a_model_of_flowtrain(content, message, here):
    files = {} if content is None else {hub_models.FILE: content}
    here.repositories["a/b"] = fake_hub.Repository(private=False)
    here.repositories["a/b"].commit({"README.md": b"", **files})
    with pytest.raises(UserError, match=message):
        load_model("hf://a/b", CPU)


def test_uploading_needs_an_account(here, monkeypatch):
    hub_models.require_login("me/x")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="me/x: uploading needs an account on the hub: `hf auth lo"):
        hub_models.require_login("me/x")
    assert here.asked == []


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "__version__", "0.36.2")
    with pytest.raises(UserError, match=r"^hf://a/b: .* version 1\.3 .*, and 0\.36\.2 is inst"):
        find("hf://a/b")
    monkeypatch.setitem(hub_models.sys.modules, "huggingface_hub", None)
    for ask in (find, hub_models.require_login):
        with pytest.raises(UserError, match=r"^hf://a/b: .*huggingface_hub .the extra hf.: "):
            ask("hf://a/b")


def test_names_on_the_hub():
    for text, *found in (
        ("hf://a/b", "a/b", None),
        ("a/b.c-d_e", "a/b.c-d_e", None),
        ("hf://a/b@v1.0", "a/b", "v1.0"),
        ("hf://a/b@refs/pr/1", "a/b", "refs/pr/1"),
    ):
        assert hub_models.address(text) == hub_models.Address(*found)
    for text in (
        *("hf://a", "hf://", "a/b/c", "a/b@", "../b", "a/..", "a/b@../../x", "a--b/c", "a/b.git"),
        *("/a/b", "a/b ", "a/b\n", "hf:/a/b", "\xe9/b", "a/b@/x", "a/b@x..y"),
        *("a/b-", "a/b.", "a-/b", "a/" + 97 * "b"),
    ):
        with pytest.raises(UserError, match="not a hub name"):
            hub_models.address(text)


def test_a_path_in_the_cache():
    others = ["models--a--b/blobs", "datasets--a--b/snapshots", "models--..--../snapshots"]
    others += ["models--a/snapshots"]
    for path in ("model.safetensors", *(f"hub/{each}/0/model.safetensors" for each in others)):
        assert hub_models.repository_of(Path(path)) is None
    path = Path("hub/models--a--b/snapshots/0/model.safetensors")
    assert hub_models.repository_of(path) == "a/b"
