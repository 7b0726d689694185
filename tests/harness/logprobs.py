"""Inputs, losses and error bounds for the tests of the log-prob engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def draw(rows, hidden, vocab, dtype=torch.float64, *, scale=1.0, device="cpu"):
    """Return hidden states, weight and targets; logits have a standard deviation of ``scale``."""
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden_NH = torch.randn(rows, hidden, dtype=torch.float64, generator=generator) * scale
    weight_VH = torch.randn(vocab, hidden, dtype=torch.float64, generator=generator) / hidden**0.5
    targets_N = torch.randint(vocab, (rows,), generator=generator).to(device)
    return (*(t.to(device, dtype).requires_grad_() for t in (hidden_NH, weight_VH)), targets_N)


def exactly(tensors):
    """Return the same inputs in fp64."""
    hidden_NH, weight_VH, targets_N = tensors
    return (*(t.detach().double().requires_grad_() for t in (hidden_NH, weight_VH)), targets_N)


def cut(rows, lengths):
    """Cut rows into slabs whose lengths repeat this list."""
    slabs, at, i = [], 0, 0
    while at < rows:
        slabs.append((at, min(at + lengths[i % len(lengths)], rows)))
        at, i = slabs[-1][1], i + 1
    return slabs


class TokenLoss:
    """SFT-like: each row has a weight, a fifth of them 0, as if unscored."""

    def __init__(self, rows, slabs):
        self.weight_N = torch.linspace(0.5, 1.5, rows, dtype=torch.float64) / max(rows, 1)
        self.weight_N[::5] = 0.0
        self.slabs = slabs

    def __call__(self, i, logprobs_n, statistics):
        weight_n = self.weight_N[slice(*self.slabs[i])].to(logprobs_n)
        return -(weight_n * logprobs_n).sum(), {"weight": weight_n.sum()}


class PairLoss:
    """DPO-like: the first half of a slab is preferred to the second; its gradient needs sums over the full slab."""

    def __init__(self, slabs):
        self.slabs = slabs

    def __call__(self, i, logprobs_n, statistics):
        middle = (logprobs_n.shape[0] + 1) // 2
        chosen, rejected = logprobs_n[:middle].sum(), logprobs_n[middle:].sum()
        margin = (chosen - rejected) / max(1, middle) ** 0.5
        loss = -F.logsigmoid(0.3 * margin) / len(self.slabs)
        return loss, {"margin": margin.detach(), "pairs": torch.ones((), device=loss.device)}


class StatisticsLoss(PairLoss):
    """WPO-like: weights from what else is known of the rows."""

    def __call__(self, i, logprobs_n, statistics):
        weight_n = (logprobs_n.detach() - statistics["log_sum_square"]).clamp(max=0.5).exp()
        return -(weight_n * logprobs_n).sum() / 10, {"entropy": statistics["entropy"].sum()}


class EntropyLoss(PairLoss):
    """Policy gradient with a bonus: log-probs and entropies with weights of their own, some of them 0."""

    def __call__(self, i, logprobs_n, statistics):
        count = logprobs_n.shape[0]
        weight_n = torch.linspace(-1, 1, max(count, 2))[:count].to(logprobs_n)
        bonus_n = torch.arange(count).remainder(3).to(logprobs_n)
        loss = (weight_n * logprobs_n).sum() - 0.5 * (bonus_n * statistics["entropy"]).sum()
        return loss / 10, {"entropy": statistics["entropy"].detach().sum()}


def gradients(function, tensors, *arguments, **options):
    """Return the loss, the gradients of hidden and weight, and the sums."""
    loss, sums = function(*tensors, *arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, tensors[:2])], sums


def exact_gradients(tensors, slabs, loss):
    """Return loss and gradients in fp64, slab by slab: autograd down to the logits, which would not fit in one."""
    hidden_NH, weight_VH, targets_N = (t.detach() for t in exactly(tensors))
    total, dhidden_NH, dweight_VH = 0.0, torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
    for i, (start, stop) in enumerate(slabs):
        rows = slice(start, stop)
        logits_nV = (hidden_NH[rows] @ weight_VH.T).requires_grad_()
        value, _ = loss(i, logits_nV.log_softmax(-1).gather(1, targets_N[rows, None])[:, 0], {})
        (dlogits_nV,) = torch.autograd.grad(value, logits_nV)
        dhidden_NH[rows] = dlogits_nV @ weight_VH
        dweight_VH.addmm_(dlogits_nV.T, hidden_NH[rows])
        total = total + value.detach()
    return [total, dhidden_NH, dweight_VH]


def assert_within(got, same, truth, slack):
    """Each error against fp64 is at most the same-dtype PyTorch's, plus ``slack`` of the largest value."""
    for i, (got_t, same_t, truth_t) in enumerate(zip(got, same, truth, strict=True)):
        assert got_t.isfinite().all(), f"output {i} is not finite"
        if truth_t.numel():
            error = _distance(got_t, truth_t)
            allowed = _distance(same_t, truth_t) + slack * _distance(truth_t, torch.zeros(()))
            assert error <= allowed, f"output {i}: error {error:.3e}, allowed {allowed:.3e}"


def _distance(values, truth):
    """Return the largest difference, a few million elements at a time: a head's gradient in fp64 is 4 GB."""
    pairs = (t.reshape(-1).split(1 << 22) for t in (values, truth.expand_as(values)))
    return max((some.double() - true).abs().max() for some, true in zip(*pairs, strict=True))


class Costs(TorchDispatchMode):
    """Counts the FLOPs of matrix products and the elements of the largest tensor created."""

    def __init__(self):
        super().__init__()
        self.flops = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[1]
        self.largest = max([self.largest, *(t.numel() for t in [out] if isinstance(t, torch.Tensor))])
        return out
