"""Export the model that all ranks hold as one Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.errors import TrainingFault
from megatron_align.hf.assets import AssetChanges, write_assets, write_config_dtype
from megatron_align.hf.model_card import CARD
from megatron_align.hf.writer import ShardWriter, hf_specs
from megatron_align.model.families import Row, rows, to_hf
from megatron_align.model.lora import merged
from megatron_align.model.policy import Policy
from megatron_align.storage.tensor_digest import TensorDigest, count_nonfinite, describe_nonfinite


@torch.no_grad()
def export_model(
    chunks: list[Policy],
    folder: Path,
    assets: Path,
    overwrite: bool = False,
    changes: AssetChanges = AssetChanges(),  # noqa: B008 - immutable
    readme: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder, an adapter merged; every rank calls this, rank 0 writes.

    Tensors keep the model's dtype, which config.json then states. Rank 0 holds the HF tensors of one row of the
    weight table at a time. The write is atomic.

    Args:
        chunks: this rank's chunks.
        folder: to be written.
        assets: HF folder to copy config, generation config and tokenizer from.
        overwrite: replace an existing folder.
        changes: of training in the copied files.
        readme: text of the model card, README.md; None: none is written.

    Raises:
        InputError: the folder exists and ``overwrite`` is not set.
        TrainingFault: on every rank: the weights are not finite; nothing is written.
    """
    shape = chunks[0].shape
    fault: list[str | None] = [None]
    if chunks[0].pg_collection.dp_cp.rank() == 0:
        dtype = chunks[0].config.params_dtype
        specs, writes = hf_specs(shape, dtype), dist.get_rank() == 0
        with (
            suppress(_NotFinite),
            ShardWriter(folder, specs, overwrite=overwrite) if writes else nullcontext() as writer,
        ):
            fault[0] = _write_tensors(chunks, writer)
            if fault[0]:
                raise _NotFinite  # the writer leaves no trace
            if writer:
                write_assets(assets, writer.partial, shape, changes)
                write_config_dtype(writer.partial, dtype)
                if readme is not None:
                    (writer.partial / CARD).write_text(readme, encoding="utf-8")
    dist.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise TrainingFault(
            f"the trained weights are not finite, no Hugging Face folder was written: {fault[0]}; start from an older "
            "checkpoint, with a smaller optimizer.lr"
        )


def _write_tensors(chunks: list[Policy], writer: ShardWriter | None) -> str | None:
    """Collect and write all tensors; return what is not finite in them, where this rank writes.

    Called by the ranks of the first data- and context-parallel rank.
    """
    local: dict[str, Tensor] = {
        name: parameter for chunk in chunks for name, parameter in chunk.base_parameters().items()
    }
    adapters = {name: adapter for chunk in chunks for name, adapter in chunk.layer_adapters().items()}
    owners = owning_stages(set(local), chunks[0].pg_collection.pp)
    nonfinite: dict[str, TensorDigest] = {}
    for row in rows(chunks[0].shape):
        shard = local.get(row.megatron)
        if shard is not None:
            shard = merged(shard, adapters.get(row.megatron))
        tensors = collect(row, shard, owners[row.megatron], chunks[0])
        if writer:
            for name, tensor in tensors.items():
                nonfinite[name] = TensorDigest("", *count_nonfinite(tensor))
                writer.write(name, tensor)
    return describe_nonfinite(nonfinite)


class _NotFinite(Exception):
    """Ends the writing of weights that are not finite."""


def owning_stages(names: set[str], pipeline: dist.ProcessGroup) -> dict[str, int]:
    """Return the first pipeline stage that holds each tensor."""
    held: list[set[str]] = [set()] * pipeline.size()
    dist.all_gather_object(held, names, group=pipeline)
    return {name: stage for stage in reversed(range(pipeline.size())) for name in held[stage]}


def collect(row: Row, shard: Tensor | None, owner: int, chunk: Policy) -> dict[str, Tensor]:
    """Return the row's HF tensors on rank 0; other ranks send their shards and return nothing of use."""
    tensor, pipeline = chunk.pg_collection.tp, chunk.pg_collection.pp
    tensors: dict[str, Tensor] = {}
    if pipeline.rank() == owner:
        assert shard is not None
        shard = shard.detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(tensor.size())]
        dist.all_gather(shards, shard, group=tensor)
        if tensor.rank() == 0:
            tensors = to_hf(row, shards, chunk.shape)
    if owner == 0 or tensor.rank() != 0:
        return tensors
    stages = dist.get_process_group_ranks(pipeline)
    if pipeline.rank() == owner:
        for sent in tensors.values():
            dist.send(sent, stages[0], group=pipeline)
    elif pipeline.rank() == 0:
        like = next(chunk.parameters())
        for name, size in zip(row.hf, row.hf_shapes(chunk.shape), strict=True):
            tensors[name] = torch.empty(size, dtype=like.dtype, device=like.device)
            dist.recv(tensors[name], stages[owner], group=pipeline)
    return tensors
