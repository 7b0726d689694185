"""Every number that a run writes into metrics.jsonl, and what it means: the one table behind the docs and the report.

``python -m megatron_align.monitoring.metric_names`` prints ``docs/metrics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Section = Literal["Learning", "Preferences", "Speed", "Data", "Health", "Timing", "Saving"]
_OF_PAIRS = "dpo, cpo, simpo, tpo, orpo, reward"
_OF_JUDGED = f"{_OF_PAIRS}, kto, bco"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number of a row.

    Args:
        name: its key.
        section: where a report shows it.
        unit: of the number.
        meaning: for people.
        written: by which objectives, or in which rows.
        curve: it makes a curve over the steps.
    """

    name: str
    section: Section
    unit: str
    meaning: str
    written: str = "all"
    curve: bool = True


ROW_KEYS = {
    "step": "optimiser step, from 1",
    "split": "absent: a training step; validation: over the whole validation data; timing: where a step's time went; "
    "save: a checkpoint that is complete",
}

METRICS = (
    Metric(
        name="loss",
        section="Learning",
        unit="nats",
        meaning="the objective's loss, over the whole global batch and all ranks",
    ),
    Metric(
        name="nll",
        section="Learning",
        unit="nats per token",
        meaning="the likelihood term on chosen responses, where the loss has one",
        written="dpo, cpo, tpo, orpo",
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
    Metric(
        name="reward_margin",
        section="Preferences",
        unit="reward",
        meaning="mean reward of chosen less that of rejected responses; should rise from 0",
        written=_OF_JUDGED,
    ),
    Metric(
        name="accuracy",
        section="Preferences",
        unit="share",
        meaning="pairs whose chosen response has the higher reward; 0.5 is chance; of a ranked list its best and worst",
        written=_OF_PAIRS,
    ),
    Metric(
        name="chosen_reward",
        section="Preferences",
        unit="reward",
        meaning="mean reward of chosen (desirable) responses: beta times the log-ratio to the reference; without a "
        "reference beta times the log-prob, per token for simpo, orpo, ipo and tpo-l; of a reward model its output",
        written=_OF_JUDGED,
    ),
    Metric(
        name="rejected_reward",
        section="Preferences",
        unit="reward",
        meaning="the same of rejected (other) responses; with dpo both often fall, this one faster",
        written=_OF_JUDGED,
    ),
    Metric(
        name="chosen_logps",
        section="Preferences",
        unit="nats",
        meaning="mean summed log-prob of chosen (desirable) responses under the policy",
        written="dpo, cpo, simpo, tpo, orpo, kto, bco",
    ),
    Metric(
        name="rejected_logps",
        section="Preferences",
        unit="nats",
        meaning="the same of rejected (other) responses",
        written="dpo, cpo, simpo, tpo, orpo, kto, bco",
    ),
    Metric(
        name="desirable",
        section="Preferences",
        unit="share",
        meaning="examples of the step labelled desirable",
        written="kto, bco",
    ),
    Metric(
        name="baseline",
        section="Preferences",
        unit="nats",
        meaning="KTO's z: mean log-ratio of mismatched prompts and responses, at least 0",
        written="kto",
    ),
    Metric(
        name="delta",
        section="Preferences",
        unit="reward",
        meaning="BCO's reward shift: running mean of all rewards so far",
        written="bco",
    ),
    Metric(
        name="reward_histogram",
        section="Preferences",
        unit="counts",
        meaning="responses by reward, between edges from -8 to 8 and beyond on both sides",
        written="reward",
        curve=False,
    ),
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
        written="dpo, cpo, simpo, tpo, orpo, kto, bco",
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
