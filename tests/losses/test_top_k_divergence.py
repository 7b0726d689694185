"""Divergences over the teacher's top k are never negative, 0 at equality, full at k = V, and equal to TRL's GKD."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from megatron_align.losses.top_k_divergence import TOP_K_DIVERGENCES, forward_kl, js_divergence, reverse_kl


def rows(dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    policy, teacher = scale * torch.randn(2, 6, 9, dtype=torch.float64, generator=generator)
    return policy.to(dtype).requires_grad_(), teacher.to(dtype)


def top(policy_NV, teacher_NV, k):
    columns = teacher_NV.topk(k).indices
    return policy_NV.gather(1, columns), teacher_NV.gather(1, columns)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_equals_trls_gkd_with_k_the_vocabulary(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    policy, teacher = rows()
    want = gkd.GKDTrainer.generalized_jsd_loss(policy, teacher, beta=beta, reduction="sum")
    order = torch.randperm(
        9, generator=torch.Generator().manual_seed(1)
    )  # the order of columns has no effect
    ours = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, lambda *given: js_divergence(*given, beta=beta))
    got = ours(policy[:, order], teacher[:, order]).sum()
    assert_close(got, want)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (got, want)]
    assert_close(*gradients)


@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
def test_gradcheck_and_no_effect_of_a_constant(name):
    policy, teacher = rows()
    divergence = TOP_K_DIVERGENCES[name]
    assert torch.autograd.gradcheck(lambda p: divergence(p, teacher), policy)
    shift = torch.arange(6)[:, None]
    assert_close(divergence(policy + shift, teacher - 2 * shift), divergence(policy, teacher))


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
def test_never_negative(name, k):
    """verl's sum over the top k of distributions that are not renormalised is, and is clamped there."""
    policy, teacher = rows()
    values = TOP_K_DIVERGENCES[name](*top(policy, teacher, k))
    assert (values >= 0).all()
    assert (values > 0).all() or k == 1
    p, q = (
        part.gather(1, teacher.topk(3).indices) for part in (policy.log_softmax(1), teacher.log_softmax(1))
    )
    assert ((p.exp() * (p - q)).sum(1) < 0).any()


@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
def test_value_and_gradient_are_exactly_zero_where_the_models_are_equal(name):
    policy, _ = rows(torch.float32)
    value_N = TOP_K_DIVERGENCES[name](policy, policy.detach().clone())
    (gradient,) = torch.autograd.grad(value_N.sum(), policy)
    assert (value_N == 0).all()
    assert (gradient == 0).all()


def test_the_reverse_kl_is_that_of_the_distributions():
    policy, teacher = rows()
    p, q = (F.log_softmax(part, -1) for part in top(policy, teacher, 4))
    assert_close(reverse_kl(*top(policy, teacher, 4)), (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
def test_finite_in_fp32_at_logits_that_are_far_apart(name):
    policy = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    value_N = TOP_K_DIVERGENCES[name](policy, torch.tensor([[-200.0, 200.0, 0.0]]))
    (gradient,) = torch.autograd.grad(value_N.sum(), policy)
    assert value_N.isfinite().all()
    assert gradient.isfinite().all()
    if name == "js_divergence":
        assert_close(value_N, torch.tensor([2.0]).log())


def test_beta_outside_of_the_open_interval_is_no_js_divergence():
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="beta in"):
            js_divergence(*rows(), beta=beta)
