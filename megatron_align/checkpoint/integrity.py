"""Check the files of a checkpoint against its checksums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch.distributed as dist

from megatron_align.errors import InputError, listed
from megatron_align.storage.checksums import (
    CorruptChecksums,
    HashWhileReading,
    find_mismatches,
    read_checksums,
    verifying_checksums,
)


def find_corrupt_files(folder: Path, *, quick: bool = False) -> list[str]:
    """Return one line for each file of a checkpoint that is missing or corrupt; none: the checkpoint is intact.

    With process groups, every rank calls this: each hashes its share of the files, all get the same lines.

    Args:
        folder: of the checkpoint.
        quick: each process by itself; files with tensors are only checked for existence.
    """
    alone = quick or not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    try:
        checksums = read_checksums(folder)
        unhashed = {name for name in checksums if name.endswith(".distcp")} if quick else set()
        lines = find_mismatches(folder, sorted(checksums.keys() - unhashed)[rank::ranks], checksums)
        lines += [f"{folder / name} is missing" for name in sorted(unhashed) if not (folder / name).is_file()]
    except CorruptChecksums as error:
        lines = [str(error)]
    if alone:
        return lines
    lines_of_ranks: list[list[str]] = [[]] * ranks
    dist.all_gather_object(lines_of_ranks, lines)
    return sorted(set(chain.from_iterable(lines_of_ranks)))


def require_intact(folder: Path) -> None:
    """Check that a checkpoint's files match their checksums; see :func:`find_corrupt_files` for who calls it.

    Raises:
        InputError: naming the files that do not.
    """
    _raise_if_corrupt(find_corrupt_files(folder))


@contextmanager
def verifying_while_reading(
    folder: Path, hashed_by_block: Iterable[Path] = ()
) -> Iterator[dict[Path, HashWhileReading]]:
    """Check a checkpoint's files while a with-block reads them, in one process.

    The block gets the hashes of the files in ``hashed_by_block``, most of which it reads itself, and adds what it
    reads to them. Corruption is reported when the block ends, also where it fails, since corrupt data can make it
    fail: use this only for work that is discarded on an exception.

    Raises:
        InputError: naming the files that do not match their checksums.
    """
    try:
        checksums = read_checksums(folder)
    except CorruptChecksums as error:
        _raise_if_corrupt([str(error)])
    hashes = {p: HashWhileReading(p) for p in hashed_by_block if str(p.relative_to(folder)) in checksums}
    with verifying_checksums(folder, sorted(checksums), checksums, hashes) as wait:
        try:
            yield hashes
        except OSError:  # a full disk must not wait for the checksums
            raise
        except Exception:  # a corrupt pickle can raise anything
            _raise_if_corrupt(wait())
            raise
        _raise_if_corrupt(wait())


def _raise_if_corrupt(lines: list[str]) -> None:
    if lines:
        raise InputError(f"checkpoint is corrupt: {listed(lines, '; ')}")
