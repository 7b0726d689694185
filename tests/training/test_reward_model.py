"""A reward model goes out as ``AutoModelForSequenceClassification`` and gives there the rewards it was trained to give;
without scores its loss is Bradley-Terry, and a missing score counts for nothing (law 8)."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_align.objectives.reward import score_scale
from tests.harness import cli, training_ranks
from tests.harness.tiny import metrics_of, run_arguments, write_pairs

SCORES = {
    "chosen_score": lambda draw: draw.choice([None, draw.uniform(3, 5)]),
    "rejected_score": lambda draw: draw.choice([None, draw.uniform(0, 3)]),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("scored") / "pairs.jsonl", **SCORES)


@pytest.fixture(scope="module")
def trained(pool, tiny_models, scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    arguments = run_arguments(
        tiny_models(),
        scored,
        folder,
        data__validation=scored,
        train__global_batch_size=8,
        objective__name="reward",
        parallel__tensor=2,
        parallel__pipeline=2,
        checkpoint__export_hf=True,
    )
    pool.run(4, training_ranks.train, arguments)
    return folder


def hf_rewards(folder, records):
    """Return transformers' rewards of chosen and rejected, batch padded on the right."""
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    found = []
    for side in ("chosen", "rejected"):
        texts = [tokenizer.apply_chat_template(r["prompt"] + r[side], tokenize=False) for r in records]
        batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**batch).logits[:, 0])
    return found


def test_transformers_gives_the_rewards_of_training(trained, scored):
    records = [json.loads(line) for line in scored.read_text().splitlines()]
    chosen, rejected = hf_rewards(trained / "hf", records)
    [last] = metrics_of(trained, "validation")
    assert chosen.mean().item() == pytest.approx(last["chosen_reward"], abs=1e-5)
    assert rejected.mean().item() == pytest.approx(last["rejected_reward"], abs=1e-5)
    assert (chosen > rejected).float().mean().item() == pytest.approx(last["accuracy"], abs=1e-6)
    assert last["accuracy"] > 0.9
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    assert last["loss"] == pytest.approx(loss, rel=1e-5)  # alpha 0: Bradley-Terry, whatever scores there are


def test_the_checkpoint_verifies_against_its_export(pool, trained):
    arguments = ["convert", "verify", "--hf", str(trained / "hf"), "--checkpoint", str(trained)]
    [answer] = pool.run(1, cli.call, arguments)
    assert answer.code == 0, answer


def test_training_goes_on_from_a_reward_model(pool, trained, scored, tmp_path):
    """Exported and checkpointed heads are loaded, not drawn again."""
    [last] = metrics_of(trained, "validation")
    for name, start in (("hf", trained / "hf"), ("checkpoint", trained)):
        arguments = run_arguments(
            start,
            scored,
            tmp_path / name,
            train__steps=1,
            train__global_batch_size=48,
            objective__name="reward",
        )
        pool.run(1, training_ranks.train, arguments)
        assert metrics_of(tmp_path / name)[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_a_policy_is_no_reward_model(pool, trained, scored, tmp_path):
    from tests.harness.pool import RankFailed

    with pytest.raises(
        RankFailed, match="objective dpo needs a language model, got Qwen2ForSequenceClassification"
    ):
        pool.run(
            1,
            training_ranks.train,
            run_arguments(trained / "hf", scored, tmp_path / "run", objective__name="dpo"),
        )


def test_the_score_term_counts_where_there_are_scores(pool, tiny_models, tmp_path, scored):
    """loss(alpha) - loss(0) = alpha x mean over pairs of the squared errors that have a score."""
    records = [json.loads(line) for line in scored.read_text().splitlines()]
    rows = {}
    for alpha in (0.0, 0.5):
        folder = tmp_path / str(alpha)
        options = {"objective__alpha": alpha, "train__steps": 1, "train__global_batch_size": 48}
        options |= {"optimizer__lr": 1e-12, "checkpoint__export_hf": True}
        arguments = run_arguments(tiny_models(), scored, folder, objective__name="reward", **options)
        pool.run(1, training_ranks.train, arguments)
        [rows[alpha]] = metrics_of(folder)
    errors = 0.0
    for side, rewards in zip(
        ("chosen", "rejected"), hf_rewards(tmp_path / "0.0" / "hf", records), strict=True
    ):
        for record, reward in zip(records, rewards.tolist(), strict=True):
            score = record[f"{side}_score"]
            errors += 0.0 if score is None else (reward - score) ** 2
    assert errors > 0
    assert rows[0.5]["loss"] - rows[0.0]["loss"] == pytest.approx(0.5 * errors / len(records), rel=1e-4)


def test_scores_are_normalised_over_the_training_data():
    import numpy as np

    scores = np.array([1.0, np.nan, 3.0, 5.0])
    assert score_scale(scores, None) == score_scale(scores, "none") == (0.0, 1.0)
    shift, scale = score_scale(scores, "standard")
    assert np.nanmean((scores - shift) / scale) == pytest.approx(0.0)
    assert np.nanstd((scores - shift) / scale) == pytest.approx(1.0)
    shift, scale = score_scale(scores, "range")
    assert ((scores - shift) / scale)[[0, 2, 3]].tolist() == [-1.0, 0.0, 1.0]
    assert score_scale(np.array([2.0, 2.0]), "range") == (2.0, 1.0)  # all equal: only shifted
