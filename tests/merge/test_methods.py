"""Every formula equals what its paper says, computed in float64 element by element; cutting a tensor into blocks
changes nothing.

Shapes: E elements, N models.
"""

import itertools
import math

import pytest
import torch

from megatron_align.errors import InputError
from megatron_align.merge.methods import (
    Block,
    Dare,
    Linear,
    ModelStock,
    Slerp,
    TaskArithmetic,
    Ties,
    kept_magnitudes,
)

E = 999


@pytest.fixture
def tensors():
    """A base and three models near it, their task vectors at acute angles."""
    torch.manual_seed(0)
    base_E, common_E = torch.randn(E), 0.1 * torch.randn(E)
    return base_E, base_E + common_E + 0.1 * torch.randn(3, E)


class Pieces:
    """Blocks of the given size; each walk gives fresh memory, as formulas may change it."""

    def __init__(self, base_E, models_NE, size):
        self.base_E, self.models_NE, self.size = base_E, models_NE, size

    def __iter__(self):
        for start in range(0, self.models_NE.shape[1], self.size):
            span = slice(start, start + self.size)
            base_E = None if self.base_E is None else self.base_E[span].clone()
            yield Block(base_E, self.models_NE[:, span].clone())


def merged(method, base_E, models_NE, size=128):
    return torch.cat(list(method.merge(Pieces(base_E, models_NE, size), "a.weight")))


def assert_near(got_E, want, scale=1.0):
    """fp32 sums of a few numbers of size 1: 1e-6 is some ten roundings."""
    assert got_E.dtype == torch.float32
    want_E = torch.as_tensor(want, dtype=torch.float64)
    assert (got_E.double() - want_E).abs().max() < 1e-6 * scale


def test_linear_divides_by_the_sum_of_weights(tensors):
    _, models = tensors
    a, b, c = models.double()
    assert_near(merged(Linear(weights=(1.0, 2.0, 5.0)), None, models), (a + 2 * b + 5 * c) / 8)
    assert_near(merged(Linear(), None, models), (a + b + c) / 3)


def test_task_arithmetic_adds_scaled_task_vectors(tensors):
    base, models = tensors
    exact, (a, b, c) = base.double(), models.double()
    want = exact + 0.4 * (1 * (a - exact) - 0.5 * (b - exact) + 2 * (c - exact))
    assert_near(merged(TaskArithmetic(weights=(1.0, -0.5, 2.0), scale=0.4), base, models), want)
    want = exact + 3 * ((a + b + c) / 3 - exact)
    assert_near(merged(TaskArithmetic(scale=3.0), base, models), want)


def stock_by_hand(base, models):
    base, models = base.double(), models.double()
    cosines = []
    for one, other in itertools.combinations(models, 2):
        x, y = (one - base).tolist(), (other - base).tolist()
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        lengths = (math.sqrt(math.fsum(p * p for p in v)) for v in (x, y))
        cosines.append(dot / math.prod(lengths))
    cosine = sum(cosines) / len(cosines)
    count = len(models)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio, ratio * models.mean(0) + (1 - ratio) * base


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_goes_as_far_as_the_angle_says(tensors, count):
    base, models = tensors
    ratio, want = stock_by_hand(base, models[:count])
    assert 0.5 < ratio < 0.95  # neither end: the formula is seen
    assert_near(merged(ModelStock(), base, models[:count]), want)


def test_model_stock_at_the_ends_of_the_angle(tensors):
    base, models = tensors
    same = models[:1].expand(3, E)
    assert_near(merged(ModelStock(), base, same), same[0].double())  # no angle: the models
    unlike = torch.stack([models[0], 2 * base - models[0]])
    assert_near(merged(ModelStock(), base, unlike), base.double())  # opposite: the base, not past it
    assert torch.equal(merged(ModelStock(), base, base.expand(3, E)), base)  # untouched
    one_untouched = torch.stack([base, models[0]])
    assert torch.equal(merged(ModelStock(), base, one_untouched), base)


def test_slerp_keeps_the_angle_even(tensors):
    _, models = tensors
    a, b = models[0], torch.randn(E)
    exact_a, exact_b = a.double(), b.double()
    angle = torch.acos(exact_a @ exact_b / (exact_a.norm() * exact_b.norm()))
    for t in (0.0, 0.3, 1.0):
        want = (torch.sin((1 - t) * angle) * exact_a + torch.sin(t * angle) * exact_b) / torch.sin(angle)
        assert_near(merged(Slerp(t=t), None, torch.stack([a, b])), want)


