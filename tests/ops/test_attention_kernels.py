"""The Triton kernels equal dense-mask attention in float64, forward and gradients, within what the dtype allows.

Error rule: at most the error of the reference in the same dtype, plus slack in rounding units of the dtype at the size
of the largest value. 16 bit: one, as softmax weights and their gradients are rounded on their way to the tensor cores,
where the reference keeps fp32. fp32: 16, as backward makes softmax again as exp2(score - log-sum-exp), a difference of
numbers of size 2 to 16 whose rounding is the weight's relative error. On a GPU the tuned tiles are judged, in the
interpreter small ones.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.kernels import PackedLayout, packed_attention, packed_attention_reference
from megatron_align.kernels.packed_attention.autograd import attend
from megatron_align.kernels.packed_attention.tiles import Tile, Tiles
from tests.harness.interpreter import DEVICE, DTYPES, GPU
from tests.harness.marks import mark_slow

pytestmark = pytest.mark.triton

DOCUMENTS = PackedLayout.from_lengths([203, 113], total=330)
SHORT = PackedLayout.from_lengths([1, 2, 17, 33, 0, 65], total=128)
GROUPS = PackedLayout.from_groups(
    [(70, [5, 0, 33]), (0, [9]), (4, []), (3, [1, 1, 1]), (40, [30, 50]), (0, [0])], total=256
)
LONG = PackedLayout.from_lengths([1024])
# What one of two context-parallel ranks holds, once in complete blocks of 32 and once in single rows.
STRETCHES = GROUPS.for_queries(torch.arange(256).view(-1, 2, 32)[:, 1].flatten())
CRUMBS = DOCUMENTS.for_queries(torch.arange(330).view(-1, 2, 5)[:, 0].flatten())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that a kernel that leaves a hole fails its test."""

    def poison(make):
        return lambda *args, **options: make(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def tiles(queries, keys):
    """Return tiles for the interpreter, uneven the other way round where keys collect gradients."""
    return Tiles(Tile(queries, keys, 4, 1), Tile(queries, keys, 4, 1), Tile(keys, queries, 4, 1))


def inputs(tokens, heads, groups, dim, dtype=torch.float32, queries=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens if queries is None else queries, heads, dim), *[(tokens, groups, dim)] * 2]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def kernels(q, k, v, layout, blocks=(64, 64)):
    if GPU:
        return packed_attention(q, k, v, layout)
    return attend(q, k, v, layout, q.shape[-1] ** -0.5, tiles(*blocks))


def run(function, tensors, layout, grad, *options):
    out = function(*tensors, layout, *options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def assert_within_budget(tensors, layout, blocks):
    layout = layout.to(DEVICE)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, tensors[0].dtype
    )
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = run(packed_attention_reference, exact, layout, grad)
    same = run(packed_attention_reference, tensors, layout, grad)
    got = run(kernels, tensors, layout, grad, blocks)
    # Where every token sees only itself, dq and dk are differences of equal numbers: exactly 0 in the references, whose
    # softmax subtracts a number from itself, and rounding of dO v - dO out (times k) in the kernels.
    q, k, v = exact
    cancelling = grad.abs().max() * v.abs().max() * k.abs().max() * q.shape[-1] ** 0.5
    slack = torch.finfo(tensors[0].dtype).eps * (16 if tensors[0].dtype == torch.float32 else 1)
    for name, got_t, same_t, truth_t in zip(("out", "dq", "dk", "dv"), got, same, truth, strict=True):
        error = (got_t - truth_t).abs().max().item()
        allowed = ((same_t - truth_t).abs().max() + slack * (truth_t.abs().max() or cancelling)).item()
        assert error <= allowed, f"{name}: error {error:.2e} > allowed {allowed:.2e}"


