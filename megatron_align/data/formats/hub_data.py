"""Data sets of the Hugging Face hub (``hf://OWNER/NAME``, a file, folder or pattern in it), downloaded or cached."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from megatron_align.errors import InputError, one_line

PREFIX = "hf://"
_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?"
)
_SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


@cache
def local_path(source: str, suffixes: tuple[str, ...]) -> str:
    """Return the path on this machine of a source on the hub: a file, folder or pattern of its snapshot.

    Args:
        source: ``hf://OWNER/NAME``, with ``@REVISION``, and ``/PATH`` for a part of the data set.
        suffixes: of the data files that are downloaded.

    Raises:
        InputError: for another form, a data set that cannot be downloaded, or several splits.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    name = _NAME.fullmatch(source)
    if name is None:
        raise InputError(
            f"{source}: must be hf://OWNER/NAME, or hf://OWNER/NAME/PATH for a part of the data set"
        )
    repo, revision, part = name["repo"], name["revision"], (name["path"] or "").strip("/")
    one_file = part.endswith(suffixes) or "*" in part
    patterns = [part] if one_file else [f"{part}/*{end}" if part else f"*{end}" for end in suffixes]
    try:
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{source}: the hub has no data set of this name (private or gated ones need `hf auth login`)"
        ) from error
    except (OSError, HTTPError, HFValidationError) as error:
        reason = one_line(error, 200)
        raise InputError(
            f"{source}: cannot be downloaded ({reason}): where there is a connection run `hf download --repo-type "
            f"dataset {repo}`, and give the folder that it prints"
        ) from error
    path = Path(folder) / part
    if not one_file and _split_of(part) is None:
        _require_one_split(source.rstrip("/"), path, suffixes)
    return str(path)


def _split_of(path: str) -> str | None:
    """Return the split that a word of a path within the data set names; None: no word does."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _require_one_split(source: str, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Check that the data files below a folder, whose own name says nothing, are of one split."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.endswith(suffixes):
            name = str(file.relative_to(folder))
            if (split := _split_of(name)) is not None:
                found.setdefault(split, name)
    if len(found) > 1:
        files = ", ".join(f"{source}/{file}" for file in found.values())
        raise InputError(
            f"{source}: must be one split, found {', '.join(found)}; name its files, for example {files} "
            "(a pattern with * works too)"
        )
