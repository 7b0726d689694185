"""Sampled data hold the distinct answers of all models with their scores, each filter counts what it drops."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_align.data.formats.files import read_file
from megatron_align.errors import InputError
from megatron_align.evaluation import sample as sampling_module
from megatron_align.evaluation.generation import Generated
from megatron_align.evaluation.sample import SampleOptions, require_language_models, sample
from megatron_align.rollout.types import Sampling
from tests.harness import training_ranks
from tests.harness.tiny import make_model, run_arguments, write_pairs

PROMPTS = [
    {"prompt": [{"role": "user", "content": "2 + 2"}], "answer": "4"},
    {"prompt": [{"role": "user", "content": "3 + 3"}], "answer": "6"},
    {"prompt": [{"role": "user", "content": "4 + 4"}], "answer": "8"},
    {"prompt": [{"role": "user", "content": "5 + 5"}], "answer": "10"},
]
# The answers of two models to each prompt: (text, how it ended)
ANSWERS = [
    [[("4", "stop"), ("five it is", "stop")], [("4", "stop"), ("half of the", "length")]],
    [[("6", "stop"), (" ", "stop")], [("6", "stop"), ("6", "stop")]],
    [[("9", "stop"), ("ten", "stop")], [("eleven of them", "stop"), ("12", "stop")]],
    [[("10", "stop"), ("twenty of them", "stop")], [("thirty of them", "stop"), ("10 of 20 of 30", "stop")]],
]


@pytest.fixture
def options(tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))

    def written(generate):
        model = int(generate.model)
        rows = [
            {"completions": [{"content": text, "finish_reason": reason} for text, reason in of_prompt[model]]}
            for of_prompt in ANSWERS
        ]
        file = tmp_path / generate.out
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Generated()

    monkeypatch.setattr(sampling_module, "generate_file", written)
    return {
        "models": ("0", "1"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "out": str(tmp_path / "out"),
        "sampling": Sampling(completions=2),
        "check": "exact_match",
    }


def data(folder):
    return [json.loads(line) for line in (folder / "out" / "data.jsonl").read_text().split("\n")[:-1]]


def test_ranked_data_and_the_counts_of_each_filter(options, tmp_path):
    counts = sample(SampleOptions(**options))
    assert counts.to_dict() == {
        "prompts": 4,
        "answers": 16,
        "truncated": 1,
        "empty": 1,
        "duplicates": 3,
        "rows": 2,
        "dropped_prompts": {"too_few_answers": 1, "tied": 1},
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == counts.to_dict()
    first, second = data(tmp_path)
    assert first["prompt"] == PROMPTS[0]["prompt"]
    assert first["completions"] == [{"content": "4", "score": 1.0}, {"content": "five it is", "score": 0.0}]
    assert len(second["completions"]) == 4
    with pytest.raises(InputError, match="holds data already"):
        sample(SampleOptions(**options))


@pytest.mark.parametrize(
    ("changes", "rows", "kind"),
    [
        ({}, 2, "ranked"),
        ({"format": "pair"}, 2, "pair"),
        ({"format": "all_pairs"}, 4, "pair"),  # 1 x 1 and 1 x 3
        ({"format": "unpaired", "threshold": 0.5}, 11, "unpaired"),
        ({"format": "sft", "threshold": 0.5}, 3, "chat"),
        ({"format": "sft"}, 4, "chat"),
        ({"duplicates": 0.5}, 2, "ranked"),
    ],
)
def test_every_format_is_read_by_training(options, tmp_path, changes, rows, kind):
    counts = sample(SampleOptions(**options, **changes))
    shape, records = read_file(str(tmp_path / "out" / "data.jsonl"))
    assert shape.kind == kind
    assert len(list(records)) == counts.rows == rows
    for row in data(tmp_path):
        if kind == "pair":
            assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
        if kind == "unpaired":
            answer = next(p["answer"] for p in PROMPTS if p["prompt"] == row["prompt"])
            assert row["label"] == (row["completion"][0]["content"] == answer)


def test_prompts_with_only_good_answers_are_dropped(options, tmp_path):
    counts = sample(SampleOptions(**options, format="sft", all_above=1.0))
    assert counts.dropped == {"all_above": 1}


def test_a_killed_run_keeps_what_it_has(options, tmp_path, monkeypatch):
    expected = sample(SampleOptions(**options))
    before = (tmp_path / "out" / "data.jsonl").read_bytes()
    (tmp_path / "out" / "data.jsonl").unlink()
    monkeypatch.setattr(sampling_module, "generate_file", lambda _: pytest.fail("answers exist"))
    monkeypatch.setattr(sampling_module, "_scorer", lambda _: pytest.fail("scores exist"))
    assert sample(SampleOptions(**options)) == expected
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == before


def test_a_stage_that_read_something_else_is_refused(options, tmp_path):
    """Silently taking over its file would mix two configurations."""
    sample(SampleOptions(**options))
    (tmp_path / "out" / "data.jsonl").unlink()
    with pytest.raises(InputError, match=r"model_0.jsonl was written .*seed 1234 instead of 7\): delete it"):
        sample(SampleOptions(**{**options, "sampling": Sampling(completions=2, seed=7)}))
    for changes, name in (
        ({"duplicates": 0.5}, "duplicates 0.7"),
        ({"check": "contains"}, "check 'exact_match'"),
    ):
        with pytest.raises(InputError, match=rf"scored.jsonl was written .*{name} instead of"):
            sample(SampleOptions(**{**options, **changes}))
    changed = [{**prompt, "answer": "0"} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in changed))
    with pytest.raises(InputError, match=r"model_0.jsonl was written with other options \(data "):
        sample(SampleOptions(**options))
    for i in range(2):
        (tmp_path / "out" / "answers" / f"model_{i}.jsonl").unlink()
    with pytest.raises(InputError, match=r"scored.jsonl was written with other options \(prompts "):
        sample(SampleOptions(**options))
    (tmp_path / "out" / "scored.jsonl").unlink()
    assert sample(SampleOptions(**options)).dropped == {"too_few_answers": 1, "tied": 3}


def test_answers_hold_any_separator_of_lines(options, tmp_path, monkeypatch):
    odd = ["4", "a\u2028b", "c\x85d", "e\x0bf \x1c g"]

    def written(generate):
        rows = [{"completions": [{"content": text, "finish_reason": "stop"} for text in odd]}] * 4
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(generate.out).write_text(lines, encoding="utf-8")

    monkeypatch.setattr(sampling_module, "generate_file", written)
    counts = sample(SampleOptions(**{**options, "models": ("0",), "duplicates": 1.0}))
    assert (counts.answers, counts.rows) == (16, 1)
    assert {c["content"] for c in data(tmp_path)[0]["completions"]} == set(odd)


def write_answers():
    """Write the answers here: the pool's process has no patched generate_file."""
    for i in range(2):
        sampling_module.generate_file(
            type("Options", (), {"model": str(i), "out": f"out/answers/model_{i}.jsonl"})()
        )


