"""Multiple choice is read from the fields that data sets have, and tokenised as prompt + delimiter + choice."""

import json

import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation.config import ChoiceTask
from megatron_align.evaluation.tables import read_choices
from tests.harness.tiny import byte_tokenizer


def read(tmp_path, *records, length=200, **options):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_choices(ChoiceTask(name="t", data=str(file), **options), byte_tokenizer(), length)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "choices": ["yes", "no"], "answer": 1},
        {"question": "q", "choices": ["yes", "no"], "answer": "B"},
        {"question": "q", "choices": {"text": ["yes", "no"], "label": ["1", "2"]}, "answerKey": "2"},  # ARC
        {"ctx": "q", "endings": ["yes", "no"], "label": "1"},  # HellaSwag
        {"query": "q", "options": ["yes", "no"], "gold": "no"},
        {"context": "q", "options": ["yes", "no"], "answer": 1},
    ],
)
def test_fields_of_data_sets(tmp_path, record):
    choices = read(tmp_path, record)
    assert choices.correct.tolist() == [1]
    assert choices.characters.tolist() == [3, 2]
    sample = choices.table.sample(0)
    assert byte_tokenizer().decode(sample.tokens_L) == "q yes no"
    assert (sample.prompt_length, sample.completion_lengths) == (1, (4, 3))
    assert not choices.rendered  # no chat template reads a date
    assert sample.scored_L.tolist() == [False] + [True] * 7


def test_messages_get_the_generation_prompt_and_no_delimiter(tmp_path):
    message = {"role": "user", "content": "q"}
    choices = read(tmp_path, {"prompt": [message], "choices": ["yes", "no"], "answer": 0})
    sample = choices.table.sample(0)
    assert choices.rendered
    tokenizer = byte_tokenizer()
    rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    assert sample.tokens_L.tolist() == [*rendered, *tokenizer("yesno")["input_ids"]]
    assert sample.completion_lengths == (3, 2)


def test_the_delimiter_and_the_limit(tmp_path):
    records = [{"prompt": f"q{i}", "choices": ["a", "b"], "answer": i} for i in range(2)]
    choices = read(tmp_path, *records, delimiter="\n", limit=1)
    assert byte_tokenizer().decode(choices.table.sample(0).tokens_L) == "q0\na\nb"
    assert len(choices.table) == 1


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"prompt": "q", "answer": 0}, "x.jsonl:1: field 'choices' must be a non-empty list"),
        ({"prompt": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"prompt": "q", "choices": ["a", "a"], "answer": 0}, "different texts"),
        ({"prompt": "q", "choices": ["a", 3], "answer": 0}, r"field 'choices\[1\]' must be a string"),
        ({"prompt": "q", "choices": ["a", "b"]}, "field 'answer' must be one of the 2 choices .*got nothing"),
        (
            {"prompt": "q", "options": ["a", "b"], "label": 2},
            "field 'label' must be one of the 2 choices .*got 2",
        ),
        ({"prompt": "q", "choices": ["a", "b"], "answer": True}, "got true"),
        ({"choices": ["a", "b"], "answer": 0}, "must have a prompt"),
        ({"prompt": "q" * 198, "choices": ["a", "b"], "answer": 0}, "must fit into 200 tokens, got 202"),
    ],
)
def test_bad_records_name_file_and_field(tmp_path, record, line):
    with pytest.raises(InputError, match=line):
        read(tmp_path, record)
