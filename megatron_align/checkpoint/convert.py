"""Checkpoints from Hugging Face folders and back: weights only, one process that holds the whole model.

A model too large for one machine's memory has to be trained from its Hugging Face folder directly, where
each rank reads its own slices, and exported at the end of the run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint import sharded
from megatron_align.checkpoint.export import export_model
from megatron_align.checkpoint.files import need_new
from megatron_align.checkpoint.hf import DTYPES, HFWeights, load_weights, need_tied_head, open_hf
from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, rows
from megatron_align.model.policy import Policy, build_policy, transformer_config


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found, and what its card says of the model."""

    folder: Path
    shape: ModelShape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}"

    @property
    def parameters(self) -> int:
        """Parameters of the model, without vocabulary padding."""
        return sum(math.prod(size) for row in rows(self.shape) for size in row.hf_shapes(self.shape))


def import_hf(hf: str | Path, out: str | Path, dtype: str | None = None) -> Checkpoint:
    """Turn a Hugging Face folder into a checkpoint.

    Args:
        hf: Hugging Face folder.
        out: becomes the checkpoint, whole or not at all; must be new or empty.
        dtype: what to cast the weights to (``"bfloat16"``); None keeps what they are stored in.

    Raises:
        InputError: the folder does not hold a model that we know, or ``out`` is in the way.
    """
    weights, shape = open_hf(hf)
    need_tied_head(weights, shape)
    kept = getattr(torch, dtype) if dtype else _one_dtype(weights, shape)
    target = need_new(out)
    card = sharded.make_card(0, shape, kept, world_size=1, source=str(hf))
    try:
        with one_process() as groups:
            chunks = empty_model(shape, kept, groups)
            load_weights(hf, shape, chunks[0].global_parameters(), 0, 1)
            sharded.save(target, chunks, None, card, Path(hf))
    except BaseException:
        shutil.rmtree(sharded.partial_folder(target), ignore_errors=True)
        raise
    return Checkpoint(target, shape, kept)


def export_hf(checkpoint: str | Path, out: str | Path) -> Checkpoint:
    """Turn a checkpoint into a Hugging Face folder, in the checkpoint's dtype; return what was exported.

    Args:
        checkpoint: a checkpoint, or a run's folder, of which the newest is taken.
        out: becomes the Hugging Face folder, whole or not at all; must be new or empty.

    Raises:
        InputError: there is no complete checkpoint, or ``out`` is in the way.
    """
    found = open_checkpoint(checkpoint)
    target = need_new(out)
    with one_process() as groups:
        chunks = load_model(found, found.dtype, groups)
        export_model(chunks, target, found.folder / sharded.ASSETS)
    return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint that ``path`` is, or the newest of a run's folder.

    Raises:
        InputError: there is none, or its parts contradict each other.
    """
    folder = sharded.find(path)
    if folder is None:
        raise InputError(
            f"a checkpoint (a folder with {sharded.CARD}), or a run's folder with a complete one, is needed, "
            f"found neither at {path}"
        )
    card, shape = sharded.read_card(folder), sharded.checkpoint_shape(folder)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if card.get("dtype") not in names:
        raise InputError(
            f"dtype must be one of {list(names)}, found {card.get('dtype')!r} in {folder / sharded.CARD}"
        )
    noted = card.get("shape")
    if not isinstance(noted, dict) or (apart := sharded.shape_differences(asdict(shape), noted)):
        facts = (
            ", ".join(f"{key} {theirs!r} for {ours!r}" for key, (ours, theirs) in apart.items())
            if noted
            else "none"
        )
        raise InputError(
            f"{sharded.CARD} must have the shape of {sharded.ASSETS}, it has {facts} in {folder}"
        )
    return Checkpoint(folder, shape, names[card["dtype"]])


def read_whole(weights: HFWeights, name: str) -> Tensor:
    """Return a whole tensor of a Hugging Face folder."""
    return weights.read(name, 0, 0, weights.shape(name)[0])


@contextmanager
def one_process() -> Iterator[ProcessGroupCollection]:
    """Give the process groups of a process that is alone, for the length of a with-block.

    Raises:
        InputError: a launcher started several.
    """
    place = parallel.Place.from_environment()
    if place.world_size != 1:
        raise InputError(f"conversion needs one process, without torchrun; got {place.world_size} ranks")
    parallel.join(
        place, ParallelConfig()
    )  # its watchdog never starts: nobody waits, and this may take an hour
    try:
        yield parallel.groups()
    finally:
        parallel.leave()


def empty_model(shape: ModelShape, dtype: torch.dtype, groups: ProcessGroupCollection) -> list[Policy]:
    """Build the whole model, weights uninitialised."""
    return build_policy(transformer_config(shape, ParallelConfig(), dtype), shape, groups)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, groups: ProcessGroupCollection) -> list[Policy]:
    """Build the whole model in ``dtype`` with a checkpoint's weights."""
    chunks = empty_model(checkpoint.shape, dtype, groups)
    sharded.load(checkpoint.folder, chunks)
    return chunks


def _one_dtype(weights: HFWeights, shape: ModelShape) -> torch.dtype:
    found: dict[str, list[str]] = {}
    for name in (name for row in rows(shape) for name in row.hf):
        found.setdefault(weights.dtype(name), []).append(name)
    if len(found) > 1:
        facts = ", ".join(
            f"{len(names)} {dtype} (such as {names[0]})" for dtype, names in sorted(found.items())
        )
        raise InputError(
            f"the tensors must share one dtype, or --dtype say one; found {facts} in {weights.folder}"
        )
    return DTYPES[next(iter(found))]
