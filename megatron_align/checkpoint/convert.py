"""Checkpoints from Hugging Face folders and back: weights only, one process that holds the whole model.

A model too large for one machine's memory has to be trained from its Hugging Face folder directly, where
each rank reads its own slices, and exported at the end of the run.
"""

from __future__ import annotations

import math
import os
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
from megatron_align.checkpoint.hf import DTYPES, HFWeights, check_weights, load_weights
from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape, rows
from megatron_align.model.policy import Policy, build_policy, transformer_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


def open_hf(folder: str | Path) -> tuple[HFWeights, ModelShape]:
    """Return a Hugging Face folder's weights and shape, having checked that they are of one model.

    Raises:
        InputError: they are not, or something is missing.
    """
    if not Path(folder).is_dir():
        raise InputError(f"a Hugging Face folder is needed, found none at {folder}")
    shape = read_shape(folder)
    weights = HFWeights(folder)
    check_weights(weights, shape)
    return weights, shape


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


def need_new(out: str | Path) -> Path:
    """Return ``out`` without links or dots, a folder that can be created or is empty.

    Raises:
        InputError: something is in the way, or its parent cannot be written.
    """
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"a new or empty folder is needed, found a file at {path}")
    need_writable(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"a new or empty folder is needed, found files in {path}")
    return path


def need_writable(path: Path) -> None:
    """Check, without a trace, that ``path`` can be created.

    Raises:
        InputError: its nearest parent that exists is no folder, or may not be written.
    """
    parent = path.resolve().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{path} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be created: {parent} may not be written")


def untied_head(weights: HFWeights, shape: ModelShape) -> float | None:
    """Return by how much an output head beside tied embeddings differs from them; None if it does not.

    transformers does not tie the two then, so the folder is not the model that its config.json describes.
    """
    if not shape.tied_embeddings or HEAD not in weights.names:
        return None
    embedding, head = read_whole(weights, EMBEDDING), read_whole(weights, HEAD)
    if embedding.shape != head.shape:
        return math.inf
    return None if same_bytes(embedding, head) else largest_difference(embedding, head)


def need_tied_head(weights: HFWeights, shape: ModelShape) -> None:
    """Refuse a folder whose output head differs from the embeddings that its config.json ties it to.

    Raises:
        InputError: saying by how much.
    """
    if (apart := untied_head(weights, shape)) is not None:
        raise InputError(
            f"{HEAD} must be absent or equal {EMBEDDING} where tie_word_embeddings is true, "
            f"it differs by {apart:.3g} in {weights.folder}"
        )


def read_whole(weights: HFWeights, name: str) -> Tensor:
    """Return a whole tensor of a Hugging Face folder."""
    return weights.read(name, 0, 0, weights.shape(name)[0])


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal in shape, dtype and every bit (NaN equals itself, 0 is not -0)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape; NaN if either holds one."""
    return (one.double() - other.double()).abs().max().item()


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
