"""packed_attention equals its dense-mask reference in float64, isolates documents bit for bit, a shared prompt
equals its copies, and ranks that share the queries compute together what one computes alone.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.kernels import PackedLayout, packed_attention, packed_attention_reference

DOCUMENTS = PackedLayout.from_lengths([1, 2, 17, 33, 0, 65], total=128)
GROUPS = PackedLayout.from_groups([(7, [5, 0, 12]), (0, [9]), (4, []), (3, [1, 1, 1])], total=50)


def inputs(tokens, heads, groups, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, dim), (tokens, groups, dim), (tokens, groups, dim))
    return [
        torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes
    ]


def run(function, tensors, layout, grad, **options):
    out = function(*tensors, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


@pytest.mark.parametrize("layout", [DOCUMENTS, GROUPS], ids=["documents", "groups"])
@pytest.mark.parametrize("heads, groups, dim", [(4, 4, 32), (4, 1, 64), (8, 2, 5)])
def test_matches_reference_in_float64(layout, heads, groups, dim):
    tensors = inputs(layout.tokens, heads, groups, dim, torch.float64)
    grad = torch.randn(layout.tokens, heads, dim, dtype=torch.float64)
    for options in ({}, {"scale": 0.3}):
        got, want = (
            run(f, tensors, layout, grad, **options) for f in (packed_attention, packed_attention_reference)
        )
        for got_t, want_t in zip(got, want, strict=True):
            torch.testing.assert_close(got_t, want_t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_error_is_within_that_of_the_same_dtype_reference(dtype, slack):
    low = inputs(GROUPS.tokens, 8, 2, 64, dtype)
    exact = [t.detach().double().requires_grad_() for t in low]
    grad = torch.randn(GROUPS.tokens, 8, 64, dtype=torch.float64)
    truth = run(packed_attention_reference, exact, GROUPS, grad)
    same = run(packed_attention_reference, low, GROUPS, grad)
    got = run(packed_attention, low, GROUPS, grad)
    for got_t, same_t, truth_t in zip(got, same, truth, strict=True):
        allowed = (same_t - truth_t).abs().max() + slack * truth_t.abs().max()
        assert (got_t - truth_t).abs().max() <= allowed


def test_isolation_is_bit_exact():
    """Law 5: what one document holds changes nothing in the others."""
    q, k, v = inputs(DOCUMENTS.tokens, 4, 2, 32, torch.float32)
    before = packed_attention(q, k, v, DOCUMENTS)
    with torch.no_grad():
        for x in (q, k, v):
            x[3:20] += 1.0  # the document of 17 tokens
    after = packed_attention(q, k, v, DOCUMENTS)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[20:], after[20:])
    assert not torch.equal(before[3:20], after[3:20])


def test_a_shared_prompt_equals_its_copies():
    prompt, completions = 7, [5, 12]
    shared = PackedLayout.from_groups([(prompt, completions)])
    copies = PackedLayout.from_lengths([prompt + c for c in completions])
    rows = torch.cat([torch.arange(12), torch.arange(7), torch.arange(12, 24)])  # copy <- shared
    q, k, v = inputs(shared.tokens, 4, 2, 16, torch.float64)
    got = packed_attention(q, k, v, shared)
    want = packed_attention(q[rows], k[rows], v[rows], copies)
    torch.testing.assert_close(got[rows], want)
    weight = torch.randn_like(want)
    summed = torch.zeros_like(got).index_add(0, rows, weight)
    got_grads = torch.autograd.grad(got, (q, k, v), summed)
    want_grads = torch.autograd.grad(want, (q, k, v), weight)  # indexing sums over the copies
    for got_g, want_g in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_g, want_g)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_queries_add_up_to_all(ranks):
    """Out and dq row by row, dk and dv as sums over the ranks; each share equals the reference."""
    tensors = inputs(GROUPS.tokens, 4, 2, 8, torch.float64)
    grad = torch.randn(tensors[0].shape, dtype=torch.float64)
    whole = run(packed_attention, tensors, GROUPS, grad)
    owner = torch.randint(ranks, (GROUPS.tokens,), generator=torch.Generator().manual_seed(ranks))
    got = [torch.zeros_like(x) for x in whole]
    for rank in range(ranks):
        rows = (owner == rank).nonzero().flatten()
        share = GROUPS.for_queries(rows)
        mine = [tensors[0][rows], *tensors[1:]]
        parts = run(packed_attention, mine, share, grad[rows])
        for part, want in zip(parts, run(packed_attention_reference, mine, share, grad[rows]), strict=True):
            torch.testing.assert_close(part, want, rtol=1e-10, atol=1e-12)
        for total, part, at in zip(got, parts, (rows, rows, slice(None), slice(None)), strict=True):
            total[at] += part
    for got_t, want_t in zip(got, whole, strict=True):
        torch.testing.assert_close(got_t, want_t, rtol=1e-10, atol=1e-12)


def test_padding_sees_itself_only():
    q, k, v = inputs(DOCUMENTS.tokens, 2, 2, 8, torch.float32)
    out = packed_attention(q, k, v, DOCUMENTS)
    assert torch.equal(out[118:], v[118:])
    rows = torch.tensor([4, 117, 119, 127])
    some = packed_attention(q[rows], k, v, DOCUMENTS.for_queries(rows))
    assert torch.equal(some[2:], v[rows[2:]])
    torch.testing.assert_close(some[:2], out[rows[:2]])


def test_intervals_say_what_the_groups_say():
    layout = PackedLayout.from_groups([(2, [1, 2]), (0, [2])], total=9)
    assert layout.prefix_start_Q.tolist() == [0, 0, 0, 0, 0, 5, 5, 7, 8]
    assert layout.prefix_end_Q.tolist() == [0, 0, 2, 2, 2, 5, 5, 7, 8]
    assert layout.own_start_Q.tolist() == [0, 0, 2, 3, 3, 5, 5, 7, 8]
    assert layout.seen_end_T.tolist() == [5, 5, 3, 5, 5, 7, 7, 8, 9]
    assert {t.dtype for t in layout.intervals} == {torch.int32}
    assert layout.mask_QT().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]


def test_a_share_by_hand():
    share = PackedLayout.from_groups([(2, [1, 2]), (0, [2])], total=9).for_queries(torch.tensor([1, 4, 5, 7]))
    assert (share.queries, share.tokens) == (4, 9)
    assert share.prefix_start_Q.tolist() == [0, 0, 5, 7]
    assert share.prefix_end_Q.tolist() == [0, 2, 5, 7]
    assert share.own_start_Q.tolist() == [0, 3, 5, 7]
    assert share.own_end_Q.tolist() == [2, 5, 6, 8]
    assert share.seen_start_T.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4]
    assert share.seen_end_T.tolist() == [2, 2, 1, 2, 2, 3, 3, 4, 4]
    assert {t.dtype for t in share.intervals} == {torch.int32}


@pytest.mark.parametrize(
    "positions, message",
    [
        ([0, 2, 2], "got 2 in row 2"),
        ([3, 1], "got 1 in row 1"),
        ([-1, 1], "got -1 in row 0"),
        ([1, 6], r"ascend within \[0, 6\); got 6 in row 1"),
    ],
    ids=str,
)
def test_positions_that_do_not_ascend_in_the_pack_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_lengths([6]).for_queries(torch.tensor(positions))


def test_a_share_of_a_share_is_refused():
    share = PackedLayout.from_lengths([6]).for_queries(torch.arange(3))
    with pytest.raises(ValueError, match="layout of an entire pack; got one for 3 of 6 queries"):
        share.for_queries(torch.arange(2))


def test_empty_layout():
    assert PackedLayout.from_lengths([]).tokens == 0
    q, k, v = inputs(3, 2, 1, 4, torch.float32)
    assert torch.equal(packed_attention(q, k, v, PackedLayout.from_lengths([], total=3)), v.expand(3, 2, 4))


@pytest.mark.parametrize(
    "make", [lambda: PackedLayout.from_lengths([-1]), lambda: PackedLayout.from_groups([(2, [-3])])]
)
def test_negative_lengths_are_refused(make):
    with pytest.raises(ValueError, match="lengths >= 0; got -"):
        make()


def test_a_total_too_small_is_refused():
    with pytest.raises(ValueError, match="total 4, sum 5"):
        PackedLayout.from_lengths([5], total=4)


def q_k_v(q=(6, 4, 8), k=(6, 2, 8), v=(6, 2, 8)):
    return [torch.zeros(s) for s in (q, k, v)]


BAD = {
    "rank": (q_k_v(q=(6, 32)), 6, r"q \[Q, H, D\]"),
    "dims": (q_k_v(q=(6, 4, 4)), 6, r"q \[Q, H, D\]"),
    "values": (q_k_v(v=(6, 1, 8)), 6, r"q \[Q, H, D\]"),
    "heads": (q_k_v(q=(6, 3, 8)), 6, "H 3, G 2"),
    "dtype": ([*q_k_v()[:2], torch.zeros(6, 2, 8, dtype=torch.float16)], 6, "one dtype"),
    "tokens": (q_k_v(), 5, "Q = 6 queries over T = 6 tokens; it has 5 over 5"),
    "stride": ([torch.zeros(6, 8, 4).transpose(1, 2), *q_k_v()[1:]], 6, "last dimension contiguous"),
}


@pytest.mark.parametrize("tensors, tokens, message", BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_refused(tensors, tokens, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*tensors, PackedLayout.from_lengths([tokens]))


@pytest.mark.parametrize("queries, tokens", [(5, 6), (3, 5), (6, 6)])
def test_queries_and_keys_that_are_not_the_layouts_are_refused(queries, tokens):
    share = PackedLayout.from_lengths([6]).for_queries(torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=f"Q = {queries} queries over T = {tokens} tokens; it has 3 over 6"):
        packed_attention(*q_k_v((queries, 4, 8), (tokens, 2, 8), (tokens, 2, 8)), share)


def test_a_layout_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"device cpu; it is on meta: use layout.to\(device\)"):
        packed_attention(*q_k_v(), PackedLayout.from_lengths([6]).to("meta"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="scale > 0; got"):
        packed_attention(*q_k_v(), PackedLayout.from_lengths([6]), scale=scale)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 7), max_size=3)), max_size=4),
    st.integers(0, 3),
)
@settings(derandomize=True, deadline=None)
def test_intervals_by_query_and_by_key_agree(groups, padding):
    """Token k is seen by the rows [seen_start_k, seen_end_k), without a gap: the block map stands on this."""
    used = sum(prompt + sum(completions) for prompt, completions in groups)
    layout = PackedLayout.from_groups(groups, total=used + padding)
    every_third = [layout.for_queries(torch.arange(layout.tokens)[start::3]) for start in range(3)]
    for some in (layout, *every_third):
        row = torch.arange(some.queries)[:, None]
        by_key = (some.seen_start_T <= row) & (row < some.seen_end_T)
        assert torch.equal(some.mask_QT(), by_key)
