"""Models on the Hugging Face Hub: a MODEL `hf://user/name`, and the uploads of `flowtrain push`.

The package huggingface_hub does both, and is imported only here, on demand. Its own settings hold
the address of the hub (`HF_ENDPOINT`), the token, and the cache folder.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import flowtrain
from flowtrain.checkpoints import format as checkpoint_format
from flowtrain.errors import RunError, UserError, cut, short
from flowtrain.system import packages

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("flowtrain")

PREFIX = "hf://"
FILE = "model.safetensors"  # the name that the hub expects
OLDEST = (1, 3)  # version of huggingface_hub
NAME = r"\w(?:[\w.-]{0,94}\w)?"  # as huggingface_hub accepts it
ADDRESS = re.compile(rf"({NAME}/{NAME})(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
LOG_IN = "`hf auth login`, or a token in HF_TOKEN"


@dataclass(frozen=True)
class Address:
    repository: str  # user/name
    revision: str | None  # a branch, a tag or a commit


def address(text: str) -> Address:
    """Reads `user/name` or `user/name@revision`, with or without `hf://`. Raises `UserError`."""
    found = ADDRESS.fullmatch(text.removeprefix(PREFIX))
    if found is None or "--" in found[1] or ".." in text or found[1].endswith(".git"):
        raise UserError(f"{cut(text)}: not a hub name: expected hf://user/name or user/name")
    return Address(found[1], found[2])


def repository_of(path: Path) -> str | None:
    """`user/name` of a file in the hub's cache, `models--user--name/snapshots/COMMIT/FILE`."""
    if len(path.parents) < 3 or path.parents[1].name != "snapshots":
        return None
    kind, *name = path.parents[2].name.split("--")
    repository = "/".join(name)
    return repository if kind == "models" and ADDRESS.fullmatch(repository) else None


def require_package(model: str) -> None:
    """Raises `UserError` if huggingface_hub is missing or too old."""
    packages.required(f"{cut(model)}: the hub", "huggingface_hub", OLDEST, extra="hf")


def download(model: str) -> Path:
    """The checkpoint of `hf://user/name` in the hub's cache, downloaded unless the newest is there.
    Without a network, the cache has to do.

    Raises:
        UserError: There is no such repository or revision, it has no model of flowtrain or one that
            is larger than the memory, or the package is missing.
        RunError: The hub cannot be reached, or fails.
    """
    wanted = address(model)
    require_package(model)
    with _explaining(model):
        hub = _client()
        log.info("%s: contacting %s", model, hub.endpoint)
        about = hub.hf_hub_download(wanted.repository, FILE, revision=wanted.revision, dry_run=True)
        limit = checkpoint_format.largest()
        if (about.file_size or 0) > limit:
            raise UserError(
                f"{model}: its {FILE} has {about.file_size:,} bytes, more than the {limit:,} that "
                f"fit into memory"
            )
        if about.will_download:
            log.info("downloading %.1f MiB", (about.file_size or 0) / 2**20)
        return Path(hub.hf_hub_download(wanted.repository, FILE, revision=wanted.revision))


def require_login(model: str) -> None:
    """Raises `UserError` if nobody is logged in to the hub."""
    require_package(model)
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"{model}: uploading needs an account on the hub: {LOG_IN}")


def upload(repository: str, files: Mapping[str, bytes], private: bool) -> str:
    """Commits `files`, given by name, to a repository, which is created if it is missing. Returns
    its address on the web.

    Raises:
        UserError: The hub refuses it, it is to be `private` and is public already, or the package
            is missing.
        RunError: The hub cannot be reached, or fails.
    """
    require_package(repository)
    from huggingface_hub import CommitOperationAdd

    with _explaining(PREFIX + repository):
        hub = _client()
        url = hub.create_repo(repository, private=private or None, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise UserError(
                f"--private: {repository} exists and is public; make it private on the hub first"
            )
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        said = f"flowtrain {flowtrain.__version__}"
        hub.create_commit(repository, additions, commit_message=said)
        return str(url)


def _client() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="flowtrain", library_version=flowtrain.__version__)


@contextlib.contextmanager
def _explaining(model: str) -> Iterator[None]:
    """Turns errors of the hub into one message."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except errors.RevisionNotFoundError:
        raise UserError(f"{model}: the repository has no such revision") from None
    except errors.LocalEntryNotFoundError as error:
        reason = error.__cause__ or error
        raise RunError(
            f"{model}: the hub cannot be reached, and its cache has no copy ({short(reason)})"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{model}: the repository has no {FILE}, so it is not from flowtrain push"
        ) from None
    except errors.GatedRepoError:
        raise UserError(f"{model}: its owner has to give you access: ask on its page") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{model}: there is no such repository, or it is private and needs {LOG_IN}"
        ) from None
    except errors.HfHubHTTPError as error:
        said = short(Exception(error.server_message)) if error.server_message else short(error)
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{model}: the hub does not allow it ({said}): {LOG_IN}") from None
        raise RunError(f"{model}: the hub returned {status} ({said})") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # of the cache
            raise
        raise RunError(f"{model}: the hub cannot be reached ({short(error)})") from None
