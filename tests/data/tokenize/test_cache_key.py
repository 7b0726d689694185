"""The key of a token store is part of the contract: caches that earlier versions wrote are found again."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import processors

from megatron_align.data.tokenize import cache_key
from megatron_align.data.tokenize.cache_key import StoreSpec, file_states, remember_hashes
from tests.harness.tiny import byte_tokenizer

# Written by the version of November 2026; a change of either makes every user tokenise again.
KEYS = {
    "all options": (
        "890c2baeb3786d32",
        {"shape": "pair", "chat_template": "t.jinja", "on_bad_record": "skip"},
    ),
    "defaults": ("5d1a0992a117eadb", {"sources": ("one.jsonl",), "too_long": "error"}),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_fixed_spec_has_the_key_of_earlier_versions(name, tmp_path, monkeypatch):
    """Paths do not enter the key: only contents, names within a source, and the options that change samples."""
    monkeypatch.setattr(cache_key, "transformers", SimpleNamespace(__version__="0"))
    monkeypatch.chdir(tmp_path)
    files = {
        "tokenizer/tokenizer.json": "{}",
        "tokenizer/tokenizer_config.json": "[]",
        "folder/b.jsonl": "b\n",
        "folder/a.jsonl": "a\n",
        "one.jsonl": "1\n",
        "t.jinja": "{{ messages }}",
    }
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    key, options = KEYS[name]
    given = {"sources": ("one.jsonl", "folder"), "too_long": "drop", **options}
    spec = StoreSpec(tokenizer="tokenizer", sequence_length=100, cache="cache", **given)
    assert spec.path(spec.inputs()).name == key


BOS = "<|endoftext|>"
PLAIN = {"prompt": "q", "completion": " a"}
TEXTS = {  # records, and whether they were tokenised otherwise with: no added tokens, a BOS, a BOS and an EOS
    "no BOS in it": ([PLAIN], (False, False, True)),
    "a BOS in the second record": ([PLAIN, {**PLAIN, "prompt": BOS + "q"}], (False, True, True)),
    "a pair": ([{"prompt": BOS + "q", "chosen": "a", "rejected": "b"}], (False, True, True)),
    "a chat": (
        [{"messages": [{"role": "user", "content": BOS}, {"role": "assistant", "content": "a"}]}],
        (False, False, False),
    ),
}
AROUND = {"nothing": None, "bos": f"{BOS} $A", "both": f"{BOS} $A <|im_end|>"}


def spec_of(tmp_path, records, around, dumps=json.dumps):
    tokenizer = byte_tokenizer()
    if around:
        ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (BOS, "<|im_end|>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=ids
        )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data.jsonl").write_text("".join(dumps(record) + "\n" for record in records))
    return StoreSpec(
        sources=(str(tmp_path / "data.jsonl"),),
        tokenizer=str(tmp_path / "tokenizer"),
        sequence_length=64,
        too_long="error",
        cache=str(tmp_path / "cache"),
    )


def has_new_key(spec):
    [[entry]] = spec.inputs()["data"]
    return entry.get("plain_text") == 2


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", TEXTS)
def test_plain_text_has_another_key_where_its_samples_changed(name, around, tmp_path):
    """Earlier versions put a BOS before texts that begin with one, and all added tokens after their EOS."""
    records, changed = TEXTS[name]
    assert has_new_key(spec_of(tmp_path, records, AROUND[around])) == changed[list(AROUND).index(around)]


def for_web(record):
    return json.dumps(record).replace("<", "\\u003C").replace(">", "\\u003E")


@pytest.mark.parametrize("dumps", [json.dumps, for_web], ids=["plain", "web"])
def test_a_bos_is_found_however_json_writes_it(tmp_path, dumps):
    assert has_new_key(spec_of(tmp_path, [{**PLAIN, "prompt": BOS}], AROUND["bos"], dumps))


def test_a_file_is_searched_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_key, "SETTLED_SECONDS", -1.0)
    for records in ([PLAIN], [{**PLAIN, "prompt": BOS}]):
        spec = spec_of(tmp_path, records, AROUND["bos"])
        states, inputs = file_states(spec), spec.inputs()
        (tmp_path / "cache").mkdir(exist_ok=True)
        remember_hashes(spec, inputs, states)
        with monkeypatch.context() as patch:
            patch.setattr(cache_key, "may_hold", None)
            assert spec.inputs() == inputs