CASES = {
    "documents H2:2 D32": (DOCUMENTS, 2, 2, 32, (64, 32)),
    "short H8:1 D64": (SHORT, 8, 1, 64, (64, 64)),
    "groups H4:1 D128": (GROUPS, 4, 1, 128, (32, 64)),
    "groups H2:2 D64": (GROUPS, 2, 2, 64, (64, 64)),
    "groups H2:1 D80": (GROUPS, 2, 1, 80, (128, 64)),
    "long H1:1 D64": (LONG, 1, 1, 64, (128, 128)),
    "some queries H4:2 D64": (STRETCHES, 4, 2, 64, (32, 64)),
    "crumbs H2:1 D32": (CRUMBS, 2, 1, 32, (64, 32)),
}


# Seconds each in the interpreter: with fp32 only on every commit.
LONGEST = ("documents H2:2 D32", "groups H4:1 D128", "crumbs H2:1 D32")


@pytest.mark.parametrize(
    "case, dtype",
    mark_slow(itertools.product(CASES, DTYPES), [] if GPU else [(name, torch.float16) for name in LONGEST]),
    ids=str,
)
def test_matches_float64(case, dtype):
    layout, heads, groups, dim, blocks = CASES[case]
    assert_within_budget(inputs(layout.tokens, heads, groups, dim, dtype, layout.queries), layout, blocks)


pairs = st.lists(
    st.tuples(st.integers(0, 20), st.lists(st.integers(0, 12), max_size=3)), min_size=1, max_size=3
)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(pairs, st.integers(0, 5), st.sampled_from([(16, 16), (32, 16), (16, 32)]))
def test_matches_float64_for_any_groups(groups, padding, blocks):
    used = sum(prompt + sum(completions) for prompt, completions in groups)
    layout = PackedLayout.from_groups(groups, total=used + padding + 1)
    assert_within_budget(inputs(layout.tokens, 2, 1, 16), layout, blocks)


def test_views_and_expanded_gradients():
    """q, k and v as slices of one fused projection, and the gradient of a sum (stride 0), are read in place."""
    layout = PackedLayout.from_groups([(20, [9, 30])], total=61).to(DEVICE)
    fused = torch.randn(61, 8, 32, device=DEVICE)
    views = [fused[:, a:b].requires_grad_() for a, b in ((0, 4), (4, 6), (6, 8))]
    copies = [x.detach().clone().requires_grad_() for x in views]
    for got, want in zip(
        torch.autograd.grad(kernels(*views, layout).sum(), views),
        torch.autograd.grad(kernels(*copies, layout).sum(), copies),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_isolation_is_bit_exact():
    """Law 5: what one document holds changes nothing in the others, neither outputs nor gradients."""
    layout = PackedLayout.from_groups([(0, [30]), (11, [20, 33]), (0, [40])], total=140).to(DEVICE)
    tensors = inputs(140, 2, 1, 32)
    grad = torch.randn(140, 2, 32, device=DEVICE)
    before = run(kernels, tensors, layout, grad)
    with torch.no_grad():
        for x in (*tensors, grad):
            x[30:94] += 1.0  # the group
    after = run(kernels, tensors, layout, grad)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:30], b[:30])
        assert torch.equal(a[94:], b[94:])
        assert not torch.equal(a[30:94], b[30:94])


def test_a_completion_does_not_move_its_sibling():
    layout = PackedLayout.from_groups([(21, [30, 45])]).to(DEVICE)
    q, k, v = inputs(96, 2, 1, 32)
    before = kernels(q, k, v, layout)
    with torch.no_grad():
        for x in (q, k, v):
            x[21:51] += 1.0  # the first completion
    after = kernels(q, k, v, layout)
    assert torch.equal(before[:21], after[:21])
    assert torch.equal(before[51:], after[51:])
    assert not torch.equal(before[21:51], after[21:51])


