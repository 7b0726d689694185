"""Metrics that objectives report: units and meaning, once for the code, the docs and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Section = Literal["Learning", "Preferences", "Speed", "Data", "Health", "Timing", "Saving", "Tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number of a row of metrics.

    Args:
        name: its key.
        unit: of the number.
        meaning: one sentence fragment for the docs and the report.
        section: where a report shows it.
        trl: its name in TRL's logs (and so in Weights & Biases); empty: TRL has none of the same meaning.
        written: which rows have it; an objective's own metrics need not say so.
        curve: a report draws it as a curve over the steps.
        lower_is_better: what early stopping and ``checkpoint.keep_best`` take for better.
    """

    name: str
    unit: str
    meaning: str
    section: Section = "Preferences"
    trl: str = ""
    written: str = "all"
    curve: bool = True
    lower_is_better: bool = False


NLL = Metric(
    name="nll",
    section="Learning",
    unit="nats per token",
    meaning="the likelihood term on chosen responses, where the loss has one",
    trl="nll_loss",
    lower_is_better=True,
)
REWARD_MARGIN = Metric(
    name="reward_margin",
    unit="reward",
    meaning="mean reward of chosen responses minus that of rejected ones; should rise from 0",
    trl="rewards/margins",
)
ACCURACY = Metric(
    name="accuracy",
    unit="share",
    meaning="pairs whose chosen response has the higher reward; 0.5 is chance; of a ranked list its best and worst",
    trl="rewards/accuracies",
)
CHOSEN_REWARD = Metric(
    name="chosen_reward",
    unit="reward",
    meaning="mean reward of chosen (desirable) responses: beta times the log-ratio to the reference; without a "
    "reference beta times the log-prob, per token for simpo, orpo, ipo and tpo-l; for a reward model its output",
    trl="rewards/chosen",
)
REJECTED_REWARD = Metric(
    name="rejected_reward",
    unit="reward",
    meaning="the same for rejected (other) responses; with dpo both often fall, this one faster",
    trl="rewards/rejected",
)
CHOSEN_LOGPS = Metric(
    name="chosen_logps",
    unit="nats",
    meaning="mean summed log-prob of chosen (desirable) responses under the policy",
    trl="logps/chosen",
)
REJECTED_LOGPS = Metric(
    name="rejected_logps",
    unit="nats",
    meaning="the same for rejected (other) responses",
    trl="logps/rejected",
)
