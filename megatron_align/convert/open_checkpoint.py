"""Open a checkpoint for reading, in one process: its folder, model shape and dtype, and its tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_align.checkpoint.card import (
    checkpoint_shape,
    critic_shape,
    metadata_of_critic,
    read_checkpoint_metadata,
    require_all_weights,
    shape_differences,
)
from megatron_align.checkpoint.folder import ASSETS, CARD, STATE, find_checkpoint
from megatron_align.checkpoint.torch_metadata import CRITIC
from megatron_align.convert.state_reader import StateReader
from megatron_align.errors import InputError, listed
from megatron_align.hf.safetensors import DTYPES
from megatron_align.model.families import ModelShape, rows


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, and the shape and dtype of its model, or of its critic."""

    folder: Path
    shape: ModelShape
    dtype: torch.dtype
    of_critic: bool = False

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}"

    @property
    def parameters(self) -> int:
        """Number of parameters, without vocabulary padding."""
        return sum(math.prod(size) for row in rows(self.shape) for size in row.hf_shapes(self.shape))


def open_checkpoint(path: str | Path, *, critic: bool = False) -> Checkpoint:
    """Return the checkpoint at ``path``, or the newest of a run's folder.

    Args:
        path: of either.
        critic: open the critic in place of the policy, of which an adapter may be all that is stored.

    Raises:
        InputError: there is none, its files contradict each other, or it has no critic.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise InputError(f"neither a checkpoint (a folder with {CARD}) nor a run's folder with one: {path}")
    metadata, shape = read_checkpoint_metadata(folder), checkpoint_shape(folder)
    if critic:
        metadata_of_critic(metadata)
    else:
        require_all_weights(folder)
    dtype = model_dtype(folder)
    stored = metadata.get("shape")
    if not isinstance(stored, dict) or (differences := shape_differences(asdict(shape), stored)):
        listed = (
            ", ".join(f"{key} {theirs!r} instead of {ours!r}" for key, (ours, theirs) in differences.items())
            if stored
            else "no shape"
        )
        raise InputError(f"{CARD} does not match {ASSETS}/config.json: {listed} in {folder}")
    if critic:
        return Checkpoint(folder, critic_shape(metadata, shape), dtype, of_critic=True)
    return Checkpoint(folder, shape, dtype)


def model_dtype(checkpoint: Path) -> torch.dtype:
    """Return the dtype of a checkpoint's model.

    Raises:
        InputError: its metadata state none that is known.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if (name := read_checkpoint_metadata(checkpoint)["dtype"]) not in known:
        raise InputError(f"dtype must be one of {list(known)}, found {name!r} in {checkpoint / CARD}")
    return known[name]


def open_state(checkpoint: Checkpoint) -> StateReader:
    """Return a reader of a checkpoint's weights; checksums are not verified here.

    Raises:
        InputError: the weights are incomplete, or do not match the checkpoint's metadata.
    """
    folder = checkpoint.folder / STATE
    state = StateReader(folder, checkpoint.shape, prefix=CRITIC if checkpoint.of_critic else "")
    stored = {row.megatron: state.dtype(row) for row in rows(checkpoint.shape)}
    if wrong := [f"{name} is {_name(dtype)}" for name, dtype in stored.items() if dtype != checkpoint.dtype]:
        raise InputError(
            f"checkpoint tensors must be {_name(checkpoint.dtype)} ({CARD}); found {listed(wrong)} in {folder}"
        )
    return state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
