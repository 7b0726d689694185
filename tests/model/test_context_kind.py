"""``auto`` picks the kind of context parallelism that moves fewer bytes, of those whose heads divide; the byte counts
are those of the tensors that move."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.model.context_kind import (
    AttentionSplit,
    allgather_bytes,
    auto_context_kind,
    ulysses_bytes,
    ulysses_fits,
    ulysses_groups,
)


def moved(split, tokens, dtype):
    """Count by tensor, for one rank: (sent by ulysses, received by allgather), forward and as much backward."""
    t, others = tokens // split.context, split.context - 1
    heads, groups = split.heads // split.tensor, max(1, split.groups // split.tensor)
    repeated = math.lcm(groups, split.context)
    q, out = (torch.empty(t, heads, split.head_dim, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(t, repeated, split.head_dim, dtype=dtype, device="meta") for _ in range(2))
    sent = sum(x.nbytes * others // split.context for x in (q, k, v, out))  # a rank keeps its own part
    gathered = [torch.empty(t, groups, split.head_dim, dtype=dtype, device="meta").nbytes * others] * 2
    return 2 * sent, 2 * sum(gathered)


models = st.tuples(st.integers(1, 8), st.integers(1, 8))  # (KV heads, query heads of each)


@settings(derandomize=True, deadline=None)
@given(
    models, st.sampled_from([1, 2, 4]), st.integers(1, 16), st.sampled_from([torch.bfloat16, torch.float32])
)
def test_bytes_are_those_of_the_tensors(model, tensor, context, dtype):
    groups, each = model
    split = AttentionSplit(groups * each * tensor, groups, 64, tensor, context)
    tokens = 3 * context * context
    ours = tuple(count(split, tokens, dtype.itemsize) for count in (ulysses_bytes, allgather_bytes))
    assert ours == moved(split, tokens, dtype)


@settings(derandomize=True, deadline=None)
@given(models, st.sampled_from([1, 2, 4]), st.integers(1, 16))
def test_the_choice_fits_and_moves_no_more_than_the_other(model, tensor, context):
    groups, each = model
    split = AttentionSplit(groups * each * tensor, groups * tensor, 128, tensor, context)
    chosen = auto_context_kind(*split)
    sizes = {
        "ulysses": ulysses_bytes(split, 4096 * context**2, 2),
        "allgather": allgather_bytes(split, 4096 * context**2, 2),
    }
    if not ulysses_fits(split):
        assert chosen == "allgather"
    else:
        assert sizes[chosen] == min(sizes.values())
        assert ulysses_groups(split) % context == 0
        # replicated KV heads still divide the query heads
        assert split.local_heads % ulysses_groups(split) == 0


@pytest.mark.parametrize(
    "heads, groups, tensor, context, kind",
    [
        (28, 4, 1, 4, "allgather"),  # Qwen2-7B: 28 + 4 heads against 4 x 4
        (28, 4, 1, 8, "allgather"),  # 28 heads do not divide
        (32, 8, 1, 4, "allgather"),  # Llama-3-8B: 32 + 8 against 4 x 8
        (32, 8, 1, 8, "ulysses"),  # 32 + 8 against 8 x 8
        (64, 8, 8, 8, "allgather"),  # Llama-3-70B, one KV head a rank: 8 + 8 against 8 x 1
        (40, 40, 1, 2, "ulysses"),  # Baichuan2-13B: a tie
    ],
)
def test_models_people_have(heads, groups, tensor, context, kind):
    assert auto_context_kind(heads, groups, 128, tensor, context) == kind
