"""Validation loss is the training loss over the same samples with the same weights, whatever the steps and layout."""

import json

import pytest

from tests.harness import training_ranks
from tests.harness.tiny import byte_tokenizer, metrics_of, run_arguments


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_validation_equals_training_over_all_samples(pool, tiny_models, chat_file, tmp_path, normalization):
    options = {
        "objective__normalization": normalization,
        "optimizer__lr": 1e-30,
    }  # weights stay where they are
    pool.run(
        1,
        training_ranks.train,
        run_arguments(
            tiny_models(), chat_file, tmp_path / "all", train__steps=1, train__global_batch_size=64, **options
        ),
    )
    pool.run(
        2,
        training_ranks.train,
        run_arguments(
            tiny_models(),
            chat_file,
            tmp_path / "validated",
            train__steps=3,
            train__global_batch_size=10,  # 64 samples: the last validation step has 4
            train__validate_every=2,
            data__validation=chat_file,
            **options,
        ),
    )
    [whole] = metrics_of(tmp_path / "all")
    rows = metrics_of(tmp_path / "validated", "validation")
    assert [row["step"] for row in rows] == [2, 3]
    for row in rows:
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert [row["step"] for row in metrics_of(tmp_path / "validated")] == [1, 2, 3]


def test_epochs_take_every_sample_once(pool, tiny_models, chat_file, tmp_path):
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, train__global_batch_size=12)
    arguments[arguments.index("--train.steps")] = "--train.epochs"
    arguments[arguments.index("--train.epochs") + 1] = "1"
    pool.run(1, training_ranks.train, arguments)
    rows = metrics_of(tmp_path)
    assert [row["samples"] for row in rows] == [12, 12, 12, 12, 12, 4]
    # Lengths differ, so another sample in place of one that is left out would change the sum.
    chats = [json.loads(line)["messages"] for line in chat_file.read_text().splitlines()]
    lengths = [len(byte_tokenizer().apply_chat_template(chat, return_dict=False)) for chat in chats]
    assert sum(row["tokens"] for row in rows) == sum(lengths)
