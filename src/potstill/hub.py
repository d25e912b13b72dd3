"""Models and data sets of the Hugging Face hub, and names of models as timm writes them.

hf-hub:USER/NAME[@REVISION]             a repository of the hub
local-dir:PATH                          a folder of the same layout
hf://datasets/USER/NAME[@REVISION][/FOLDER]     a data set of the hub, as Parquet files; those of one folder, which a
                                                repository of several data sets has for each of its configurations

A revision is a branch, a tag or a commit.  Whatever it is, the files come from one commit, which is recorded.  What is
in the hub client's cache needs no network, if the commit is given or the hub cannot be reached.
"""

import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from potstill.errors import UsageError, did_you_mean, first_line
from potstill.io import write_text

HUB_PREFIX, LOCAL_PREFIX = "hf-hub:", "local-dir:"
HUB_DATA, DATASET_PREFIX = "hf://", "hf://datasets/"
CONNECT_SECONDS = 3.0
# The files of a model, the first complete group: those of potstill; those of timm and transformers.
MODEL_FILES = (
    (("model.json",), ("model.safetensors",), ()),
    (("config.json",), ("model.safetensors", "pytorch_model.bin"), ("preprocessor_config.json",)),
)
PARQUET_BRANCH = "refs/convert/parquet"  # the hub converts data sets of other formats into it
_PART = re.compile(r"-\d+-of-(\d+)\.parquet$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit in the hub client's cache."""

    name: str  # as given, with the commit as its revision
    folder: Path
    files: tuple[str, ...]  # paths in the folder


def is_hub_model(name: str) -> bool:
    """Return whether a name begins with ``hf-hub:`` or ``local-dir:``.

    Example:
        >>> is_hub_model("hf-hub:timm/resnet18.a1_in1k"), is_hub_model("local-dir:models/a"), is_hub_model("resnet18")
        (True, True, False)
    """
    return name.startswith((HUB_PREFIX, LOCAL_PREFIX))


def is_hub_dataset(name: str) -> bool:
    """Return whether a name is an address of data on the hub."""
    return name.startswith(HUB_DATA)


def model_path(name: str | Path) -> Path:
    """Return the folder or file of a model; that of ``hf-hub:`` is downloaded if it is not in the cache.

    UsageError: no such repository, revision or files, or they are not here and there is no network.
    """
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return fetch_model(text).folder
    return Path(text.removeprefix(LOCAL_PREFIX)).expanduser()


def pinned_name(name: str) -> str:
    """Return the name with the commit as its revision if it is that of a hub's repository; else the same name."""
    return fetch_model(name).name if name.startswith(HUB_PREFIX) else name


@cache  # one commit for a whole process, and one request
def fetch_model(name: str) -> HubFiles:
    """Return the files of a model's repository."""

    def choose(files: Sequence[str]) -> list[str]:
        for needed, weights, optional in MODEL_FILES:
            found = next((each for each in weights if each in files), None)
            if found is not None and all(each in files for each in needed):
                return [*needed, found, *(each for each in optional if each in files)]
        raise UsageError(
            f"{name} holds no model that can be read: neither model.json and model.safetensors of potstill, nor "
            f"config.json with model.safetensors or pytorch_model.bin{_listed(files)}"
        )

    return _fetch(name, name.removeprefix(HUB_PREFIX), "model", choose)


@cache
def fetch_dataset(name: str) -> HubFiles:
    """Return the Parquet files of a data set's repository, or of the branch into which the hub converts others."""
    path = name.removeprefix(DATASET_PREFIX)
    if path == name:
        raise UsageError(
            f"{name}: an address of data is {DATASET_PREFIX}USER/NAME, or {DATASET_PREFIX}USER/NAME@COMMIT, and "
            "/CONFIGURATION after it if there are several"
        )
    path, folder = split_dataset_address(path)

    def choose(files: Sequence[str]) -> list[str]:
        tables = [each for each in files if each.endswith(".parquet")]
        if found := [each for each in tables if each.startswith(folder)]:
            for each in found:
                number = _PART.search(each)
                if number and sum(other.startswith(each[: number.start()]) for other in found) < int(number[1]):
                    raise UsageError(f"{name}: of {each} and its {number[1]} parts, some are missing")
            return found
        if tables and folder:
            known = sorted({each.split("/")[0] for each in tables if "/" in each})
            near = did_you_mean(folder.strip("/"), known)
            raise _NoTablesError(
                f"{name}: there is no table in {folder}{near}; there are {', '.join(known[:8]) or tables[0]}"
            )
        raise _NoTablesError(f"{name} has no Parquet files{_listed(files)}")

    try:
        found = _fetch(name, path, "dataset", choose)
    except _NoTablesError as error:
        if "@" in path:
            raise
        try:
            found = _fetch(name, f"{path}@{PARQUET_BRANCH}", "dataset", choose)
        except UsageError as other:
            raise (other if isinstance(other, _NoTablesError) or not folder else error) from None
    return replace(found, name=f"{found.name}/{folder}".rstrip("/"))


def split_dataset_address(path: str) -> tuple[str, str]:
    """Return USER/NAME[@REVISION], and the folder with a slash at its end; "" for all of a repository.

    Example:
        >>> split_dataset_address("me/pets"), split_dataset_address("me/pets@v1/cats")
        (('me/pets', ''), ('me/pets@v1', 'cats/'))
        >>> split_dataset_address("me/pets@refs/convert/parquet/cats")
        ('me/pets@refs/convert/parquet', 'cats/')
    """
    parts = path.strip("/").split("/")
    count = 4 if len(parts) > 1 and parts[1].endswith("@refs") else 2
    return "/".join(parts[:count]), "".join(f"{part}/" for part in parts[count:])


class _NoTablesError(UsageError):
    """A repository without Parquet files."""


def _listed(files: Sequence[str]) -> str:
    return f"; it has {', '.join(files[:8])}{', ...' if len(files) > 8 else ''}" if files else "; it is empty"


def _fetch(name: str, path: str, kind: str, choose: Callable[[Sequence[str]], list[str]]) -> HubFiles:
    from huggingface_hub import constants

    repository, _, revision = path.partition("@")
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{name}: a repository is USER/NAME of letters, digits and . _ -, got {repository!r}")
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    if cached := _cached_commit(repository, kind, revision or "main"):
        pinned = _COMMIT.fullmatch(revision) is not None
        if pinned or offline or not is_reachable(constants.ENDPOINT):
            try:
                return _as_files(name, repository, cached, choose)
            except UsageError:  # the cache holds other files of this commit
                if offline:
                    raise
    if offline or not is_reachable(constants.ENDPOINT):
        option = " --repo-type dataset" if kind == "dataset" else ""
        raise UsageError(
            f"{name} is not in the cache of this machine, and {offline or 'the hub cannot be reached'}.\n"
            f"Run `hf download{option} {repository}` where there is a network, and copy its cache "
            f"({constants.HF_HUB_CACHE}), or download its files and give their folder"
        )
    api = create_client()
    with hub_errors(name):
        info = (api.model_info if kind == "model" else api.dataset_info)(repository, revision=revision or None)
        files = [each.rfilename for each in info.siblings or ()]
        chosen = choose(files)
        for file in chosen:
            api.hf_hub_download(repository, file, repo_type=kind, revision=info.sha)  # nosec B615 # pinned
        _record_revision(repository, kind, revision or "main", str(info.sha))
    return _as_files(name, repository, _cached_commit(repository, kind, str(info.sha)), choose)


def _as_files(
    name: str, repository: str, folder: Path | None, choose: Callable[[Sequence[str]], list[str]]
) -> HubFiles:
    if folder is None:
        raise UsageError(f"{name}: the downloaded files are not in the cache; is it writable?")
    here = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    prefix = next(each for each in (HUB_PREFIX, DATASET_PREFIX) if name.startswith(each))
    return HubFiles(f"{prefix}{repository}@{folder.name}", folder, tuple(choose(here)))


def _record_revision(repository: str, kind: str, revision: str, commit: str) -> None:
    """Record in the cache, as its client does, to which commit a branch points; all files are there now."""
    if not _COMMIT.fullmatch(revision):
        path = _cache_of(repository, kind) / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, commit)


