"""A store returns the samples that were written, reads its index without the tokens, and detects corrupt files."""

import dataclasses
import json
import os

import numpy as np
import pytest

from megatron_align.data.store import COLUMNS_OF_KIND, TokenStore
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.errors import InputError
from tests.data.reading import read_records

TEXTS = [{"prompt": "hello " * n, "completion": "world"} for n in (1, 30, 2, 3)]
ASKED = [{"role": "user", "content": "the cat"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


RECORDS = {
    "chat": [*TEXTS, {**TEXTS[0], "weight": 0.25}],
    "pair": [
        {"prompt": ASKED, "chosen": answer("sat on"), "rejected": answer("the mat, hello")},
        {
            "prompt": ASKED,
            "chosen": answer("a"),
            "rejected": answer("world"),
            "margin": 1.5,
            "chosen_score": 4,
            "rejected_score": -0.5,
        },
        {"prompt": ASKED, "chosen": answer("b"), "rejected": answer("hello"), "weight": 3.0},
    ],
    "ranked": [
        {"prompt": "hello", "completions": [{"content": c, "score": i} for i, c in enumerate("abcd"[:n])]}
        for n in (2, 4, 3)
    ],
    "unpaired": [
        {"prompt": "hello " * n, "completion": "world", "label": label}
        for n, label in ((1, True), (3, False), (2, True))
    ],
}


def tokenised(spec, tokenizer):
    return [RecordTokenizer(tokenizer).sample(record) for record in read_records(list(spec.sources))]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(x, y, err_msg=field.name)  # NaN equals NaN
    return True


@pytest.mark.parametrize("kind", RECORDS)
def test_what_goes_in_comes_out(make, tokenizer, kind):
    spec = make(RECORDS[kind])
    store, samples = TokenStore(prepare(spec), verify=True), tokenised(spec, tokenizer)
    assert store.kind == kind
    assert same(map(store.sample, range(len(store))), samples)
    assert store.lengths.tolist() == [len(s.tokens_L) for s in samples]
    assert store.scored_counts.tolist() == [s.scored_L.sum() for s in samples]
    assert store.weights.tolist() == [s.weight for s in samples]
    assert store.prompt_lengths.tolist() == [s.prompt_length for s in samples]
    completions = [s.completion_lengths or (len(s.tokens_L),) for s in samples]
    of_samples = np.split(store.completion_lengths, store.completion_offsets[1:-1])
    assert [tuple(lengths.tolist()) for lengths in of_samples] == completions
    assert store.completion_counts.tolist() == list(map(len, completions))
    duplicated = [sum(s.prompt_length + c for c in cs) for s, cs in zip(samples, completions, strict=True)]
    assert store.duplicated_lengths.tolist() == duplicated
    with pytest.raises(IndexError):
        store.sample(len(store))
    types = [store.lengths, store.scored_counts, store.sources, store.weights, store.prompt_lengths]
    assert [a.dtype.name for a in types] == ["int64", "int64", "int32", "float64", "int64"]
    assert store.sample(0).tokens_L.dtype == np.int32


def test_the_manifest_counts(make):
    store = TokenStore(prepare(make(RECORDS["chat"])))
    told = {
        key: store.manifest[key] for key in ("samples", "tokens", "scored_tokens", "dropped", "truncated")
    }
    assert told == {
        "samples": 5,
        "tokens": store.lengths.sum(),
        "scored_tokens": store.scored_counts.sum(),
        "dropped": 0,
        "truncated": 0,
    }
    assert store.manifest["shapes"] == ["prompt_completion"]
    assert store.manifest["largest_token"] == max(store.sample(i).tokens_L.max() for i in range(5))


def test_sources_follow_each_other(make, jsonl, tmp_path):
    (tmp_path / "folder").mkdir()
    jsonl([{"messages": [*ASKED, *answer("a")]}], "folder/a.jsonl")
    jsonl(TEXTS[:2], "folder/b.jsonl")
    one, two = make(TEXTS), make(TEXTS, sources=(str(tmp_path / "folder"),))
    store = TokenStore(prepare(dataclasses.replace(one, sources=one.sources + two.sources)))
    assert store.manifest["shapes"] == ["prompt_completion", "messages"]
    parts = [TokenStore(prepare(spec)) for spec in (one, two)]
    assert same(
        map(store.sample, range(len(store))), [part.sample(i) for part in parts for i in range(len(part))]
    )
    assert store.sources.tolist() == [0] * 4 + [1] * 3
    assert [source["samples"] for source in store.manifest["sources"]] == [4, 3]
    assert sum(source["tokens"] for source in store.manifest["sources"]) == store.manifest["tokens"]


def test_too_long_samples(make, tokenizer):
    whole = tokenised(make(TEXTS), tokenizer)
    lengths = [len(sample.tokens_L) for sample in whole]
    limit = lengths[3] - 1  # samples 1 and 3 are too long; of 3 only the EOS is cut off
    with pytest.raises(
        InputError, match=f"data.jsonl:2: .*sequence_length = {limit} tokens, got {lengths[1]};"
    ):
        prepare(make(TEXTS, sequence_length=limit))
    dropped = TokenStore(prepare(make(TEXTS, sequence_length=limit, too_long="drop")))
    assert (dropped.manifest["dropped"], dropped.manifest["truncated"]) == (2, 0)
    assert f"data.jsonl:2: {lengths[1]} tokens" in dropped.manifest["examples"]["dropped"][0]
    assert same(map(dropped.sample, range(len(dropped))), [whole[0], whole[2]])
    cut = TokenStore(prepare(make(TEXTS, sequence_length=limit, too_long="truncate")))
    assert (cut.manifest["dropped"], cut.manifest["truncated"]) == (1, 1)  # sample 1 keeps no target
    assert cut.sample(2).tokens_L.tolist() == whole[3].tokens_L[:limit].tolist()
    assert cut.scored_counts[2] == whole[3].scored_L.sum() - 1


@pytest.mark.parametrize("name", COLUMNS_OF_KIND["pair"])
def test_a_harmed_column_is_named(make, name):
    path = prepare(make(RECORDS["pair"]))
    file = path / f"{name}.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    TokenStore(path)  # only a full reading can tell
    with pytest.raises(InputError, match=f"{file}: must have sha256 .*: delete the folder"):
        TokenStore(path, verify=True)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match=f"{file}: must have \\d+ bytes, got \\d+"):
        TokenStore(path)
    file.unlink()
    with pytest.raises(InputError, match=f"{file}: must have \\d+ bytes, got 0"):
        TokenStore(path)


def test_a_bad_manifest_is_named(make, tmp_path):
    path = prepare(make(TEXTS))
    manifest = path / "manifest.json"
    for content, expected in ((json.dumps({"version": 99}), "version 4, got 99"), ("{", "must be JSON")):
        manifest.write_text(content)
        with pytest.raises(InputError, match=expected):
            TokenStore(path)
    with pytest.raises(InputError, match="must be a folder of tokenised data"):
        TokenStore(tmp_path)
