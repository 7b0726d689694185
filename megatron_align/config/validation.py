"""Options of validation: answers, tasks during training, early stopping. The docstring of a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_align.config.paths import expand_fields
from megatron_align.errors import require


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """When a run ends before its last step.

    Args:
        metric: of the validation rows: loss, accuracy, ..., or TASK/METRIC of validation.tasks
        patience: validations in a row that do not improve the metric; the last of them ends the run
        mode: min: lower is better; max: higher is; null: what is better of this metric
    """

    metric: str = "loss"
    patience: int = 3
    mode: Literal["min", "max"] | None = None

    def __post_init__(self) -> None:
        require(self.patience >= 1, f"train.early_stopping.patience must be at least 1, got {self.patience}")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Prompts that the model answers during training.

    Args:
        prompts: file of prompts, in the shapes that generate reads
        limit: first prompts only
        every: steps between the answers, besides those after the last step; null: train.validate_every
        max_tokens: longest answer
        temperature: 0 is greedy
        top_p: as in generate
        top_k: as in generate
        seed: of the random numbers
        as_chat: a prompt that is text is the turn of a user
    """

    prompts: str
    limit: int = 4
    every: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 1234
    as_chat: bool = False

    def __post_init__(self) -> None:
        expand_fields(self, "prompts")
        for name in ("limit", "every"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"validation.generate.{name} must be at least 1, got {value}"
            )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Answers and tasks of the model while it is trained, besides the metrics of data.validation.

    Args:
        generate: a few prompts that it answers, into the log and checkpoint.dir/samples.jsonl:
            {prompts, limit, every, max_tokens, temperature, ...}; null: none
        tasks: tasks of an evaluation, as in the configuration of evaluate, run at every validation: [{name, kind,
            data, ...}]; metrics.jsonl has them as NAME/METRIC, checkpoint.dir/validation/step_NNNNNN their results
    """

    generate: SamplesConfig | None = field(default=None)
    tasks: list[dict[str, Any]] = field(default_factory=list)