def _cache_of(repository: str, kind: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *repository.split("/")])


def _cached_commit(repository: str, kind: str, revision: str) -> Path | None:
    """Return the folder of a repository's revision in the cache, whose name is the commit."""
    root, commit = _cache_of(repository, kind), revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (root / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    folder = root / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def create_client() -> Any:
    """Return the hub's client for the endpoint of the environment (``HF_ENDPOINT``)."""
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT, library_name="potstill")


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub's client raises inside the block into one UsageError that states what to do."""
    from huggingface_hub import errors

    login = "if it is private, log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError as error:
        raise UsageError(f"{name}: access must be granted first: ask for it on the repository's page") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{name}: the hub has no such repository, or hides it; {login}") from error
    except Exception as error:  # network, authorisation, disk: the client raises its own and httpx's kinds
        raise UsageError(f"{name}: the hub's answer was: {first_line(error)}") from error


def is_reachable(url: str, patience: float = CONNECT_SECONDS) -> bool:
    """Return whether the host of ``url``, or the proxy, responds within ``patience`` seconds."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience):  # nosec B310 # HEAD
                answered.set()
        except urllib.error.HTTPError as answer:
            answer.close()
            answered.set()
        except (OSError, ValueError):
            return

    # A thread, since no time-out ends the look-up of a host name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answered.is_set()
