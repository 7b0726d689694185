"""Law 13 and bad input: an online run is refused with exit code 2 and one line before the ranks meet."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_align.config.rollout import RolloutConfig
from megatron_align.errors import TrainingFault
from megatron_align.train import main
from megatron_align.training.online import RolloutSteps
from tests.harness.tiny import run_arguments


def ranked(counts):
    return [
        {"prompt": f"{i}?", "completions": [{"content": "a" * (k + 1), "score": k} for k in range(count)]}
        for i, count in enumerate(counts)
    ]


PROMPTS, RANKED = [{"prompt": "one?"}, {"prompt": "two?"}], ranked([2, 2, 2])
DATA = {"rollout__engine": "data"}
REWARD = {"rewards": "[{kind: length, min: 2}]"}
REFUSED = {
    "one completion": (
        PROMPTS,
        {**REWARD, "rollout__completions": 1},
        "objective.advantage group compares the completions of a prompt: rollout.completions must be at least 2, got 1",
    ),
    "one completion of given data": (
        ranked([2, 1, 2]),
        DATA,
        "prompts.jsonl:2: field 'completions' must hold at least 2 completions, got 1",
    ),
    "another number of given completions": (
        RANKED,
        {**DATA, "rollout__completions": 3},
        "data.train: every prompt must have rollout.completions = 3 completions, or the option be null; got 2",
    ),
    "more tokens than there are": (
        PROMPTS,
        {**REWARD, "rollout__top_k": 260},
        r"rollout.top_k must be at most the model's 259 tokens \(0: all\), got 260",
    ),
    "given completions are complete": (
        RANKED,
        {**DATA, "objective__mask_truncated_completions": True},
        "objective.mask_truncated_completions does not apply to rollout.engine data",
    ),
    "baseline of given completions": (
        RANKED,
        {**DATA, "objective__truncated_in_baseline": False},
        "objective.truncated_in_baseline does not apply to rollout.engine data",
    ),
    "correction of given completions": (
        RANKED,
        {**DATA, "rollout__correction": "{mode: token_mask, cap: 3.0}"},
        "rollout.correction does not apply to rollout.engine data",
    ),
    "KL corrected by nothing": (
        PROMPTS,
        {**REWARD, "objective__beta": 0.1, "objective__correct_kl": True, "rollout__correction": "null"},
        "objective.correct_kl needs rollout.correction .* got rollout.correction null",
    ),
    "longer than the pack": (
        PROMPTS,
        {**REWARD, "rollout__max_tokens": 200},
        r"prompts.jsonl:1: a prompt of \d+ tokens with 3 completions of up to rollout.max_tokens = 200 takes 6\d\d",
    ),
    "no rewards": (PROMPTS, {}, "rewards"),
    "rewards of given data": (RANKED, {**DATA, **REWARD}, "rewards"),
    "an option of engines": (
        RANKED,
        {**DATA, "rollout__top_p": 0.9},
        "rollout.top_p does not apply to rollout.engine data",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tiny_models, tmp_path, capsys):
    records, options, pattern = REFUSED[name]
    data, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, records)))
    options = {"rollout__max_tokens": 16, "train__global_batch_size": 1, **options}
    arguments = run_arguments(tiny_models(), data, folder, objective__name="grpo", **options)
    capsys.readouterr()  # what making the model printed
    code = main(arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", error), error
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "found, bound, stale, stops",
    [
        (0.04, None, 0, False),
        (0.06, None, 0, True),
        (0.06, None, 1, False),
        (0.6, None, 1, True),
        (0.06, 0.1, 0, False),
        (float("nan"), 0.1, 0, True),
    ],
)
def test_an_engine_that_differs_too_much_stops_the_run(found, bound, stale, stops):
    """Log-probs of the engine against the trainer's, on average; NaN is never within a bound."""
    trainer = SimpleNamespace(
        config=SimpleNamespace(rollout=RolloutConfig(mismatch_stop=bound, off_policy_steps=stale))
    )
    steps = SimpleNamespace(trainer=trainer, _engines=SimpleNamespace())
    with pytest.raises(TrainingFault, match="step 3: log-probs of the engine") if stops else nullcontext():
        RolloutSteps.require_match(steps, 3, {"mismatch_mean": found})
