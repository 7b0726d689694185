"""Models named as on the Hugging Face hub (``Qwen/Qwen2-7B``, ``Qwen/Qwen2-7B@REVISION``), downloaded or cached.

A path that exists is never looked up on the hub. No code of a model is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from megatron_align.data.tokenize.heartbeat import HeartbeatMonitor, heartbeat
from megatron_align.errors import InputError, listed, one_line, require

POLL_SECONDS = 0.2
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_LEFT = (
    "*/*.safetensors",
    "consolidated*",
    "original/*",
    "onnx/*",
)  # the same weights again, in other formats
_folders: dict[tuple[str, bool], Path] = {}  # what this process has looked up


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path that does not exist has the form of a name on the hub."""
    return _NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def model_folder(path: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a model: ``path`` itself, or of a name on the hub the snapshot, downloaded if need be.

    Args:
        path: folder, or name on the hub.
        weights: False: only configuration and tokenizer are downloaded.

    Raises:
        InputError: ``path`` is the hub's cache rather than a snapshot in it; or a name that cannot be downloaded.
    """
    _require_no_cache_root(Path(path))
    if not is_hub_name(path):
        return Path(path)
    key = (str(path), weights)
    if key not in _folders:
        _folders[key] = _download(str(path), weights)
    return _folders[key]


def fetch_or_wait(path: str, local_rank: int, *, waited_for: bool) -> None:
    """Download a model on local rank 0 of each node; the node's other ranks wait, and find it by :func:`model_folder`.

    Raises:
        InputError: as :func:`model_folder`; on the others, if local rank 0 failed or sent no heartbeat.
    """
    if not is_hub_name(path) or not waited_for:
        model_folder(path)
        return
    done = _marker(path)
    alive = done.with_suffix(".alive")
    if local_rank == 0:
        done.unlink(missing_ok=True)  # of an earlier start
        with heartbeat(alive):
            folder = model_folder(path)
        done.write_text(str(folder), encoding="utf-8")
        return
    monitor = HeartbeatMonitor(alive)
    while not done.is_file() or not (folder := Path(done.read_text(encoding="utf-8"))).is_dir():
        if failure := monitor.failure():
            raise InputError(f"local rank {local_rank} needs {path}, which local rank 0 downloads; {failure}")
        time.sleep(POLL_SECONDS)
    _folders[str(path), True] = folder


def require_can_upload(repo: str) -> None:
    """Check, without a connection, that an upload to ``repo`` can be tried at the end of a run.

    Raises:
        InputError: the hub is switched off, there is no token, or the name is not valid.
    """
    require(
        not constants.HF_HUB_OFFLINE, f"uploading to {repo} needs the hub, which HF_HUB_OFFLINE switches off"
    )
    token = huggingface_hub.get_token()
    require(
        token is not None,
        f"uploading to {repo} needs a token of the hub: run `hf auth login`, or set HF_TOKEN",
    )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' is no name of a repository: {one_line(error)}") from error


def upload(folder: Path, repo: str) -> str:
    """Upload a folder, creating a private repository if there is none; return the address of the result.

    Raises:
        OSError: it failed; says how to upload the folder later.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained by megatron_align")
        )
    except (OSError, HTTPError) as error:
        raise OSError(
            f"the model is complete in {folder}, but it could not be uploaded to {repo} ({one_line(error, 200)}): "
            f"run `hf upload {repo} {folder}`"
        ) from error


def _marker(path: str) -> Path:
    """Return a file on this node that says where local rank 0 of this launch has put a model."""
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
    )
    launch = [path, str(constants.HF_HUB_CACHE), *(os.environ.get(name, "") for name in names)]
    folder = Path(tempfile.gettempdir()) / f"megatron_align_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{hashlib.sha256(repr(launch).encode()).hexdigest()[:16]}.model"


def _download(path: str, weights: bool) -> Path:
    name = _NAME.fullmatch(path)
    assert name is not None, "is_hub_name holds"
    repo, revision = name["repo"], name["revision"]
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*_FILES, *(_WEIGHTS if weights else ())],
            ignore_patterns=list(_LEFT),
        )
    except GatedRepoError as error:
        raise InputError(
            f"'{path}' needs access to be granted on the hub: accept its licence there, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no folder '{path}' here, and no model of this name on the hub (private ones need `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"'{repo}' has no revision '{revision}' on the hub") from error
    except (OSError, HTTPError, HFValidationError) as error:
        reason = one_line(one_line(error).partition(" An error happened")[0], 200)
        raise InputError(
            f"no folder '{path}' here, and it cannot be downloaded ({reason}): where there is a connection run "
            f"`{command}`, and give the snapshot folder that it prints"
        ) from error
    return Path(folder)


def _require_no_cache_root(path: Path) -> None:
    """Refuse a folder of the hub's cache, whose model is in a snapshot below it."""
    if (path / "config.json").exists():
        return
    if (path / "snapshots").is_dir():
        snapshots = sorted((path / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime)
        found = (
            f"give its snapshot folder {snapshots[-1]}"
            if snapshots
            else "it holds no snapshot: download it again"
        )
        raise InputError(f"'{path}' is a model's cache of the Hugging Face hub, not the model: {found}")
    if path.name == "snapshots" and (path.parent / "refs").is_dir() and path.is_dir():
        _require_no_cache_root(path.parent)
    if models := sorted(path.glob("models--*")):
        names = [folder.name.removeprefix("models--").replace("--", "/") for folder in models]
        raise InputError(
            f"'{path}' is the cache of the Hugging Face hub: give one of its models by name, {listed(names)}"
        )
    if (path / "hub").is_dir() and next((path / "hub").glob("models--*"), None):
        _require_no_cache_root(path / "hub")
