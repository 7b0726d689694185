"""SwiGLU, RMSNorm and RoPE equal float64, on a CPU bit for bit PyTorch's own operations; their kernels do not spill.

Every operation decides by the same function whether Triton takes a tensor.
"""

import pytest
import torch

from megatron_align.kernels import (
    PackedLayout,
    add_rms_norm,
    add_rms_norm_reference,
    packed_attention,
    rms_norm,
    rms_norm_reference,
    rope,
    rope_reference,
    swiglu,
    swiglu_reference,
    token_logprobs,
)
from megatron_align.model.rope import rope_frequencies, rope_tables
from tests.harness.compiled import compiling_for
from tests.harness.interpreter import DEVICE, DTYPES, GPU
from tests.harness.marks import mark_slow

# Rounding of the result; gates of up to 12 make exp(-gate) inexact by 12 units of its last place.
SLACK = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function, inputs, *gradients):
    """Return the outputs of a function and the gradients of its inputs that have one."""
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in inputs if x.requires_grad]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, wanted, gradients)]


def assert_equals_float64(function, reference, inputs, *gradients, roundings=1):
    """Compare with float64; an error counts by the largest element of its row, and there is room for each rounding."""
    got = results(function, inputs, *gradients)
    exact = results(reference, [x.double() for x in inputs], *(dout.double() for dout in gradients))
    slack = roundings * SLACK[inputs[0].dtype]
    for x, want in zip(got, exact, strict=True):
        assert x.dtype == inputs[0].dtype
        scale = want.abs().amax(-1, keepdim=True).clamp(min=1) if want.numel() else 1
        torch.testing.assert_close(x.double() / scale, want / scale, rtol=slack, atol=slack)


def kept_by(call):
    """Return the addresses of what a call keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return [t.data_ptr() for t in kept]


# SwiGLU


def projection(shape, dtype, device="cpu"):
    dout = randn(*shape[:-1], shape[-1] // 2, seed=1)
    return (4 * randn(*shape)).to(device, dtype).requires_grad_(), dout.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 34), (0, 8), (3, 2)])
def test_swiglu_on_a_cpu_has_the_bits_of_pytorch(dtype, shape):
    x, dout = projection(shape, dtype)
    for got, want in zip(results(swiglu, [x], dout), results(swiglu_reference, [x], dout), strict=True):
        assert torch.equal(got, want)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 34), (3, 4100), (1, 2), (0, 8)])
def test_swiglu(dtype, shape):
    x, dout = projection(shape, dtype, DEVICE)
    assert_equals_float64(swiglu, swiglu_reference, [x], dout)


@pytest.mark.triton
def test_ends_of_the_scale_of_swiglu():
    """A gate of -200 passes nothing and has no gradient; one of 200 passes everything; neither is NaN."""
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE, requires_grad=True)
    out, grad = results(swiglu, [x], torch.ones(1, 2, device=DEVICE))
    assert out.tolist() == [[0.0, 600.0]]
    assert grad.tolist() == [[0.0, 3.0, 0.0, 200.0]]


def test_swiglu_keeps_the_projection_only():
    x, _ = projection((4, 10), torch.float32)
    assert kept_by(lambda: swiglu(x)) == [x.data_ptr()]


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(4, 2).T])
def test_shapes_that_swiglu_lacks_are_refused(x):
    with pytest.raises(ValueError, match="needs a contiguous tensor"):
        swiglu(x)


# RMSNorm


def exact_norm(x, weight):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def exact_sum_and_norm(x, residual, weight):
    return residual + x, exact_norm(residual + x, weight)


def norm(x, weight):
    return rms_norm(x, weight, EPS)


def sum_and_norm(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def rows(shape, dtype, device=DEVICE):
    """Return rows of different scales, a residual, a weight, and gradients of the norm and of the sum."""
    scale = 3.0 ** randn(*shape[:-1], 1)
    x, residual, dout, dsum = (randn(*shape, seed=i) for i in range(1, 5))
    weight = 1 + 0.3 * randn(shape[-1], seed=5)
    leaves = (x * scale, residual * scale, weight)
    x, residual, weight = (leaf.to(device, dtype).requires_grad_() for leaf in leaves)
    return x, residual, weight, dout.to(device, dtype), dsum.to(device, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 34), (300, 1, 100), (2, 3584), (11, 9000), (3, 5, 16), (0, 8)])
def test_rms_norm(dtype, shape):
    """Of many rows, which are several parts of the weight's gradient, and of wide ones, also in pieces."""
    x, residual, weight, dout, dsum = rows(shape, dtype)
    assert_equals_float64(norm, exact_norm, [x, weight], dout, roundings=2)
    both = [x, residual, weight]
    assert_equals_float64(sum_and_norm, exact_sum_and_norm, both, dsum, dout, roundings=3)


