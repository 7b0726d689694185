"""The slab loop of a training loss: project a slab, evaluate the loss on it, accumulate its gradients, next slab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_align.kernels.token_logprobs.gradients import Gradients
from megatron_align.kernels.token_logprobs.options import combine_sums
from megatron_align.kernels.token_logprobs.reference import SlabFunction
from megatron_align.kernels.token_logprobs.slab import Slab, chunks, slab_rows
from megatron_align.kernels.token_logprobs.vocab_parallel_softmax import (
    RowStatistics,
    overwrite_by_dlogits,
    row_statistics,
)
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard

RECOMPUTED = "recomputed_samples"  # key among a loss's sums: number of slabs longer than the limit


@dataclass(slots=True, eq=False)
class SlabLossCall:
    """One call of :func:`slab_loss`; ``sums`` is filled by :func:`run_slabs`."""

    shard: VocabShard
    targets_N: Tensor
    slabs: Sequence[tuple[int, int]]
    loss: SlabFunction
    training: bool
    statistics: bool
    entropy_gradient: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)


def check_slabs(slabs: Sequence[tuple[int, int]], rows: int) -> None:
    """Check that slabs cover all rows, in order and without gaps.

    Raises:
        ValueError: naming the first slab that does not start where the previous one stopped.
    """
    at = 0
    for i, (start, stop) in enumerate(slabs):
        if start != at or stop < start:
            raise ValueError(
                f"slab {i} must start at row {at} and must not stop before it; got {start} to {stop}"
            )
        at = stop
    if at != rows:
        raise ValueError(f"slabs must cover N = {rows} rows; they cover {at}")


def run_slabs(
    call: SlabLossCall, hidden_NH: Tensor, weight_VH: Tensor, gradients: Gradients | None
) -> Tensor:
    """Return the summed loss of all slabs, a scalar, adding their gradients to ``gradients`` if given."""
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    total = torch.zeros((), dtype=exact, device=hidden_NH.device)
    most = slab_rows(weight_VH)
    longest = max((stop - start for start, stop in call.slabs), default=0)
    slab = Slab(call.shard, min(most, longest))
    recomputed = 0
    for i in range(len(call.slabs)):
        pieces = chunks(*call.slabs[i], most)
        total += _run_slab(call, i, pieces, slab, hidden_NH, gradients)
        recomputed += gradients is not None and len(pieces) > 1
    call.sums[RECOMPUTED] = torch.full((), float(recomputed), device=hidden_NH.device)
    return total


def _run_slab(
    call: SlabLossCall,
    i: int,
    pieces: list[slice],
    slab: Slab,
    hidden_NH: Tensor,
    gradients: Gradients | None,
) -> Tensor:
    """Return slab ``i``'s loss; add its sums to the call's and its gradients to ``gradients``."""
    shard = call.shard
    per_piece = []
    for rows in pieces:
        local_n = shard.local_targets(call.targets_N[rows])
        logits_nV = slab.project(hidden_NH[rows])
        per_piece.append(row_statistics(logits_nV, local_n, shard, more=call.statistics))
    value, grad_n, entropy_grad_n = _evaluate(call, i, per_piece, gradients is not None)
    if gradients is None or grad_n is None:
        return value
    # In reverse: the last piece's logits are still in the buffer, so a slab of one piece is projected only once.
    for rows, statistics in zip(reversed(pieces), reversed(per_piece), strict=True):
        local_n = shard.local_targets(call.targets_N[rows])
        if rows is not pieces[-1]:
            logits_nV = slab.project(hidden_NH[rows])
        piece = slice(rows.start - pieces[0].start, rows.stop - pieces[0].start)
        of_entropy_n = None if entropy_grad_n is None else entropy_grad_n[piece]
        overwrite_by_dlogits(logits_nV, local_n, grad_n[piece], statistics, shard, of_entropy_n)
        gradients.add(rows, logits_nV, hidden_NH[rows], shard.hidden_grad_group)
    return value


def _evaluate(
    call: SlabLossCall, i: int, per_piece: list[RowStatistics], training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Evaluate the loss on slab ``i``; return its value and, in training, the gradients of log-probs and entropies."""
    logprob_n = torch.cat([statistics.logprob_n for statistics in per_piece])
    names = per_piece[0].extra
    extra = {name: torch.cat([statistics.extra[name] for statistics in per_piece]) for name in names}
    inputs = [logprob_n, *([extra["entropy"]] if call.entropy_gradient else [])]
    gradients: list[Tensor | None] = [None, None]
    with torch.set_grad_enabled(training):
        for each_n in inputs:
            each_n.requires_grad_(training)
        value, sums = call.loss(i, logprob_n, extra)
        if training:
            gradients[: len(inputs)] = [torch.zeros_like(each_n) for each_n in inputs]
            if value.requires_grad:  # false if the slab has no rows or the loss ignores them
                gradients[: len(inputs)] = torch.autograd.grad(
                    value, inputs, allow_unused=True, materialize_grads=True
                )
    for name, amount in sums.items():
        found = call.sums.get(name)
        call.sums[name] = amount.detach() if found is None else combine_sums(name, found, amount.detach())
    return value.detach(), gradients[0], gradients[1]