def test_a_shared_prompt_equals_its_copies():
    prompt, completions = 39, [26, 50]
    shared = PackedLayout.from_groups([(prompt, completions)]).to(DEVICE)
    copies = PackedLayout.from_lengths([prompt + c for c in completions]).to(DEVICE)
    first, second = torch.arange(65), torch.cat([torch.arange(39), torch.arange(65, 115)])
    rows = torch.cat([first, second]).to(DEVICE)  # copy <- shared
    q, k, v = inputs(shared.tokens, 4, 2, 32)
    got = kernels(q, k, v, shared)
    want = kernels(q[rows], k[rows], v[rows], copies)
    torch.testing.assert_close(got[rows], want, rtol=1e-5, atol=1e-5)  # the order of summation differs
    weight = torch.randn_like(want)
    summed = torch.zeros_like(got).index_add(0, rows, weight)
    got_grads = torch.autograd.grad(got, (q, k, v), summed)
    want_grads = torch.autograd.grad(want, (q, k, v), weight)  # indexing sums over the copies
    for got_g, want_g in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_g, want_g, rtol=1e-4, atol=1e-5)


def test_padding_sees_itself_only_and_nothing_is_an_answer_too():
    q, k, v = inputs(5, 2, 1, 16)
    only_padding = PackedLayout.from_lengths([], total=5).to(DEVICE)
    torch.testing.assert_close(packed_attention(q, k, v, only_padding), v.expand(5, 2, 16))
    empty = packed_attention(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]).to(DEVICE))
    assert empty.shape == (0, 2, 16)
    assert torch.autograd.grad(empty.sum(), q)[0].eq(0).all()
    no_queries = PackedLayout.from_lengths([3, 2]).for_queries(torch.arange(0)).to(DEVICE)
    out, _, dk, dv = run(kernels, [q[:0], k, v], no_queries, q[:0])
    assert out.shape == (0, 2, 16)
    assert dk.eq(0).all()
    assert dv.eq(0).all()


def test_the_scale_is_used_and_the_public_function_runs_the_kernels():
    layout = PackedLayout.from_lengths([37]).to(DEVICE)
    q, k, v = inputs(37, 2, 2, 32)
    out = packed_attention(q, k, v, layout, scale=0.3)
    assert "_PackedAttention" in type(out.grad_fn).__name__
    torch.testing.assert_close(
        out, packed_attention_reference(q, k, v, layout, scale=0.3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "dtype, dim, message",
    [
        (torch.float64, 32, "needs bf16, fp16 or fp32"),
        (torch.float16, 257, "needs D <= 256"),
        pytest.param(
            torch.bfloat16,
            32,
            "needs fp32 or fp16 under TRITON_INTERPRET=1; got bf16",
            marks=pytest.mark.skipif(GPU, reason="a GPU multiplies bf16"),
        ),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_refused(dtype, dim, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(*inputs(3, 2, 1, dim, dtype), PackedLayout.from_lengths([3]).to(DEVICE))


@pytest.mark.skipif(not GPU, reason="only a GPU runs asynchronously and has the memory")
class TestOnGPU:
    def test_nothing_waits_for_the_gpu(self):
        layout = GROUPS.to(DEVICE)
        tensors = inputs(GROUPS.tokens, 4, 2, 64, torch.bfloat16)
        kernels(*tensors, layout).sum().backward()  # compiled from here on
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels(*tensors, layout).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_same_bits_each_time(self):
        layout = LONG.to(DEVICE)
        tensors = inputs(1024, 8, 2, 128, torch.bfloat16)
        grad = torch.randn(1024, 8, 128, device=DEVICE)
        first, second = (run(kernels, tensors, layout, grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_offsets_pass_32_bits(self):
        """131,072 tokens x 129 heads x 128 is over 2**31 elements; the last document equals itself computed alone."""
        tokens, heads = 131_072, 129
        layout = PackedLayout.from_lengths([512] * (tokens // 512)).to(DEVICE)
        q = torch.randn(tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16)
        k, v = torch.randn(2, tokens, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        alone = PackedLayout.from_lengths([512]).to(DEVICE)
        with torch.no_grad():
            got = packed_attention(q, k, v, layout)[-512:]
            want = packed_attention(q[-512:], k[-512:], v[-512:], alone)
        assert torch.equal(got, want)
