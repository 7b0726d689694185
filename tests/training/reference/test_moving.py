"""A reference that follows the policy is, after each move, mixup_alpha x policy + (1 - mixup_alpha) x its old self."""

from types import SimpleNamespace

import pytest
import torch

from megatron_align.training.reference.logprobs import LiveReference
from tests.harness import training_ranks
from tests.harness.tiny import run_arguments, write_pairs


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_move_mixes_by_alpha(alpha):
    torch.manual_seed(0)
    reference, policy = ([torch.nn.Linear(3, 4) for _ in range(2)] for _ in range(2))
    expected = [
        torch.lerp(old, new, alpha)
        for one, other in zip(reference, policy, strict=True)
        for old, new in zip(one.parameters(), other.parameters(), strict=True)
    ]
    LiveReference(SimpleNamespace(chunks=reference), None).move(policy, alpha)
    moved = [parameter for chunk in reference for parameter in chunk.parameters()]
    assert all(torch.equal(own, want) for own, want in zip(moved, expected, strict=True))


def test_a_run_moves_it_to_the_gathered_weights_by_its_alpha(pool, tiny_models, tmp_path):
    """The ranks hold shards of new weights, which are gathered late: the reference must not move to the old ones."""
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
    arguments = run_arguments(
        tiny_models(),
        write_pairs(tmp_path / "pairs.jsonl", samples=16),
        tmp_path / "run",
        objective__name="dpo",
        reference__mode="live",
        reference__sync_steps=2,
        reference__mixup_alpha=0.5,
        train__global_batch_size=4,
        train__steps=2,
        **overlap,
    )
    for moves in pool.run(2, training_ranks.reference_moves, arguments):
        assert moves == [(0.0, True), (0.5, True)]  # after step 1 it rests, after step 2 it is half way
