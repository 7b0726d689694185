"""Build our model in one process, without a launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint.load import load_checkpoint
from megatron_align.config import ParallelConfig
from megatron_align.convert.open_checkpoint import Checkpoint
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, Row, to_megatron
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.storage.atomic_write import require_one_process


@contextmanager
def one_process() -> Iterator[ProcessGroupCollection]:
    """Create the process groups of a single process for a with-block.

    Raises:
        InputError: a launcher started several processes.
    """
    require_one_process()
    parallel.join(parallel.RankInfo.from_environment(), ParallelConfig())
    try:
        yield parallel.groups()
    finally:
        parallel.leave()


def empty_model(
    shape: ModelShape, dtype: torch.dtype, groups: ProcessGroupCollection, adapter: Adapter | None = None
) -> list[Policy]:
    """Build the complete model, with an adapter if there is one, with uninitialised weights."""
    return build_policy(transformer_config(shape, ParallelConfig(), dtype), shape, groups, adapter)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, groups: ProcessGroupCollection) -> list[Policy]:
    """Build the complete model in ``dtype`` with a checkpoint's weights."""
    chunks = empty_model(checkpoint.shape, dtype, groups)
    load_checkpoint(checkpoint.folder, chunks)
    return chunks


@torch.no_grad()
def fill_model(
    chunks: list[Policy], table: Iterable[Row], tensors: Callable[[Row], Mapping[str, Tensor]]
) -> None:
    """Fill parameters of the complete model in place, row by row.

    Args:
        chunks: of :func:`empty_model`, or with an adapter.
        table: rows of the parameters.
        tensors: returns the Hugging Face tensors of a row.
    """
    local = {name: p for chunk in chunks for name, p in chunk.global_parameters().items()}
    for row in table:
        local[row.megatron].copy_(to_megatron(row, tensors(row), chunks[0].shape))
