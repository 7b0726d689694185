"""A residual sum that the norm after it computes has megatron-core's bits, and no norm is computed twice.

On a GPU kernels do both at once. Here PyTorch's operations stand for them, so that only the way of the sum differs.
"""

import pytest
import torch

from tests.harness import costs, model_ranks

BATCH = costs.one_pack([9, 14], 24)


@pytest.mark.parametrize(
    "recompute, added, alone",
    [
        ((0, ()), 8, 1),  # two of each of four layers; the first norm has no sum before it
        ((2, ()), 12, 5),  # twice three of each two layers; twice the first norm of each two, once the last
        ((0, ("norms",)), 1, 16),  # the last norm is not recomputed
    ],
)
def test_sums_by_norms(pool, tiny_models, recompute, added, alone):
    [[plain, by_norms]] = pool.run(
        1, model_ranks.sums_by_norms, tiny_models("qwen2_untied"), recompute, BATCH
    )
    assert plain[1] == 0
    assert by_norms[1:] == (added, alone)
    assert plain[0].keys() == by_norms[0].keys()
    for name, want in plain[0].items():
        assert torch.equal(by_norms[0][name], want), name
