"""The learning rate equals Hugging Face's schedule of the same name at every step."""

import pytest
import torch
from transformers import get_scheduler

from megatron_align.config import OptimizerConfig
from megatron_align.training.learning_rate import learning_rate

NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
@pytest.mark.parametrize("schedule", NAMES)
def test_equals_hugging_face(schedule, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(NAMES[schedule], optimizer, warmup, 20)
    config = OptimizerConfig(lr=3e-4, schedule=schedule, warmup_steps=warmup)
    for step in range(1, 21):
        assert learning_rate(config, step, 20) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()