@pytest.mark.triton
def test_a_sum_has_the_bits_of_its_parts():
    """The fused pass gives the sum and the norm that two operations give; a frozen weight changes nothing else."""
    x, residual, weight, dout, dsum = rows((9, 1, 40), torch.float16)
    total, out, dx, dresidual, _ = results(sum_and_norm, [x, residual, weight], dsum, dout)
    assert torch.equal(total, residual + x)
    assert torch.equal(out, norm(total, weight))
    assert torch.equal(dx, dresidual)
    frozen = results(sum_and_norm, [x, residual, weight.detach()], dsum, dout)
    assert all(torch.equal(*pair) for pair in zip(frozen, (total, out, dx, dresidual), strict=True))


@pytest.mark.triton
def test_heads_are_normalised_where_they_lie():
    """Keys are columns of a projection: the norm keeps this view, and copies nothing."""
    projection, _, weight, dout, _ = rows((6, 1, 2, 24), torch.float32)
    weight, dout = weight.detach()[:8], dout[..., :8]
    keys = projection.detach()[..., 8:16].requires_grad_()
    assert kept_by(lambda: norm(keys, weight))[0] == keys.data_ptr()
    assert_equals_float64(norm, exact_norm, [keys, weight], dout)


@pytest.mark.triton
def test_a_row_of_zeros_without_eps_stays_alone():
    """It is NaN, as PyTorch's is; that the last part of the weight's gradient has fewer rows than others is not."""
    x, _, weight, dout, _ = rows((3, 8), torch.float32)
    grads = results(lambda x, w: rms_norm(x, w, 0.0), [x, weight], dout)
    assert all(grad.isfinite().all() for grad in grads)


def test_the_norm_on_a_cpu_has_the_bits_of_pytorch():
    """Of the sum too: an operation of PyTorch's, then the norm."""
    x, residual, weight, dout, dsum = rows((7, 1, 34), torch.bfloat16, "cpu")

    def by_hand(x, residual, weight):
        total = residual + x
        rows = total.float()
        return total, weight * (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    given = [x, residual, weight]
    want = results(by_hand, given, dsum, dout)
    for function in (sum_and_norm, lambda *given: add_rms_norm_reference(*given, EPS)):
        got = results(function, given, dsum, dout)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    x, weight = x.double(), weight.double()
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), exact_norm(x, weight))


@pytest.mark.triton
@pytest.mark.parametrize(
    "x, weight, message",
    [
        (torch.ones(2, 4), torch.ones(3), "needs a weight of 4 columns"),
        (torch.ones(2, 4), torch.ones(4).half(), "needs a weight of 4 columns in torch.float32"),
        (torch.ones(1, 16385), torch.ones(16385), "at most 16384 columns"),
    ],
)
def test_norms_that_the_kernels_lack_are_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        norm(x.to(DEVICE), weight.to(DEVICE))


# RoPE


