"""The Triton passes equal the PyTorch passes, write nowhere else, and compile without spills for sm_80 and sm_90."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_align.kernels import slab_loss, slab_loss_reference, token_scores, token_scores_reference
from megatron_align.kernels.token_logprobs import slab, vocab_parallel_softmax
from megatron_align.kernels.token_logprobs.softmax_kernels import triton_overwrite, triton_statistics
from megatron_align.kernels.token_logprobs.vocab_parallel_softmax import (
    row_statistics,
    torch_overwrite,
    torch_statistics,
)
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard
from tests.harness.compiled import compiling_for
from tests.harness.interpreter import DEVICE, DTYPES, GPU
from tests.harness.logprobs import (
    EntropyLoss,
    PairLoss,
    StatisticsLoss,
    assert_within,
    cut,
    draw,
    exactly,
    gradients,
)
from tests.harness.marks import mark_slow

SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
OPTIONS = {"plain": {}, "softcap": {"softcap": 2.0, "temperature": 0.7}}
# Columns: fewer than a block, a block and some, more than two; real ones end within a block, at its end, nowhere.
COLUMNS = [(31, 31), (5000, 4096), (9000, 8200), (40, 0)]
COMPILED = list(product(OPTIONS, (torch.bfloat16, torch.float16, torch.float32), ("sm_80", "sm_90")))


def random_slab(columns, real, dtype, scale, **options):
    """Return logits in the middle of NaN, targets (some on other ranks), and the shard."""
    generator = torch.Generator().manual_seed(columns)
    logits = torch.full((7, columns), float("nan"), dtype=dtype)
    logits[1:6] = torch.randn(5, columns, generator=generator) * scale
    local = torch.tensor([0, max(real - 1, 0), -3, real, real // 2])
    shard = VocabShard(weight_VH=torch.empty(columns, 1, device=DEVICE), vocab_size=max(real, 1), **options)
    if not real:
        shard = replace(shard, weight_VH=torch.empty(columns, 1, device=DEVICE), vocab_size=0)
    return logits.to(DEVICE), local.to(DEVICE), shard


SCALES = {"usual": 1.0, "flat": 1e-3, "peaked": 200.0}
STATISTICS = [(*size, options, scale) for size in COLUMNS for options in OPTIONS for scale in SCALES]
# On every commit each number of columns with each of the options, and each of these with each scale.
MORE = [case for i, case in enumerate(STATISTICS) if i % 4 in (1, 2)]


@pytest.mark.triton
@pytest.mark.parametrize("columns, real, options, scale", mark_slow(STATISTICS, MORE))
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype, columns, real, options, scale):
    logits, local, shard = random_slab(columns, real, dtype, SCALES[scale], **OPTIONS[options])
    want = torch_statistics(logits[1:6].double(), local, shard, more=True)
    for more in (False, True):
        got = triton_statistics(logits[1:6], local, shard, more=more)
        # Sums of up to 9,000 terms in fp32, each exp off by 2e-7 per unit of its argument.
        torch.testing.assert_close(got.double(), want[: len(got)], rtol=2e-5, atol=2e-5)


@pytest.mark.triton
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "of_entropy, columns, real",
    mark_slow(
        [(of_entropy, *size) for of_entropy in (False, True) for size in COLUMNS],
        [(True, *size) for size in COLUMNS[:2]],
    ),
)
def test_overwrite(of_entropy, columns, real, dtype, options):
    """In place; padding columns become 0; rows around the slab stay; a row without gradient becomes 0."""
    logits, local, shard = random_slab(columns, real, dtype, 3.0, **options)
    found = row_statistics(logits[1:6].double(), local, shard, more=True)
    grad = torch.tensor([0.5, -2.0, 1.0, 0.0 if of_entropy else 0.3, 0.0], device=DEVICE)
    entropy = [None, None]
    if of_entropy:
        both = torch.stack([found.mean_n, grad.double().flip(0) - grad[0] + 0.5 * grad.sign()])
        both[1, -1] = 0.0
        entropy = [both, both.float()]
    want = logits[1:6].double()
    torch_overwrite(want, local, grad.double(), found.max_2n, shard, entropy[0])
    logits[5, : max(real, 1)] = float("inf")
    triton_overwrite(logits[1:6], local, grad, found.max_2n.float(), shard, entropy[1])
    assert logits[[0, 6]].isnan().all()
    torch.testing.assert_close(logits[1:6].double(), want, rtol=SLACK[dtype], atol=1e-6)
    assert (logits[1:6, real:] == 0).all()
    assert (logits[5] == 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", [PairLoss, StatisticsLoss, EntropyLoss])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slab_loss_runs_on_them(dtype, kind, options, monkeypatch):
    """The complete engine: 21 rows in slabs of up to 8, a limit of 5, so that some are projected twice."""
    tensors = draw(21, 24, 4200, dtype, device=DEVICE)
    monkeypatch.setitem(slab.SLAB_BYTES, DEVICE, 5 * 4200 * tensors[1].element_size())
    slabs = cut(21, [3, 8, 1])
    flags = {} if kind is PairLoss else {"statistics": True}
    same = {"entropy_gradient": True} if kind is EntropyLoss else {}
    launched = []
    run = triton_overwrite
    monkeypatch.setattr(
        vocab_parallel_softmax, "triton_overwrite", lambda *args: (launched.append(1), run(*args))
    )
    got, _ = gradients(slab_loss, tensors, slabs, kind(slabs), **flags, **same, **options)
    assert launched
    same, truth = (
        gradients(slab_loss_reference, t, slabs, kind(slabs), **same, **options)[0]
        for t in (tensors, exactly(tensors))
    )
    # Of the sum: PyTorch adds 4,200 products in another order for 3 rows than for the reference's 21.
    assert_within(got, same, truth, {torch.float32: 5e-6}.get(dtype, 1e-4))


@pytest.mark.triton
def test_token_scores_runs_on_them():
    tensors = draw(5, 24, 4200, torch.float32, device=DEVICE)
    got = token_scores(*tensors, top_k=9, softcap=3.0)
    want = token_scores_reference(*exactly(tensors), top_k=9, softcap=3.0)
    for got_t, want_t in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(got_t.double(), want_t, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.top_tokens_NK, want.top_tokens_NK)


@pytest.mark.triton
@pytest.mark.skipif(GPU, reason="bf16 is refused in the interpreter only")
def test_bf16_is_refused_in_the_interpreter():
    tensors = draw(5, 24, 42, torch.bfloat16)
    with pytest.raises(ValueError, match="needs fp32 or fp16"):
        slab_loss(*tensors, [(0, 5)], PairLoss([0]))


@pytest.mark.parametrize(
    "options, dtype, chip",  # seconds each
    mark_slow(
        COMPILED,
        slow=set(COMPILED) - {("softcap", torch.bfloat16, "sm_90"), ("plain", torch.float32, "sm_80")},
    ),
)
def test_compiles_without_spills(options, dtype, chip):
    """Half of the registers at most: two blocks of eight warps fit a multiprocessor and hide each other's waits."""
    logits, local = torch.empty(4, 152064, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    shard = VocabShard(weight_VH=torch.empty(152064, 1), vocab_size=151936, **OPTIONS[options])
    with compiling_for(chip) as built:
        triton_statistics(logits, local, shard, more=False)
        triton_statistics(logits, local, shard, more=True)
        triton_overwrite(logits, local, torch.empty(4), torch.empty(2, 4), shard)
        triton_overwrite(logits, local, torch.empty(4), torch.empty(2, 4), shard, torch.empty(2, 4))
    assert len(built) == 4
    assert not [fault for kernel in built if (fault := kernel.fault(tensor_core=False, registers=128))]
