"""Real files, and small ones like them, are read and tokenised in full; in another shape they read the same."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_align.data.formats.files import read_file
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer

DATA = Path(os.environ.get("MEGATRON_ALIGN_DATA") or Path(__file__).parents[3].parent / "shared" / "data")
ALPACA = {"instruction": "Name a cat.", "input": "", "output": "Tom"}
CALL = '{"name": "get_time", "arguments": {"zone": "UTC"}}'
TOOL = {"name": "get_time", "description": "d", "parameters": {"type": "object"}}
HH = "\n\nHuman: how?\n\nAssistant: Like this.\n\nHuman: and then?\n\nAssistant:"


def said(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


SHAREGPT = {
    "conversations": said(
        ("human", "time?"), ("function_call", CALL), ("observation", "{}"), ("gpt", "noon")
    ),
    "tools": json.dumps([TOOL]),
}
PAIR = {
    "conversations": said(("human", "a game?"), ("gpt", "which?"), ("human", "any")),
    "chosen": {"from": "gpt", "value": "Chess, say.\n1. Set it up."},
    "rejected": {"from": "gpt", "value": "No."},
}
KTO = {
    "messages": [{"content": "which?", "role": "user"}, {"content": "D! Yay!", "role": "assistant"}],
    "label": False,
}
# file: its shape, records in the real one, malformed ones of them, a small one like it
FILES = {
    "alpaca_en_demo.json": ("alpaca", 999, 0, [ALPACA]),
    "alpaca_zh_demo.json": ("alpaca", 1000, 0, [{**ALPACA, "instruction": "识别并解释", "output": "猫"}]),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300, 0, [SHAREGPT]),
    "dpo_en_demo.json": ("pair_sharegpt", 300, 0, [PAIR]),
    "kto_en_demo.json": ("unpaired_conversation", 300, 0, [KTO, {**KTO, "label": True}]),
    "hh_rlhf_harmless_test.jsonl.gz": (
        "pair_hh_rlhf",
        2312,
        4,  # an empty answer is chosen
        [{"chosen": f"{HH} So.", "rejected": f"{HH} Oh"}, {"chosen": f"{HH} ", "rejected": f"{HH} Oh"}],
    ),
}
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def real(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not on this machine")
    return path


def small(name, folder):
    path, records = folder / name, FILES[name][3]
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    else:
        path.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def read(path, shape=None):
    bad = []
    found, records = read_file(str(path), shape, bad.append)
    return found.name, list(records), bad


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    shape, count, malformed, _ = FILES[name]
    found, records, bad = read(real(name))
    assert (found, len(records), len(bad)) == (shape, count - malformed, malformed)
    assert all("must not be empty in a turn of the assistant" in str(error) for error in bad)


@pytest.mark.parametrize("name", FILES)
def test_small_files_like_them(name, tmp_path):
    shape, _, malformed, records = FILES[name]
    found, kept, bad = read(small(name, tmp_path))
    assert (found, len(kept), len(bad)) == (shape, len(records) - (malformed > 0), int(malformed > 0))


@pytest.mark.parametrize("size", ["small", "real"])
@pytest.mark.parametrize("name", FILES)
def test_they_are_tokenised_and_partly_trained_on(name, size, tokenizer, tmp_path):
    template = RecordTokenizer(tokenizer, TOOL_TEMPLATE)
    for record in read(real(name) if size == "real" else small(name, tmp_path))[1][:50]:
        sample = template.sample(record)
        assert 0 < sample.scored_L.sum() < len(sample.tokens_L)
        if sample.completion_lengths:
            assert (
                sample.scored_L.tolist() == (np.arange(len(sample.tokens_L)) >= sample.prompt_length).tolist()
            )
            assert sample.prompt_length + sum(sample.completion_lengths) == len(sample.tokens_L)


# The same pairs in every shape that can hold them.
def raw(message):
    return {"role": message.role, "content": message.content}


def messages(turns):
    return [raw(turn) for turn in turns]


def hh_text(turns):
    speakers = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{speakers[turn.role]}: {turn.content}" for turn in turns)


WRITTEN = {
    "pair_messages": lambda p, c, r: {"prompt": messages(p), "chosen": messages(c), "rejected": messages(r)},
    "pair_conversations": lambda p, c, r: {"chosen": messages(p + c), "rejected": messages(p + r)},
    "pair_hh_rlhf": lambda p, c, r: {"chosen": hh_text(p + c), "rejected": hh_text(p + r)},
    "ranked_messages": lambda p, c, r: {
        "prompt": messages(p),
        "completions": [{"content": messages(c), "score": 1}, {"content": messages(r), "score": 0}],
    },
}


def key(record):
    """What a pair says; hh-rlhf's text has no place for white space around a turn."""
    return tuple(
        tuple((turn.role, turn.content.strip()) for turn in turns)
        for turns in (record.prompt, *record.completions)
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("shape", WRITTEN)
@pytest.mark.parametrize("name", ["small", "dpo_en_demo.json", "hh_rlhf_harmless_test.jsonl.gz"])
def test_pairs_read_the_same_in_every_shape(name, shape, suffix, tmp_path):
    path = small("dpo_en_demo.json", tmp_path) if name == "small" else real(name)
    records = read(path)[1]
    if shape == "pair_hh_rlhf":  # its text has no system turns
        records = [record for record in records if record.prompt[0].role != "system"]
    assert records
    rows = [WRITTEN[shape](record.prompt, *record.completions) for record in records]
    copy = tmp_path / f"copy.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), copy)
    else:
        copy.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found, again, bad = read(copy)
    assert (found, bad) == (shape, [])
    assert [key(record) for record in again] == [key(record) for record in records]


@pytest.mark.parametrize("name", ["small", "kto_en_demo.json"])
def test_labelled_completions_read_the_same_in_every_shape(name, tmp_path):
    path = small("kto_en_demo.json", tmp_path) if name == "small" else real(name)
    records = read(path)[1]
    assert set(Counter(record.label for record in records)) == {True, False}
    speakers = {"user": "human", "assistant": "gpt"}
    shapes = {
        "unpaired_messages": lambda p, c: {"prompt": messages(p), "completion": messages(c)},
        "unpaired_sharegpt": lambda p, c: {
            "conversations": said(*((speakers[turn.role], turn.content) for turn in p + c))
        },
    }
    for shape, write in shapes.items():
        copy = tmp_path / f"{shape}.jsonl"
        rows = [{**write(r.prompt, r.completions[0]), "label": r.label} for r in records]
        copy.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        found, again, bad = read(copy)
        assert (found, bad) == (shape, [])
        assert [(key(r), r.label) for r in again] == [(key(r), r.label) for r in records]
