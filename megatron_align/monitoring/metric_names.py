"""Every number that a run writes into metrics.jsonl, with unit and meaning: the table of the docs and the report.

``python -m megatron_align.monitoring.metric_names`` prints ``docs/metrics.md``.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.registry import OBJECTIVES

ROW_KEYS = {
    "step": "optimiser step, from 1",
    "split": "absent: a training step; validation: over all validation data; timing: where a step's time went; "
    "save: a checkpoint was completed",
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
        meaning="the objective's loss over the global batch, all ranks",
    ),
    *_of_objectives(),
    Metric(
        name="grad_norm",
        section="Learning",
        unit="norm",
        meaning="2-norm of all gradients, before clipping to optimizer.clip_grad",
        trl="grad_norm",
        written="training",
    ),
    Metric(
        name="lr",
        section="Learning",
        unit="per step",
        meaning="learning rate of the step",
        trl="learning_rate",
        written="training",
    ),
    Metric(
        name="tokens_per_second",
        section="Speed",
        unit="tokens/s",
        meaning="tokens divided by step_seconds, all ranks together; padding not counted",
        written="training",
    ),
    Metric(
        name="step_seconds",
        section="Speed",
        unit="s",
        meaning="time of the step on rank 0, from requesting data to updated weights; without validation and saving",
        written="training",
    ),
    Metric(
        name="mfu",
        section="Speed",
        unit="share",
        meaning="model FLOPs utilisation: operations the model needs, divided by the chips' peak over the step's time; "
        "on CPUs by the speed of matrix products that the ranks measure at start",
        written="timing, on chips with a known peak and on CPUs in fp32",
    ),
    Metric(
        name="peak_memory_gb",
        section="Speed",
        unit="GB",
        meaning="peak memory of any rank so far: of tensors on a GPU, of the process on CPU",
        written="timing",
    ),
    Metric(
        name="tokens",
        section="Data",
        unit="tokens",
        meaning="tokens computed in the step, padding not counted; a shared prompt counts once",
        written="training",
    ),
    Metric(
        name="trained_tokens",
        section="Data",
        unit="tokens",
        meaning="tokens of the step that enter the loss",
        written="training",
    ),
    Metric(
        name="tokens_saved",
        section="Data",
        unit="tokens",
        meaning="tokens of repeated prompts that sharing did not compute again",
        written="training",
    ),
    Metric(
        name="padding",
        section="Data",
        unit="share",
        meaning="share of computed tokens that belong to no sample",
        written="training",
    ),
    Metric(
        name="samples",
        section="Data",
        unit="samples",
        meaning="samples (pairs, lists) of the step",
        written="training",
    ),
    Metric(
        name="recomputed_samples",
        section="Data",
        unit="samples",
        meaning="samples longer than a slab of the log-prob engine, which are projected onto the vocabulary twice",
        written=", ".join(_WHOLE_SAMPLES),
    ),
    Metric(
        name="skipped_steps",
        section="Health",
        unit="steps",
        meaning="steps skipped so far, as loss or gradients were NaN or infinite (train.on_nonfinite: skip)",
        written="training",
    ),
    Metric(
        name="loss_spikes",
        section="Health",
        unit="steps",
        meaning="steps so far whose loss exceeded the median of the last 64 healthy steps by more than 8 deviations "
        "(from the median absolute deviation) and by at least 5 % of the median",
        written="training",
    ),
    Metric(
        name="grad_norm_outliers",
        section="Health",
        unit="steps",
        meaning="steps so far whose gradient norm exceeded its recent ones in the same sense",
        written="training",
    ),
    Metric(
        name="suspects",
        section="Health",
        unit="samples",
        meaning="numbers, in the token store, of the samples that a bad step is traced to: those not finite, or "
        "those of the pack with the largest mean loss; `megatron-align prepare --sample N` shows one",
        written="training, bad steps only",
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
            ("data", "waiting for the step's packs"),
            (
                "forward_backward",
                "the pre-pass and all micro-batches, with the idle time of pipeline stages",
            ),
            ("wait", "waiting for the slowest rank, before gradients are summed"),
            ("optimizer", "gradient reduction, clipping, update, gathering the updated weights"),
        )
        for suffix in ("", "_max")
    ),
    Metric(
        name="straggler_rank",
        section="Timing",
        unit="rank",
        meaning="the slowest rank",
        written="timing, several ranks",
        curve=False,
    ),
    Metric(
        name="straggler_seconds",
        section="Timing",
        unit="s",
        meaning="mean time that the other ranks wait for the slowest",
        written="timing, several ranks",
    ),
    Metric(
        name="save_pause_seconds",
        section="Saving",
        unit="s",
        meaning="how long the save blocked training",
        written="save",
    ),
    Metric(
        name="save_seconds",
        section="Saving",
        unit="s",
        meaning="time until the checkpoint was complete",
        written="save",
        curve=False,
    ),
    Metric(
        name="save_bytes",
        section="Saving",
        unit="bytes",
        meaning="size of the checkpoint",
        written="save",
        curve=False,
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}

_HEAD = """# Metrics

`checkpoint.dir/metrics.jsonl` has one JSON object per line: for each training step, each validation, each completed
checkpoint, and every `logging.timing_every` steps for where a step's time went. TensorBoard, Weights & Biases and
MLflow get the same numbers, named `train/loss`, `validation/loss`, `timing/wait_seconds`. A number that is not finite
is `null`. A resumed run drops the rows after its checkpoint and writes them again. `megatron-align report DIR` draws
them. Tasks of `validation.tasks` are columns `TASK/METRIC` of the validations, with the metrics of `evaluate`
([evaluation.md](evaluation.md)). TRL logs some of them, to Weights & Biases too, under other names: column TRL.

Steps whose loss or gradients are not finite end the run or, with `train.on_nonfinite: skip`, are skipped: weights,
moments and the objective's own state stay as they were, bit for bit, on every rank; the learning rate follows the
step's number. Ten in a row end the run. Spikes and outliers are only counted and reported: the step is taken.

This page is printed by `python -m megatron_align.monitoring.metric_names`; a test holds the two equal, and compares
them with real runs.
"""


def to_markdown() -> str:
    """Return the text of ``docs/metrics.md``."""
    lines = [_HEAD, "| key | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ROW_KEYS.items()]
    for section in dict.fromkeys(metric.section for metric in METRICS):
        metrics = [metric for metric in METRICS if metric.section == section]
        trl = any(metric.trl for metric in metrics)
        columns = ["metric", *(["TRL"] if trl else []), "unit", "written by", "meaning"]
        lines += ["", f"## {section}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for metric in metrics:
            alias = [f"`{metric.trl}`" if metric.trl else ""] if trl else []
            cells = [f"`{metric.name}`", *alias, metric.unit, metric.written, metric.meaning]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