def test_slerp_of_parallel_tensors_is_straight(tensors):
    base, _ = tensors
    assert_near(merged(Slerp(t=0.25), None, torch.stack([base, 3 * base])), base.double() * 1.5)
    assert torch.equal(merged(Slerp(), None, torch.zeros(2, E)), torch.zeros(E))


def ties_by_hand(base, models, weights, density, scale):
    base, tasks = base.tolist(), (models - base).tolist()
    kept = max(1, int(density * len(base)))
    least = [sorted(map(abs, task))[-kept] for task in tasks]
    out = []
    for e, x in enumerate(base):
        trimmed = [task[e] if abs(task[e]) >= low else 0.0 for task, low in zip(tasks, least, strict=True)]
        total = sum(w * x for w, x in zip(weights, trimmed, strict=True))
        agreeing = [(w, x) for w, x in zip(weights, trimmed, strict=True) if x * total > 0]
        share = sum(w for w, _ in agreeing)
        out.append(x + scale * (sum(w * x for w, x in agreeing) / share if agreeing else 0.0))
    return out


@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1.0])
def test_ties_trims_elects_and_averages_what_agrees(tensors, density):
    base, models = tensors
    got = merged(Ties(weights=(1.0, 2.0, 0.5), density=density, scale=0.7), base, models)
    assert_near(got, ties_by_hand(base, models, (1.0, 2.0, 0.5), density, 0.7))
    assert 0 < (got != base).sum() <= E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "many equal magnitudes"])
def test_the_smallest_kept_magnitude_is_exact(dtype):
    torch.manual_seed(1)
    models = (torch.randn(3, E) * torch.tensor([[1e-30], [1.0], [1e30]])).to(dtype).float()
    models[1, :200] = 0
    blocks = Pieces(torch.zeros(E), models, 100)
    for count in (1, 2, 500, 998, 999):
        want = models.abs().sort(descending=True).values[:, count - 1]
        assert torch.equal(kept_magnitudes(blocks, count / E + 1e-9), want)


def test_dare_drops_at_random_and_rescales_the_rest(tensors):
    base, models = tensors
    task = models[0] - base
    got = (merged(Dare(density=0.25, scale=2.0), base, models[:1]) - base) / task
    kept = (got - 8).abs() < 1e-2  # scale / density
    assert (kept | (got == 0)).all()
    share = kept.float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / E)
    again = (merged(Dare(density=0.25, scale=2.0, seed=1), base, models[:1]) - base) / task
    assert not torch.equal(again != 0, got != 0)
    assert_near(merged(Dare(density=1.0), base, models), models.double().mean(0))  # nothing dropped


def test_what_dare_drops_of_a_model_is_its_own_draw(tensors):
    base, models = tensors
    weights = (1.0, 0.0, 0.0)
    alone = merged(Dare(weights=(1.0,), density=0.5), base, models[:1])
    among = merged(Dare(weights=weights, density=0.5), base, models)
    assert torch.equal(alone, among)
    moved = merged(Dare(weights=(0.0, 1.0), density=0.5), base, torch.stack([models[1], models[0]]))
    assert not torch.equal(moved, alone)


METHODS = [Linear(), TaskArithmetic(), ModelStock(), Slerp(), Ties(), Dare()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_blocks_do_not_matter(tensors, method):
    base, models = tensors
    models = models[:2] if isinstance(method, Slerp) else models
    uncut = merged(method, base if method.needs_base else None, models, size=E)
    cut = merged(method, base if method.needs_base else None, models, size=7)
    assert_near(cut, uncut.double())
    if isinstance(method, (Ties, Dare)):
        assert torch.equal(cut != base, uncut != base)


REFUSED = {
    "too few weights": (
        Linear(weights=(1.0,)),
        2,
        "--weights must have one number for each of 2 models, got 1",
    ),
    "weights without a sum": (Linear(weights=(1.0, -1.0)), 2, "--weights must not sum to 0"),
    "one for stock": (ModelStock(), 1, "model_stock needs two models or more, got 1"),
    "three to go between": (Slerp(), 3, "slerp needs two models, or a base and one model; got 3"),
    "a weight that divides": (Ties(weights=(1.0, 0.0)), 2, "--weights must be positive"),
    "nothing kept": (Dare(density=0.0), 2, "--density must be over 0 and at most 1, got 0.0"),
    "no number": (TaskArithmetic(scale=math.nan), 2, "--scale must be a finite number, got nan"),
    "no weight": (TaskArithmetic(weights=(1.0, math.inf)), 2, "--weights must be finite numbers"),
}


@pytest.mark.parametrize("method, models, line", REFUSED.values(), ids=REFUSED)
def test_options_that_mean_nothing_are_refused(method, models, line):
    with pytest.raises(InputError) as error:
        method.check(models)
    assert str(error.value).startswith(line)
