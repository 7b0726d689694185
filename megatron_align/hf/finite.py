"""Count the non-finite weights of a model that is sharded over ranks, by Hugging Face tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_align.model.families import ModelShape, copy_segments, rows
from megatron_align.model.policy import Policy
from megatron_align.storage.tensor_digest import Counts, TensorDigest, add_counts, count_nonfinite


def find_nonfinite_weights(chunks: Sequence[Policy]) -> dict[str, TensorDigest]:
    """Return the tensors of a model that hold NaN or infinity, with their counts, on every rank; collective."""
    shape, groups = chunks[0].shape, chunks[0].pg_collection
    own: dict[str, Counts] = {}
    if groups.dp_cp.rank() == 0:  # the others hold the same weights
        local = {name: parameter for chunk in chunks for name, parameter in chunk.global_parameters().items()}
        own = count_of_rank(shape, local, groups.tp.rank(), groups.tp.size())
    found: list[dict[str, Counts]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    totals: dict[str, Counts] = {}
    for of_rank in found:
        for name, counts in of_rank.items():
            add_counts(totals, name, counts)
    return {name: TensorDigest("", *totals[name]) for row in rows(shape) for name in row.hf if name in totals}


def count_of_rank(
    shape: ModelShape, local: Mapping[str, Tensor], tensor_rank: int, tensor_ranks: int
) -> dict[str, Counts]:
    """Return the non-finite elements in one rank's parameters; each element of the model counts on one rank only."""
    totals: dict[str, Counts] = {}
    for row in rows(shape):  # without the copy of tied embeddings that the last stage holds
        parameter = local.get(row.megatron)
        if (
            parameter is None
            or (row.split is None and tensor_rank)
            or not any(count_nonfinite(parameter.detach()))
        ):
            continue
        for segment in copy_segments(row, shape, tensor_rank, tensor_ranks):
            part = segment.of_megatron(parameter.detach())
            if segment.name is not None and any(counts := count_nonfinite(part)):
                add_counts(totals, segment.name, counts)
    return totals
