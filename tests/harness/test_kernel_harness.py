"""The kernel harness can fail: a wrong kernel fails its test, a spilling one is reported with its figures."""

import pytest
import torch
import triton
import triton.language as tl

from tests.harness.compiled import Built, compiling_for
from tests.harness.interpreter import DEVICE, DTYPES

pytest_plugins = ["pytester"]


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, size: tl.constexpr):
    at = tl.arange(0, size)[:, None] * size + tl.arange(0, size)
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


def product(a, b):
    c = torch.full(a.shape, float("nan"), device=a.device)
    _product[(1,)](a, b, c, size=a.shape[0])
    return c


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_marked_test_runs_the_kernel(dtype):
    a, b = (torch.randn(16, 16, device=DEVICE).to(dtype) for _ in range(2))
    torch.testing.assert_close(product(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="marked tests run in this process where a GPU is")
def test_a_failure_in_the_interpreter_is_the_tests(pytester, monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    pytester.makeconftest(
        "from tests.harness.interpreter import pytest_pyfunc_call, pytest_runtest_logreport, pytest_sessionfinish"
    )
    pytester.makepyfile(
        """
        import os
        import pytest

        @pytest.mark.triton
        def test_good(): assert os.environ["TRITON_INTERPRET"] == "1"
        @pytest.mark.triton
        def test_bad(): assert 1 + 1 == 3
        @pytest.mark.triton
        def test_ends(): os._exit(7)
        def test_plain(): assert "TRITON_INTERPRET" not in os.environ
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        ["*in Triton's interpreter:*", "*1 + 1*3*", "*process ended before this test*"]
    )


def test_a_launch_is_compiled_as_it_would_be_launched():
    a, b = torch.ones(2, 64, 64, dtype=torch.bfloat16)
    for chip in ("sm_80", "sm_90"):
        with compiling_for(chip) as built:
            product(a, b)
        [kernel] = built
        assert (kernel.name, kernel.chip, kernel.warps) == ("_product", chip, 4)
        assert kernel.fault() is None
        assert (kernel.warpgroup > 0) == (chip == "sm_90")
        assert "registers over 8" in kernel.fault(registers=8)


def test_faults_are_told_with_the_figures():
    bad = Built(
        "k", "sm_80", warps=4, registers=255, stack=8, spills=2, shared=200_000, tensor_core=0, warpgroup=0
    )
    assert bad.fault() == (
        "spills, shared memory over 166912, no tensor cores: k on sm_80: 255 registers x 4 warps, 2 spills, "
        "8 B stack, 200000 B shared, 0 tensor-core instructions"
    )
    assert "tensor cores:" not in bad.fault(tensor_core=False)
