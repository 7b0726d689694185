"""SwiGLU equals float64, on a CPU bit for bit PyTorch's own operations; its kernels compile without spills."""

import pytest
import torch

from megatron_align.kernels import swiglu, swiglu_reference
from tests.harness.compiled import compiling_for
from tests.harness.interpreter import DEVICE, DTYPES

# Rounding of the result; gates of up to 12 make exp(-gate) inexact by 12 units of its last place.
SLACK = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, dout = torch.randn(*shape, generator=generator), torch.randn(*shape[:-1], shape[-1] // 2)
    return (4 * x).to(device, dtype).requires_grad_(), dout.to(device, dtype)


def results(function, x, dout):
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, x, dout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 34), (0, 8), (3, 2)])
def test_a_cpu_has_the_bits_of_pytorch(dtype, shape):
    x, dout = draw(shape, dtype)
    for got, want in zip(results(swiglu, x, dout), results(swiglu_reference, x, dout), strict=True):
        assert torch.equal(got, want)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 34), (3, 4100), (1, 2), (0, 8)])
def test_kernels_equal_float64(dtype, shape):
    x, dout = draw(shape, dtype, DEVICE)
    exact = results(swiglu_reference, x.detach().double().requires_grad_(), dout.double())
    for got, want in zip(results(swiglu, x, dout), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=SLACK[dtype], atol=SLACK[dtype])


@pytest.mark.triton
def test_ends_of_the_scale():
    """A gate of -200 passes nothing and has no gradient; one of 200 passes everything; neither is NaN."""
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE, requires_grad=True)
    out, grad = results(swiglu, x, torch.ones(1, 2, device=DEVICE))
    assert out.tolist() == [[0.0, 600.0]]
    assert grad.tolist() == [[0.0, 3.0, 0.0, 200.0]]


def test_only_the_projection_is_kept():
    x, _ = draw((4, 10), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_kernels_compile_for_a_chip(chip):
    from megatron_align.kernels.swiglu.swiglu_kernels import backward, forward

    x = torch.zeros(8, 2 * 18944, dtype=torch.bfloat16)
    with compiling_for(chip) as built:
        backward(x, forward(x))
    assert len(built) == 2
    assert not "\n".join(filter(None, (kernel.fault(tensor_core=False) for kernel in built)))


@pytest.mark.parametrize("x", [torch.ones(2, 3), torch.ones(4, 2).T])
def test_shapes_that_it_lacks_are_refused(x):
    with pytest.raises(ValueError, match="needs a contiguous tensor"):
        swiglu(x)
