"""A store holds what the template made, complete or absent, and is made once for the same inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_align.data import prepare as prepare_module
from megatron_align.data.prepare import prepare, prepare_or_wait
from megatron_align.data.sources import read_conversations
from megatron_align.data.spec import StoreSpec
from megatron_align.data.store import TokenStore
from megatron_align.data.templates import Template
from megatron_align.errors import InputError

RECORDS = [{"prompt": "hello " * n, "completion": "world"} for n in (1, 30, 2, 3)]


@pytest.fixture
def make(tokenizer_folder, jsonl, tmp_path):
    def spec(records=RECORDS, *, sequence_length=4096, too_long="error", name="data.jsonl"):
        return StoreSpec(
            sources=(jsonl(records, name),),
            tokenizer=tokenizer_folder,
            sequence_length=sequence_length,
            too_long=too_long,
            cache=str(tmp_path / "cache"),
        )

    return spec


def tokenised(spec, tokenizer):
    return [Template(tokenizer).sample(record) for record in read_conversations(list(spec.sources))]


def same(one, other):
    pairs = zip(one, other, strict=True)
    return all(
        np.array_equal(a.tokens_L, b.tokens_L) and np.array_equal(a.scored_L, b.scored_L) for a, b in pairs
    )


def test_what_goes_in_comes_out(make, tokenizer):
    spec = make()
    store, samples = TokenStore(prepare(spec)), tokenised(spec, tokenizer)
    assert same(map(store.sample, range(len(store))), samples)
    assert store.lengths.tolist() == [len(s.tokens_L) for s in samples]
    assert store.scored_counts.tolist() == [s.scored_L.sum() for s in samples]
    assert (store.lengths.dtype, store.scored_counts.dtype) == (np.int64, np.int64)
    assert store.sample(0).tokens_L.dtype == np.int32
    told = {
        key: store.manifest[key] for key in ("samples", "tokens", "scored_tokens", "dropped", "truncated")
    }
    assert told == {
        "samples": 4,
        "tokens": store.lengths.sum(),
        "scored_tokens": store.scored_counts.sum(),
        "dropped": 0,
        "truncated": 0,
    }
    assert store.manifest["shapes"] == ["prompt_completion"]
    with pytest.raises(IndexError):
        store.sample(4)


def test_files_follow_each_other(make, tokenizer_folder):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    one, two = make(), make([{"messages": chat}], name="chat.jsonl")
    both = StoreSpec(
        sources=one.sources + two.sources,
        tokenizer=tokenizer_folder,
        sequence_length=4096,
        too_long="error",
        cache=one.cache,
    )
    store = TokenStore(prepare(both))
    assert store.manifest["shapes"] == ["prompt_completion", "messages"]
    parts = [TokenStore(prepare(spec)) for spec in (one, two)]
    expected = [part.sample(i) for part in parts for i in range(len(part))]
    assert same(map(store.sample, range(len(store))), expected)


def test_a_second_run_reuses_it(make, monkeypatch):
    path = prepare(make())
    monkeypatch.setattr(prepare_module, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    assert prepare(make()) == path


def test_every_input_has_its_own_store(make, tokenizer_folder, tmp_path):
    paths = {prepare(make()), prepare(make(sequence_length=2048)), prepare(make(too_long="drop"))}
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    paths.add(prepare(StoreSpec(**{**_fields(make()), "tokenizer": str(tmp_path / "other")})))
    paths.add(prepare(make(RECORDS[:2])))
    assert len(paths) == 5


def _fields(spec):
    return {
        name: getattr(spec, name) for name in ("sources", "tokenizer", "sequence_length", "too_long", "cache")
    }


def test_a_moved_file_keeps_its_store(make, tmp_path):
    spec = make()
    (tmp_path / "elsewhere").mkdir()
    moved = Path(spec.sources[0]).rename(tmp_path / "elsewhere" / "data.jsonl")
    path = prepare(StoreSpec(**{**_fields(spec), "sources": (str(moved),)}))
    assert path == prepare(make())


def test_too_long_samples(make, tokenizer):
    whole = tokenised(make(), tokenizer)
    lengths = [len(sample.tokens_L) for sample in whole]
    limit = lengths[3] - 1  # samples 1 and 3 are too long; of 3 only the EOS is cut off
    with pytest.raises(
        InputError, match=f"data.jsonl:2: .*sequence_length = {limit} tokens, got {lengths[1]};"
    ):
        prepare(make(sequence_length=limit))
    dropped = TokenStore(prepare(make(sequence_length=limit, too_long="drop")))
    assert (dropped.manifest["dropped"], dropped.manifest["truncated"]) == (2, 0)
    assert same(map(dropped.sample, range(len(dropped))), [whole[0], whole[2]])
    cut = TokenStore(prepare(make(sequence_length=limit, too_long="truncate")))
    assert (cut.manifest["dropped"], cut.manifest["truncated"]) == (1, 1)  # sample 1 keeps no target
    assert cut.sample(2).tokens_L.tolist() == whole[3].tokens_L[:limit].tolist()
    assert cut.scored_counts[2] == whole[3].scored_L.sum() - 1


def test_nothing_left_is_refused(make):
    with pytest.raises(
        InputError, match="data.jsonl: must leave a sample within .* = 2 tokens, got none: all 4"
    ):
        prepare(make(sequence_length=2, too_long="drop"))


def test_a_failed_run_leaves_nothing(make, tmp_path):
    with pytest.raises(InputError, match="data.jsonl:5: "):
        prepare(make([*RECORDS, "{"]))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_run_leaves_no_store(make, tmp_path):
    spec = make()
    code = (
        "import os, signal, sys; from megatron_align.data import prepare, spec\n"
        "prepare._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare.prepare(spec.StoreSpec(**{_fields(spec)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not spec.path(spec.inputs()).exists()
    assert len(TokenStore(prepare(spec))) == 4


def test_two_nodes_may_prepare_at_once(make, monkeypatch):
    spec, publish = make(), prepare_module._publish

    def late(unfinished, path):
        monkeypatch.setattr(prepare_module, "_publish", publish)
        prepare(spec)  # somebody else is done first
        publish(unfinished, path)

    monkeypatch.setattr(prepare_module, "_publish", late)
    path = prepare(spec)
    assert len(TokenStore(path)) == 4
    assert list(path.parent.iterdir()) == [path]


def test_other_ranks_wait_for_local_rank_0(make):
    spec, found = make(), []
    waiting = threading.Thread(target=lambda: found.append(prepare_or_wait(spec, 1)), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert not found
    path = prepare_or_wait(spec, 0)
    waiting.join(timeout=5)
    assert found == [path]


@pytest.mark.parametrize("name", ["tokens", "scored", "offsets", "scored_counts", "sources", "weights"])
@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_damaged_store_is_named(make, name, harm):
    path = prepare(make())
    file = path / f"{name}.bin"
    if harm == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    with pytest.raises(InputError, match=f"{file}: must have \\d+ bytes, got \\d+"):
        TokenStore(path)


def test_a_bad_manifest_is_named(make, tmp_path):
    path = prepare(make())
    manifest = path / "manifest.json"
    for content, expected in ((json.dumps({"version": 99}), "version 3, got 99"), ("{", "must be JSON")):
        manifest.write_text(content)
        with pytest.raises(InputError, match=expected):
            TokenStore(path)
    with pytest.raises(InputError, match="must be a folder of tokenised data"):
        TokenStore(tmp_path)


def test_missing_inputs_are_named(make, tmp_path):
    spec = make()
    with pytest.raises(InputError, match="no.jsonl: must be "):
        prepare(StoreSpec(**{**_fields(spec), "sources": (str(tmp_path / "no.jsonl"),)}))
    with pytest.raises(InputError, match="no: must be a Hugging Face folder"):
        prepare(StoreSpec(**{**_fields(spec), "tokenizer": str(tmp_path / "no")}))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: tokenised data could not be written"):
        prepare(StoreSpec(**{**_fields(spec), "cache": str(tmp_path / "file")}))
