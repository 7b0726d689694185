"""Every number that a run writes into metrics.jsonl, and what it means: the one table behind the docs and the report.

``python -m megatron_align.monitoring.metric_names`` prints ``docs/metrics.md``.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.registry import OBJECTIVES

ROW_KEYS = {
    "step": "optimiser step, from 1",
    "split": "absent: a training step; validation: over the whole validation data; timing: where a step's time went; "
    "save: a checkpoint that is complete",
}


def _of_objectives() -> tuple[Metric, ...]:
    """Return the metrics of the built-in objectives, each with the objectives that write it."""
    writers: dict[Metric, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        for metric in objective.metrics:
            writers.setdefault(metric, []).append(name)
    return tuple(replace(metric, written=", ".join(names)) for metric, names in writers.items())


_WHOLE_SAMPLES = [name for name, objective in OBJECTIVES.items() if objective.whole_samples]
METRICS = (
    Metric(
        name="loss",
        section="Learning",
        unit="nats",
        meaning="the objective's loss, over the whole global batch and all ranks",
    ),
    Metric(
        name="grad_norm",
        section="Learning",
        unit="norm",
        meaning="2-norm of all gradients, before clipping to optimizer.clip_grad",
        written="training",
    ),
    Metric(
        name="lr",
        section="Learning",
        unit="per step",
        meaning="learning rate of the step",
        written="training",
    ),
    *_of_objectives(),
    Metric(
        name="tokens_per_second",
        section="Speed",
        unit="tokens/s",
        meaning="tokens over step_seconds, of all ranks together; padding not counted",
        written="training",
    ),
    Metric(
        name="step_seconds",
        section="Speed",
        unit="s",
        meaning="time of the step on rank 0, from asking for data to the new weights; without validation and saving",
        written="training",
    ),
    Metric(
        name="mfu",
        section="Speed",
        unit="share",
        meaning="floating-point operations that the model needs, over what the chips could do in the step's time",
        written="timing, where the chip's peak is known",
    ),
    Metric(
        name="peak_memory_gb",
        section="Speed",
        unit="GB",
        meaning="most memory that any rank has held so far: tensors on a GPU, the whole process on CPU",
        written="timing",
    ),
    Metric(
        name="tokens",
        section="Data",
        unit="tokens",
        meaning="computed in the step, padding not counted; a shared prompt once",
        written="training",
    ),
    Metric(
        name="trained_tokens",
        section="Data",
        unit="tokens",
        meaning="of them those the loss is taken on",
        written="training",
    ),
    Metric(
        name="tokens_saved",
        section="Data",
        unit="tokens",
        meaning="that sharing prompts did not compute again",
        written="training",
    ),
    Metric(
        name="padding",
        section="Data",
        unit="share",
        meaning="computed tokens that belong to no sample",
        written="training",
    ),
    Metric(
        name="samples",
        section="Data",
        unit="samples",
        meaning="(pairs, lists) of the step",
        written="training",
    ),
    Metric(
        name="recomputed_samples",
        section="Data",
        unit="samples",
        meaning="longer than a slab of the log-prob engine: projected onto the vocabulary twice",
        written=", ".join(_WHOLE_SAMPLES),
    ),
    Metric(
        name="skipped_steps",
        section="Health",
        unit="steps",
        meaning="so far, left out as loss or gradients were NaN or infinite (train.on_nonfinite: skip)",
        written="training",
    ),
    Metric(
        name="loss_spikes",
        section="Health",
        unit="steps",
        meaning="so far, with a loss above the median of the last 64 healthy steps by more than 8 deviations "
        "(from the median absolute deviation), and by 5 % of the median at least",
        written="training",
    ),
    Metric(
        name="grad_norm_outliers",
        section="Health",
        unit="steps",
        meaning="so far, with a gradient norm above its last ones in the same sense",
        written="training",
    ),
    Metric(
        name="suspects",
        section="Health",
        unit="samples",
        meaning="numbers, in the token store, of the samples behind this step's trouble: those not finite, or the pack "
        "with the largest mean loss; `megatron-align prepare --sample N` shows one",
        written="training, steps with trouble",
        curve=False,
    ),
    *(
        Metric(
            name=f"{phase}_seconds{suffix}",
            section="Timing",
            unit="s",
            meaning=f"{meaning}; {'largest' if suffix else 'mean'} over ranks",
            written="timing",
            curve=not suffix,
        )
        for phase, meaning in (
            ("data", "until the step's packs are there"),
            (
                "forward_backward",
                "all micro-batches, what is scored ahead of them, and idle time of pipeline stages",
            ),
            ("wait", "for the slowest rank, before gradients are summed"),
            ("optimizer", "sums of gradients, clipping, update, gathering of new weights"),
        )
        for suffix in ("", "_max")
    ),
    Metric(
        name="straggler_rank",
        section="Timing",
        unit="rank",
        meaning="the one that the others wait for",
        written="timing, several ranks",
        curve=False,
    ),
    Metric(
        name="straggler_seconds",
        section="Timing",
        unit="s",
        meaning="how long the others wait for it, in the mean",
        written="timing, several ranks",
    ),
    Metric(
        name="save_pause_seconds",
        section="Saving",
        unit="s",
        meaning="how long training stood still for the checkpoint",
        written="save",
    ),
    Metric(
        name="save_seconds",
        section="Saving",
        unit="s",
        meaning="until the checkpoint was complete",
        written="save",
        curve=False,
    ),
    Metric(
        name="save_bytes",
        section="Saving",
        unit="bytes",
        meaning="of the whole checkpoint",
        written="save",
        curve=False,
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}

_HEAD = """# Metrics

`checkpoint.dir/metrics.jsonl` has one JSON object a line: of each training step, of each validation, of each checkpoint
that is complete, and every `logging.timing_every` steps of where a step's time went. TensorBoard, Weights & Biases and
MLflow get the same numbers, named `train/loss`, `validation/loss`, `timing/wait_seconds`. A number that is not finite
is `null`. A resumed run drops the rows after its checkpoint and writes them again. `megatron-align report DIR` draws
them.

Steps whose loss or gradients are not finite end the run or, with `train.on_nonfinite: skip`, are left out: weights,
moments and the objective's own state stay as they were, bit by bit, on every rank; the learning rate goes by the step's
number. Ten in a row end the run. Spikes and outliers are counted and reported, nothing else: the step is taken.

This page is printed by `python -m megatron_align.monitoring.metric_names`; a test holds the two equal, and runs to it.
"""


def to_markdown() -> str:
    """Return the text of ``docs/metrics.md``."""
    lines = [_HEAD, "| key | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ROW_KEYS.items()]
    for section in dict.fromkeys(metric.section for metric in METRICS):
        lines += ["", f"## {section}", "", "| metric | unit | written by | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{metric.name}` | {metric.unit} | {metric.written} | {metric.meaning} |"
            for metric in METRICS
            if metric.section == section
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
