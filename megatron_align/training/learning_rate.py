"""The learning rate as a pure function of the step, equal to Hugging Face's schedules of the same names."""

import math

from megatron_align.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: peak rate, warm-up and schedule.
        step: 1-based optimiser step.
        steps: steps of the complete run, after which cosine and linear reach 0.

    The k-th update uses the schedule's value at k - 1 (as torch's LambdaLR does): a warm-up starts at 0.
    """
    done, warmup = step - 1, config.warmup_steps
    if done < warmup:
        return config.lr * done / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr * max(0.0, 1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
