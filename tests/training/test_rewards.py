"""A run's rewards are the same numbers on every layout, a reward model's are transformers'; errors reach every rank."""

import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_align.records import Message
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.types import Completion
from tests.harness import training_ranks
from tests.harness.tiny import make_model

FUNCTION = """
def score(completions, topic):
    return [None if t == "b" else float(len(str(c))) for c, t in zip(completions, topic)]


def fail(prompts, completions):
    if any(completion[0]["content"] == "four" for completion in completions):
        raise ValueError("no four")
    return [0.0] * len(prompts)
"""
TEXTS = [
    ("4", "four it is", "4", ""),
    (" 6", "6", "it is six, as three and three are six"),
    ("8",),
    ("ten", "10"),
    ("four", "4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    make_model(folder / "reward", "qwen2_reward")
    make_model(folder / "policy")
    (folder / "my_rewards.py").write_text(FUNCTION)
    return folder


def groups(texts=TEXTS):
    """Prompts of messages, the last one of text; their completions."""
    made = []
    for i, of_prompt in enumerate(texts):
        content = f"{i} + {i}"
        prompt = content if i == 4 else (Message("user", content),)
        record = PromptRecord(raw={"topic": "ab"[i % 2]}, where=f"p.jsonl:{i + 1}", prompt=prompt)
        completions = [
            Completion(token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", weight_version=0)
            for text in of_prompt
        ]
        made.append((record, completions))
    return made


def of_transformers(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def reward(record, text):
        if isinstance(record.prompt, str):
            ids = [*tokenizer(record.prompt + text)["input_ids"], tokenizer.eos_token_id]
        else:
            turns = [*record.prompt_field(), {"role": "assistant", "content": text}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, 0].item()

    return [
        [reward(record, completion.text) for completion in completions] for record, completions in groups()
    ]


def near(values):
    return [[pytest.approx(value, abs=1e-4) for value in of_prompt] for of_prompt in values]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        pytest.param(4, {"pipeline": 2, "context": 2}, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
    ],
)
def test_values_are_the_same_on_every_layout(pool, folder, ranks, layout):
    """With packs that hold no prompt with all of its completions, duplicates, and an empty completion."""
    options = {
        "rewards": [
            {"kind": "model", "path": str(folder / "reward"), "weight": 2.0},
            {"kind": "function", "path": f"{folder}/my_rewards.py:score", "normalize": "batch"},
            {"kind": "regex", "pattern": "i", "weight": {"a": 1.0}, "category": "topic"},
        ],
        "sequence_length": 72,
    }
    wanted = of_transformers(folder / "reward")
    results = pool.run(ranks, training_ranks.reward_values, layout, options, groups())
    for result in results:
        assert isinstance(result, dict), result
        assert result["model"] == near(wanted)
        assert result["regex"] == [[0, 1, 0, 0], [None] * 3, [0], [None] * 2, [0, 0]]
        assert result["score"][1] == [None] * 3
        assert result["score"][4] == [4, 1]
        assert all(result["scored"])
        assert result["sum"] == pytest.approx(results[0]["sum"], abs=1e-12)


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (
            {"kind": "function", "path": "my_rewards.py:fail", "retries": 0},
            "InputError: reward fail raised ValueError: no four at .*my_rewards.py:8",
        ),
        (
            {"kind": "model", "path": "reward", "sequence_length": 12},
            r"InputError: reward model: prompt and completion must fit .* pack of 12 tokens, got \d+ for completion 0 "
            "of p.jsonl:1",
        ),
        (
            {"kind": "model", "path": "policy"},
            "InputError: reward model: path must hold a reward model, got Qwen2ForCausalLM",
        ),
    ],
)
def test_a_reward_that_fails_on_one_rank_is_one_line_on_all(pool, folder, reward, line):
    options = {"rewards": [{**reward, "path": f"{folder}/{reward['path']}"}]}
    given = groups([("1",), ("four",)])  # the second prompt is the second rank's
    first, second = pool.run(2, training_ranks.reward_values, {}, options, given)
    assert first == second
    assert re.match(line, first)


def test_what_does_not_fit_is_not_scored_with_too_long_skip(pool, folder):
    reward = {"kind": "model", "path": str(folder / "reward"), "sequence_length": 40, "too_long": "skip"}
    [result] = pool.run(
        1, training_ranks.reward_values, {}, {"rewards": [reward]}, groups([("1", "1 " * 40)])
    )
    assert result["model"][0][1] is None
    assert result["scored"] == [True, False]