def test_a_reward_models_scores_are_transformers(pool, options, tiny_models, tmp_path):
    """Of a Hugging Face folder, a checkpoint of any layout and a run's folder."""
    folder, run = make_model(tmp_path / "reward", "qwen2_reward"), tmp_path / "run"
    reward = {
        "objective__name": "reward",
        "parallel__tensor": 2,
        "train__steps": 1,
        "checkpoint__export_hf": True,
    }
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), pairs, run, **reward))
    forms = {folder: folder, run: run / "hf", run / "step_000001": run / "hf"}
    for path, exported in forms.items():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_answers()
        pool.run(1, training_ranks.sample_data, {**options, "check": None, "reward_model": str(path)})
        model = AutoModelForSequenceClassification.from_pretrained(exported)
        tokenizer = AutoTokenizer.from_pretrained(exported)
        rows = data(tmp_path)
        assert len(rows) == 3
        for row in rows:
            for completion in row["completions"]:
                messages = [*row["prompt"], {"role": "assistant", "content": completion["content"]}]
                ids = tokenizer.apply_chat_template(messages, return_dict=False)
                with torch.no_grad():
                    reward = model(torch.tensor([ids])).logits[0, 0].item()
                assert completion["score"] == pytest.approx(reward, abs=1e-4)


def test_answers_are_scored_in_as_many_packs_as_they_need(pool, options, tmp_path):
    """Together they do not fit into the reward model's positions; those that do not fit alone are counted, left out."""
    folder = make_model(tmp_path / "reward", "qwen2_reward", max_position_embeddings=38)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_answers()
    pool.run(1, training_ranks.sample_data, {**options, "check": None, "reward_model": str(folder)})
    lengths = {}
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        for text, _ in (answer for of_model in answers for answer in of_model):
            messages = [*prompt["prompt"], {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            lengths[prompt["prompt"][0]["content"], text] = len(ids)
    ranked = {row["prompt"][0]["content"]: row["completions"] for row in data(tmp_path)}
    assert {completion["content"] for completion in ranked["4 + 4"]} == {"9", "ten", "12"}
    assert all(lengths[prompt, c["content"]] <= 38 for prompt, of in ranked.items() for c in of)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["unscored"] == 4
    assert report["dropped_prompts"] == {"too_few_answers": 2}


def test_models_are_checked_before_the_first_answers(tiny_models, tmp_path):
    with pytest.raises(
        InputError, match="models must be Hugging Face folders, checkpoints or run folders, found"
    ):
        require_language_models([str(tiny_models()), str(tmp_path / "none")])
    reward = make_model(tmp_path / "reward", "qwen2_reward")
    with pytest.raises(
        InputError, match="models must be language models, got Qwen2ForSequenceClassification in"
    ):
        require_language_models([str(reward)])
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPTS[0]))
    options = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "out": str(tmp_path / "out"),
        "sampling": Sampling(),
    }
    (reward / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        sample(SampleOptions(**options, models=("a", "b"), reward_model=str(reward)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"models": ()}, "needs a model"),
        ({"check": None}, "by a reward model or by a check"),
        ({"check": "exact"}, "check must be one of"),
        ({"duplicates": 0}, "duplicates"),
        ({"threshold": 1.0}, "threshold belongs to"),
        ({"format": "unpaired"}, "needs a threshold"),
        ({"models": ("0",), "sampling": Sampling()}, "at least 2 answers"),
        ({"extract": "("}, "regular expression"),
    ],
)
def test_wrong_options_are_one_line(options, changes, line):
    with pytest.raises(InputError, match=line):
        SampleOptions(**{**options, **changes})
