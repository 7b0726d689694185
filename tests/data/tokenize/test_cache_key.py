"""The key of a token store is part of the contract: caches that earlier versions wrote are found again."""

from types import SimpleNamespace

import pytest

from megatron_align.data.tokenize import cache_key
from megatron_align.data.tokenize.cache_key import StoreSpec

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
