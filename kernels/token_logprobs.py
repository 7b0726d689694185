"""Log-probability of each target under ``softmax(hidden @ weight.T)``, without the ``[N, V]`` logits.

Shapes: N scored rows, H hidden, V vocabulary rows on this rank, n rows of one chunk.
Vocab-parallel: rank r of ``group`` holds vocabulary rows ``[r * V, (r + 1) * V)``.
Precision: GEMMs in the input dtype; softmax statistics and log-probs in fp32 at least; the weight's
gradient is summed over chunks in fp32. Backward recomputes the logits chunk by chunk (8 NHV in all).
The fused Triton engine is not written yet: every device runs this chunked PyTorch path.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of one chunk of logits: 64 MiB in fp32 on CPU, where small chunks stay in cache's reach; 2 GiB on
# GPU, where about 4,096 rows keep the GEMMs efficient.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29}


# 1. Reference: what the operation means. Runs anywhere; every test compares against it.
def token_logprobs_reference(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Full-logits log-softmax over the whole vocabulary on one rank, differentiable."""
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = (hidden_NH @ weight_VH.T).to(exact) / temperature
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]


# 2. Chunks: logits of a few rows at a time.
def _chunks(hidden_NH: Tensor, weight_VH: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS[hidden_NH.device.type] // max(1, weight_VH.shape[0]))
    return [slice(i, min(i + rows, hidden_NH.shape[0])) for i in range(0, hidden_NH.shape[0], rows)]


def _logits(hidden_nH: Tensor, weight_VH: Tensor, real_rows: int, temperature: float) -> Tensor:
    logits_nV = (hidden_nH @ weight_VH.T).to(torch.promote_types(hidden_nH.dtype, torch.float32))
    logits_nV[:, real_rows:] = float("-inf")
    return logits_nV if temperature == 1.0 else logits_nV.div_(temperature)


# 3. Autograd: logits made twice, never kept.
class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, group, temperature, vocab_size):  # noqa: PLR0913
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        rows = weight_VH.shape[0]
        real_rows = min(max(vocab_size - rank * rows, 0), rows)
        local_N = targets_N - rank * rows
        mine_N = (local_N >= 0) & (local_N < real_rows)
        local_N = local_N.where(mine_N, 0)

        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        max_N, sum_N, target_N = hidden_NH.new_empty(3, hidden_NH.shape[0], dtype=exact)
        for chunk in _chunks(hidden_NH, weight_VH):
            logits_nV = _logits(hidden_NH[chunk], weight_VH, real_rows, temperature)
            target_N[chunk] = logits_nV.gather(1, local_N[chunk, None])[:, 0]
            # A rank with padding rows only has no maximum; 0 keeps -inf - max away from NaN.
            max_N[chunk] = logits_nV.amax(1) if real_rows else 0.0
            sum_N[chunk] = logits_nV.sub_(max_N[chunk, None]).exp_().sum(1)
        target_N = target_N.where(mine_N, 0.0)
        if ranks > 1:
            local_max_N = max_N.clone()
            if not real_rows:
                max_N.fill_(float("-inf"))
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
            sum_N = sum_N * (local_max_N - max_N).exp() if real_rows else torch.zeros_like(sum_N)
            sums_2N = torch.stack([sum_N, target_N])
            dist.all_reduce(sums_2N, group=group)
            sum_N, target_N = sums_2N
        lse_N = max_N + sum_N.log()
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, mine_N, lse_N)
        ctx.group, ctx.ranks, ctx.temperature, ctx.real_rows = group, ranks, temperature, real_rows
        return target_N - lse_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_NH, weight_VH, local_N, mine_N, lse_N = ctx.saved_tensors
        grad_N = grad_N / ctx.temperature
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=lse_N.dtype)
        for chunk in _chunks(hidden_NH, weight_VH):
            # d logp / d logits = onehot(target) - softmax
            dlogits_nV = _logits(hidden_NH[chunk], weight_VH, ctx.real_rows, ctx.temperature)
            dlogits_nV.sub_(lse_N[chunk, None]).exp_().mul_(-grad_N[chunk, None])
            dlogits_nV.scatter_add_(1, local_N[chunk, None], (grad_N[chunk] * mine_N[chunk])[:, None])
            dlogits_nV = dlogits_nV.to(weight_VH.dtype)
            grad_hidden_NH[chunk] = dlogits_nV @ weight_VH
            grad_weight_VH += dlogits_nV.T @ hidden_NH[chunk]
        if ctx.ranks > 1:
            dist.all_reduce(grad_hidden_NH, group=ctx.group)
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


# 4. Public: the only name other modules import. Checks once, says what it needs.
def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Return the log-probability of each target, in nats.

    Args:
        hidden_NH: ``[N, H]``, the same on every rank of ``group``; its gradient is complete on each.
        weight_VH: ``[V, H]``, this rank's rows of the vocabulary projection, as many on every rank.
        targets_N: ``[N]`` int64 in ``[0, vocab_size)``; not checked on GPU, as that would synchronise.
        group: the vocab-parallel ranks; None: this rank has the whole vocabulary.
        temperature: the logits are divided by it.
        vocab_size: rows that count; rows from there on are padding. Default: all rows of all ranks.

    Returns:
        ``[N]`` fp32 (fp64 for fp64 inputs), not reduced. N = 0 is allowed.

    Raises:
        ValueError: on shapes or dtypes that do not fit, or, on CPU, targets outside the vocabulary.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        shapes = f"{tuple(hidden_NH.shape)} and {tuple(weight_VH.shape)}"
        raise ValueError(f"token_logprobs needs hidden [N, H] and weight [V, H]; got {shapes}")
    if hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(
            f"token_logprobs needs one dtype; got hidden {hidden_NH.dtype}, weight {weight_VH.dtype}"
        )
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"token_logprobs needs targets [N = {hidden_NH.shape[0]}]; got {tuple(targets_N.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"token_logprobs needs temperature > 0; got {temperature}")
    vocab_size = weight_VH.shape[0] * ranks if vocab_size is None else vocab_size
    if not 0 < vocab_size <= weight_VH.shape[0] * ranks:
        rows = weight_VH.shape[0] * ranks
        raise ValueError(
            f"token_logprobs needs 0 < vocab_size <= {rows} rows over {ranks} ranks; got {vocab_size}"
        )
    if targets_N.device.type == "cpu" and targets_N.numel():
        low, high = targets_N.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token_logprobs needs targets in [0, {vocab_size}); got {low.item()} to {high.item()}"
            )
    return _TokenLogprobs.apply(hidden_NH, weight_VH, targets_N, group, temperature, vocab_size)