def heads(tokens, queries, keys, dim, dtype, device=DEVICE):
    """Return queries and keys as columns of one projection, tables of packed positions, and gradients."""
    projection = randn(tokens, queries + keys + 1, dim).to(device, dtype)
    q, k = projection[:, :queries].requires_grad_(), projection[:, queries : queries + keys].requires_grad_()
    positions = torch.cat([torch.arange(tokens - tokens // 3), torch.arange(tokens // 3)])
    tables = (t.to(device) for t in rope_tables(positions, rope_frequencies(dim, 1e4, None)))
    dq, dk = randn(tokens, queries, dim, seed=1), randn(tokens, keys, dim, seed=2)
    return q, k, *tables, dq.to(device, dtype), dk.to(device, dtype)


def exact_rope(cos, sin):
    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * cos.double()[:, None] + turned * sin.double()[:, None]

    return lambda q, k: (rotate(q), rotate(k))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(7, 6, 2, 16), (4, 18, 1, 80), (3, 1, 1, 2), (0, 2, 2, 8)])
def test_rope(dtype, sizes):
    """With fewer keys than queries, more heads than a program takes at a time, and half dims of no power of two."""
    q, k, cos, sin, *gradients = heads(*sizes, dtype)
    assert_equals_float64(lambda q, k: rope(q, k, cos, sin), exact_rope(cos, sin), [q, k], *gradients)


@pytest.mark.triton
def test_rope_keeps_the_tables_only_and_turns_back():
    q, k, cos, sin, *_ = heads(5, 4, 2, 8, torch.float32)
    assert kept_by(lambda: rope(q, k, cos, sin)) == [cos.data_ptr(), sin.data_ptr()]
    turned = results(lambda q, k: rope(q, k, cos, sin), [q, k], *rope(q.detach(), k.detach(), cos, sin))
    torch.testing.assert_close(turned[2], q.detach())
    torch.testing.assert_close(turned[3], k.detach())


def test_rope_on_a_cpu_has_the_bits_of_pytorch():
    q, k, cos, sin, *gradients = heads(7, 4, 2, 8, torch.bfloat16, "cpu")

    def by_hand(*heads):
        turned = [torch.cat([-x.float()[..., 4:], x.float()[..., :4]], dim=-1) for x in heads]
        return tuple(
            (x * cos[:, None] + y * sin[:, None]).to(x.dtype) for x, y in zip(heads, turned, strict=True)
        )

    want = results(by_hand, [q, k], *gradients)
    got = results(lambda q, k: rope(q, k, cos, sin), [q, k], *gradients)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    q, k = q.double(), k.double()
    exact = exact_rope(cos, sin)(q, k)
    for got, want in zip(rope_reference(q, k, cos.double(), sin.double()), exact, strict=True):
        torch.testing.assert_close(got, want)


def test_heads_and_tables_that_do_not_fit_are_refused():
    q, k, cos, sin, *_ = heads(4, 2, 1, 8, torch.float32, "cpu")
    for given, message in (
        ((q, k[:3], cos, sin), "needs q"),
        ((q, k, cos[:3], sin), "needs q"),
        ((q[..., :3], k[..., :3], cos[:, :3], sin[:, :3]), "with D even"),
        ((q, k.half(), cos, sin), "of one dtype"),
        ((q, k, cos.double(), sin), "tables in fp32"),
        ((q, k, cos, sin.T.contiguous().T), "contiguous tables"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*given)


# Which tensors Triton takes, and what it makes of the kernels


def all_operations(dtype):
    """Yield a call of every operation that has Triton kernels."""
    x, weight = torch.ones(4, 8, dtype=dtype, device=DEVICE), torch.ones(8, dtype=dtype, device=DEVICE)
    heads_THD, table = x.view(4, 1, 8), torch.ones(4, 8, device=DEVICE)
    layout = PackedLayout.from_lengths([4]).to(DEVICE)
    yield lambda: swiglu(x)
    yield lambda: rms_norm(x, weight, EPS)
    yield lambda: add_rms_norm(x, x, weight, EPS)
    yield lambda: rope(heads_THD, heads_THD, table, table)
    yield lambda: packed_attention(heads_THD, heads_THD, heads_THD, layout)
    yield lambda: token_logprobs(x, x, torch.zeros(4, dtype=torch.int64, device=DEVICE))


@pytest.mark.triton
@pytest.mark.skipif(GPU, reason="a GPU multiplies bf16")
def test_no_operation_computes_bf16_in_the_interpreter():
    for call in all_operations(torch.bfloat16):
        with pytest.raises(ValueError, match="needs fp32 or fp16 under TRITON_INTERPRET=1; got bf16"):
            call()


@pytest.mark.triton
def test_fp64_is_refused_by_all_that_compute_in_fp32():
    *calls, of_logits = all_operations(torch.float64)
    for call in calls:
        with pytest.raises(ValueError, match=r"needs bf16, fp16 or fp32 .* got torch.float64"):
            call()
    assert of_logits().dtype == torch.float64  # by PyTorch


def launch_swiglu():
    from megatron_align.kernels.swiglu.swiglu_kernels import backward, forward

    x = torch.zeros(8, 2 * 18944, dtype=torch.bfloat16)
    backward(x, forward(x))
    return 2


def launch_norm(columns, heads=1, added=False):
    from megatron_align.kernels.rms_norm.rms_norm_kernels import backward, forward

    x = torch.zeros(64, heads, columns, dtype=torch.bfloat16)
    weight = torch.zeros(columns, dtype=torch.bfloat16)
    residual = x if added else None
    forward(x, residual, weight, EPS)
    backward(x, weight, x, residual, EPS, trained=True)
    return 2


def launch_rope(back):
    from megatron_align.kernels.rope.rope_kernels import rotate

    q, k = torch.zeros(8, 7, 128, dtype=torch.bfloat16), torch.zeros(8, 1, 128, dtype=torch.bfloat16)
    rotate(q, k, *torch.zeros(2, 8, 128), back=back)
    return 1


LAUNCHES = {
    "swiglu": launch_swiglu,
    "norm": lambda: launch_norm(3584),
    "sum and norm": lambda: launch_norm(3584, added=True),
    "sum and norm of the widest": lambda: launch_norm(16384, added=True),
    "norm of heads": lambda: launch_norm(128, heads=4),
    "rope": lambda: launch_rope(False),
    "rope back": lambda: launch_rope(True),
}
ON_EVERY_COMMIT = [("sm_80", "swiglu"), ("sm_90", "sum and norm"), ("sm_90", "rope back")]
CHIPS_AND_LAUNCHES = [(chip, name) for chip in ("sm_80", "sm_90") for name in LAUNCHES]


@pytest.mark.parametrize(
    "chip, name",
    mark_slow(CHIPS_AND_LAUNCHES, [case for case in CHIPS_AND_LAUNCHES if case not in ON_EVERY_COMMIT]),
)
def test_kernels_compile_for_a_chip(chip, name):
    with compiling_for(chip) as built:
        expected = LAUNCHES[name]()
    assert len(built) == expected
    assert not "\n".join(filter(None, (kernel.fault(tensor_core=False) for kernel in built)))
