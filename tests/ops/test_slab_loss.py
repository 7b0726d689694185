"""slab_loss equals the loss of full logits: value, sums, both gradients; in 6 NHV, one slab of memory, on any ranks."""

import itertools

import pytest
import torch

from megatron_align.kernels import slab_loss, slab_loss_reference, slab_rows, token_logprobs, token_scores
from megatron_align.kernels.token_logprobs import slab
from tests.harness import kernel_ranks
from tests.harness.logprobs import (
    Costs,
    EntropyLoss,
    PairLoss,
    StatisticsLoss,
    TokenLoss,
    assert_within,
    cut,
    draw,
    exact_gradients,
    exactly,
    gradients,
)
from tests.harness.marks import mark_slow


@pytest.fixture
def slab_of(monkeypatch):
    """``slab_of(weight, rows)``: let a slab hold this many rows."""

    def set_limit(weight, rows):
        monkeypatch.setitem(slab.SLAB_BYTES, "cpu", rows * weight.shape[0] * weight.element_size())
        assert slab_rows(weight) == rows

    return set_limit


OPTIONS = {"plain": {}, "temperature": {"temperature": 0.7}, "softcap": {"softcap": 2.0, "temperature": 1.3}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", ["token", "pair", "statistics", "entropy"])
@pytest.mark.parametrize("shape", [(252, 507, 123), (3, 47, 31), (1, 8, 1)])
def test_equals_the_loss_of_full_logits(shape, kind, options, slab_of):
    """Slabs of 3 to 60 rows and a limit of 20: some are one piece, some are projected again."""
    tensors = draw(*shape)
    slabs = cut(shape[0], [3, 60, 20, 41, 7])
    loss = TokenLoss(shape[0], slabs) if kind == "token" else PairLoss(slabs)
    flags, same = {}, {}
    if kind == "statistics":
        loss, flags = StatisticsLoss(slabs), {"statistics": True}
    if kind == "entropy":
        loss, same = EntropyLoss(slabs), {"entropy_gradient": True}
        flags = {"statistics": True, **same}
    slab_of(tensors[1], 20)
    got, got_sums = gradients(slab_loss, tensors, slabs, loss, **options, **flags)
    want, want_sums = gradients(slab_loss_reference, tensors, slabs, loss, **options, **same)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert got_sums.pop("recomputed_samples") == sum(stop - start > 20 for start, stop in slabs)
    torch.testing.assert_close(got_sums, want_sums, rtol=1e-9, atol=1e-12)


# Tokens, hidden, vocabulary of real models: rows and hidden shrunk, where a CPU has to multiply them.
FIELD = [(61, 112, 152064), (68, 28, 151936), (153, 256, 32256), (252, 507, 123), (3, 47, 31)]


SCALES = {"usual": 1.0, "flat": 1e-3, "peaked": 60.0}


SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


@pytest.mark.parametrize(
    "shape, scale, dtype",  # the largest vocabularies take seconds each: one of them once on every commit
    mark_slow(
        itertools.product(FIELD, SCALES, SLACK),
        slow=[
            *itertools.product(FIELD[:3], ("flat", "peaked"), SLACK),
            *itertools.product(FIELD[:1], ("usual",), SLACK),
            (FIELD[1], "usual", torch.float32),
            (FIELD[2], "usual", torch.bfloat16),
        ],
    ),
)
def test_error_is_within_that_of_the_same_dtype_reference(shape, scale, dtype):
    """A fifth of the rows has weight 0, all are in one sequence."""
    slack = SLACK[dtype]
    tensors = draw(*shape, dtype, scale=SCALES[scale])
    slabs = [(0, shape[0])]
    loss = TokenLoss(shape[0], slabs)
    got, same, truth = (
        gradients(f, inputs, slabs, loss)[0]
        for f, inputs in (
            (slab_loss, tensors),
            (slab_loss_reference, tensors),
            (slab_loss_reference, exactly(tensors)),
        )
    )
    assert_within(got, same, truth, slack)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_error_of_the_entropys_gradient(dtype, slack, scale):
    """Where almost nothing is certain, and where almost everything is: the entropy is then 0 but for rounding."""
    tensors = draw(40, 64, 5003, dtype, scale=SCALES[scale])
    slabs = [(0, 40)]
    flags = {"entropy_gradient": True}
    got = gradients(slab_loss, tensors, slabs, EntropyLoss(slabs), statistics=True, **flags)[0]
    same, truth = (
        gradients(slab_loss_reference, inputs, slabs, EntropyLoss(slabs), **flags)[0]
        for inputs in (tensors, exactly(tensors))
    )
    assert_within(got, same, truth, slack)


def test_an_entropy_that_is_not_passed_has_no_gradient():
    with pytest.raises(ValueError, match="statistics=True, got entropy_gradient without"):
        slab_loss(*draw(6, 8, 10), [(0, 6)], EntropyLoss([0]), entropy_gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, dtype, slack",
    [
        ((637, 3584, 152064), torch.float32, 1e-6),
        ((723, 896, 151936), torch.float32, 1e-6),
        ((1530, 2048, 32256), torch.float32, 1e-6),
        # CPUs without bf16 instructions take a hundred times as long for a product as for one of fp32: the least head.
        ((230, 2048, 32256), torch.bfloat16, 1e-3),
    ],
)
def test_real_heads(shape, dtype, slack):
    """Vocabularies and widths of models in use, several slabs of rows; minutes, and up to 20 GB."""
    tensors = draw(*shape, dtype)
    slabs = cut(shape[0], [60, 200, 300])
    loss = PairLoss(slabs)
    got, same = (gradients(f, tensors, slabs, loss)[0] for f in (slab_loss, slab_loss_reference))
    assert_within(got, same, exact_gradients(tensors, slabs, loss), slack)


def test_known_bug_bf16_weight_gradient_drifts_over_slabs(slab_of):
    """Elsewhere dW is added up in bf16, slab after slab, and stops growing. 400 slabs here, each the same."""
    hidden, weight, targets = draw(4, 16, 33, torch.bfloat16)
    many = (hidden.detach().repeat(400, 1).requires_grad_(), weight, targets.repeat(400))
    slabs = cut(1600, [4])
    got, _ = gradients(slab_loss, many, slabs, PairLoss(slabs))
    want, _ = gradients(slab_loss_reference, exactly(many), slabs, PairLoss(slabs))
    # bf16 rounds dlogits (2**-9 each, all the same way here) and the result.
    assert (got[2].double() - want[2]).abs().max() <= 2**-8 * want[2].abs().max()


def test_known_bug_positive_logprobs():
    """A fused engine elsewhere returned +123."""
    hidden, weight, targets = draw(50, 16, 33, torch.bfloat16, scale=300.0)
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    seen = []
    with torch.no_grad():
        slab_loss(
            hidden,
            weight,
            targets,
            [(0, 50)],
            lambda i, logprobs_n, s: (seen.append(logprobs_n) or logprobs_n.sum(), {}),
        )
    assert (seen[0] <= 0).all()
    assert (seen[0] == 0).any()  # peaked enough to reach the end


def test_known_bug_ignored_rows_poison_the_rest():
    """Rows of weight 0 whose logits overflow leave loss and gradients alone."""
    hidden, weight, targets = draw(10, 16, 33, torch.float32)
    slabs = [(0, 10)]
    loss = TokenLoss(10, slabs)
    clean, _ = gradients(slab_loss, (hidden, weight, targets), slabs, loss)
    wild = hidden.detach().clone()
    wild[::5] = 3e38 * wild[::5].sign()
    wild.requires_grad_()

    def masked(i, logprobs_n, statistics):
        scored_n = loss.weight_N > 0
        return loss(i, logprobs_n.where(scored_n, 0.0), statistics)

    got, _ = gradients(slab_loss, (wild, weight, targets), slabs, masked)
    scored_N = loss.weight_N > 0
    torch.testing.assert_close(got[0], clean[0])
    torch.testing.assert_close(got[1][scored_N], clean[1][scored_N])
    assert (got[1][~scored_N] == 0).all()
    torch.testing.assert_close(got[2], clean[2])


def test_known_bug_a_large_common_offset():
    """1e4 on every logit: the log of the sum is stored separately from the maximum, which would round it away.

    Judged from the same fp32 logits, which are spaced 1e-3 there.
    """
    hidden, weight, targets = draw(9, 16, 33, torch.float32)
    shifted = torch.cat([weight.detach(), torch.full((33, 1), 1e4)], 1).requires_grad_()
    longer = torch.cat([hidden.detach(), torch.ones(9, 1)], 1).requires_grad_()
    slabs = [(0, 9)]
    got, _ = gradients(slab_loss, (longer, shifted, targets), slabs, TokenLoss(9, slabs))
    logits = (longer @ shifted.T).detach().double()
    truth = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weight_N = TokenLoss(9, slabs).weight_N
    torch.testing.assert_close(got[0].double(), -(weight_N * truth).sum(), rtol=1e-6, atol=0)
    dlogits = weight_N[:, None] * (logits.softmax(-1) - torch.nn.functional.one_hot(targets, 33))
    torch.testing.assert_close(got[1].double(), dlogits @ shifted.detach().double(), rtol=1e-4, atol=2e-3)


def test_costs_six_products_and_one_slab(slab_of):
    """Of 40 slabs of rows no tensor is larger than one slab of logits, and each GEMM runs once: 6 NHV."""
    rows, hidden, vocab = 640, 8, 1000
    tensors = draw(rows, hidden, vocab, torch.float32)
    slab_of(tensors[1], 16)
    slabs = cut(rows, [16])
    with Costs() as costs:
        slab_loss(*tensors, slabs, PairLoss(slabs))[0].backward()
    assert costs.flops == 6 * rows * hidden * vocab
    assert costs.largest == 16 * vocab  # more than the weight's 8,000 and the hidden states' 5,120


NHV = 60 * 8 * 100
COSTS = {
    "scores": (2, lambda h, w, t: token_scores(h, w, t, top_k=3)),
    "recompute": (8, lambda h, w, t: token_logprobs(h, w, t).sum().backward()),
    "frozen_head": (
        4,
        lambda h, w, t: slab_loss(h, w.detach(), t, cut(60, [20]), PairLoss([0]))[0].backward(),
    ),
    "frozen_body": (
        4,
        lambda h, w, t: slab_loss(h.detach(), w, t, cut(60, [20]), PairLoss([0]))[0].backward(),
    ),
    # Three pieces: all but the last are projected again.
    "long_sample": (
        6 + 2 * 2 / 3,
        lambda h, w, t: slab_loss(h, w, t, [(0, 60)], PairLoss([0]))[0].backward(),
    ),
}


@pytest.mark.parametrize("products, call", COSTS.values(), ids=list(COSTS))
def test_costs_of_the_other_ways(products, call, slab_of):
    tensors = draw(60, 8, 100, torch.float32)
    slab_of(tensors[1], 20)
    with Costs() as costs:
        call(*tensors)
    assert costs.flops == pytest.approx(products * NHV)


def test_without_gradients_only_the_first_product_runs():
    tensors = draw(60, 8, 100, torch.float32)
    tensors[1].main_grad = torch.zeros(100, 8)
    slabs = cut(60, [20])
    with torch.no_grad(), Costs() as costs:
        loss, sums = slab_loss(*tensors, slabs, PairLoss(slabs))
    assert costs.flops == 2 * NHV
    assert not loss.requires_grad
    assert (tensors[1].main_grad == 0).all()
    want, want_sums = slab_loss(*tensors, slabs, PairLoss(slabs))
    torch.testing.assert_close((loss, sums), (want.detach(), want_sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_goes_into_main_grad(dtype):
    """Added to what stands there, in fp32; autograd gets a stand-in, zeros where megatron-core adds it too."""
    tensors = draw(60, 8, 100, dtype)
    slabs = cut(60, [20])
    want, _ = gradients(slab_loss, tensors, slabs, PairLoss(slabs))
    weight = tensors[1]
    weight.main_grad = torch.full((100, 8), 0.5)
    weight.zero_out_wgrad = True
    got, _ = gradients(slab_loss, tensors, slabs, PairLoss(slabs))
    assert weight.grad_added_to_main_grad
    assert (got[2] == 0).all()
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close((weight.main_grad - 0.5).to(dtype), want[2], rtol=1e-2, atol=1e-6)


def test_a_low_precision_main_grad_is_left_to_megatron_core():
    tensors = draw(60, 8, 100, torch.bfloat16)
    slabs = cut(60, [20])
    want, _ = gradients(slab_loss, tensors, slabs, PairLoss(slabs))
    tensors[1].main_grad = torch.zeros(100, 8, dtype=torch.bfloat16)
    got, _ = gradients(slab_loss, tensors, slabs, PairLoss(slabs))
    torch.testing.assert_close(got, want)
    assert (tensors[1].main_grad == 0).all()


def test_upstream_gradient_must_be_one():
    tensors = draw(6, 8, 10)
    loss, _ = slab_loss(*tensors, [(0, 6)], PairLoss([0]))
    with pytest.raises(ValueError, match=r"upstream gradient of 1.*got 2.0"):
        (2 * loss).backward()


def test_gradients_are_returned_once():
    tensors = draw(6, 8, 10)
    loss, _ = slab_loss(*tensors, [(0, 6)], PairLoss([0]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second call"):
        loss.backward()


@pytest.mark.parametrize("slabs", [[], [(0, 0)]], ids=["no_slab", "empty_slab"])
def test_no_rows(slabs):
    tensors = draw(0, 8, 10)
    got, sums = gradients(slab_loss, tensors, slabs, PairLoss(slabs))
    want, want_sums = (
        gradients(slab_loss_reference, exactly(tensors), slabs, PairLoss(slabs)) if slabs else (0, {})
    )
    torch.testing.assert_close(got[0], want[0] if slabs else torch.zeros((), dtype=torch.float64))
    assert got[1].shape == (0, 8)
    assert (got[2] == 0).all()
    assert sums.keys() == {*want_sums, "recomputed_samples"}


def test_a_loss_that_ignores_its_log_probs():
    """Its gradient is 0, not an error: a slab may hold samples that weigh nothing."""
    tensors = draw(6, 8, 10)
    got, _ = gradients(slab_loss, tensors, [(0, 6)], lambda i, logprobs_n, s: (torch.tensor(3.0), {}))
    assert got[0] == 3
    assert not any(g.any() for g in got[1:])


def test_a_maximum_is_that_of_all_slabs():
    """Parts of a sum whose name ends with _max combine by the larger one, those of others are added."""

    def loss(i, logprobs_n, statistics):
        found = torch.tensor([3.0, 5.0, 2.0][i])
        return logprobs_n.sum(), {"found": found, "found_max": found}

    for function in (slab_loss, slab_loss_reference):
        _, sums = function(*draw(6, 8, 10), [(0, 2), (2, 4), (4, 6)], loss)
        assert (sums["found"].item(), sums["found_max"].item()) == (10.0, 5.0)


BAD_SLABS = {
    "gap": ([(0, 2), (3, 6)], "slab 1 must start at row 2.*got 3 to 6"),
    "backwards": ([(0, 4), (4, 3)], "slab 1 .*got 4 to 3"),
    "short": ([(0, 5)], "cover N = 6 rows; they cover 5"),
    "long": ([(0, 7)], "cover N = 6 rows; they cover 7"),
}


@pytest.mark.parametrize("slabs, message", BAD_SLABS.values(), ids=list(BAD_SLABS))
def test_slabs_must_cover_the_rows(slabs, message):
    with pytest.raises(ValueError, match=message):
        slab_loss(*draw(6, 8, 10), slabs, PairLoss(slabs))


@pytest.mark.parametrize("world, rows, vocab", [(2, 9, 31), (4, 9, 31), (4, 5, 7), (2, 0, 31)])
def test_vocabulary_ranks_agree_with_one(pool, world, rows, vocab):
    """Also where the last two of four ranks hold padding only. Hidden gradients: complete, or shares that add up."""
    hidden, weight, targets = draw(rows, 12, vocab, torch.float32)
    padding = 16 - vocab if vocab < 16 else 32 - vocab
    padded = torch.cat([weight.detach(), torch.full((padding, 12), 9.0)])
    slabs = cut(rows, [4, 3]) or [(0, 0)]
    options = {"softcap": 3.0, "temperature": 0.8}
    want, sums = gradients(
        slab_loss, (hidden, weight, targets), slabs, StatisticsLoss(slabs), statistics=True, **options
    )
    answers = pool.run(
        world, kernel_ranks.slab_loss_grads, hidden.detach(), padded, targets, vocab, slabs, options
    )
    for loss, whole, _, _, got_sums in answers:
        assert torch.equal(loss, answers[0][0])  # bit for bit: every rank has to see the same loss
        torch.testing.assert_close((loss, whole, got_sums), (want[0], want[1], sums))
    torch.testing.assert_close(sum(answer[2] for answer in answers), want[1])
    weight_grad = torch.cat([answer[3] for answer in answers])
    torch.testing.assert_close(weight_grad[:vocab], want[2])
    assert (weight_grad[vocab:] == 0).all()
