"""A checkpoint of which one bit has flipped is refused by every option that starts a model from it."""

import json

import pytest

from tests.harness import training_ranks
from tests.harness.corruption import flip
from tests.harness.tiny import run_arguments, write_pairs


@pytest.fixture(scope="module")
def corrupt(pool, tiny_models, chat_file, tmp_path_factory):
    """A checkpoint with a flipped bit in a tensor."""
    run = tmp_path_factory.mktemp("first")
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, run, train__steps=1))
    [*_, file] = sorted((run / "step_000001" / "state").glob("*.distcp"))
    flip(file)
    return file


@pytest.mark.parametrize("option", ["model.path", "reference.path", "critic.path"])
def test_it_is_refused(pool, tiny_models, corrupt, tmp_path, option):
    if option == "critic.path":
        data = tmp_path / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
        options = {"objective__name": "ppo", "rewards": "[{kind: length, max: 3}]", "rollout__max_tokens": 4}
    else:
        data = write_pairs(tmp_path / "pairs.jsonl", samples=16)
        options = {"objective__name": "dpo"}
    options |= {
        "train__global_batch_size": 4,
        "train__steps": 1,
        option.replace(".", "__"): corrupt.parents[1],
    }
    arguments = run_arguments(options.pop("model__path", tiny_models()), data, tmp_path / "run", **options)
    [line] = pool.run(1, training_ranks.train_to_the_refusal, arguments)
    assert f"{corrupt.name}: SHA-256 mismatch" in line
