"""A data set of the hub is read like its files; without a connection the error says what to do, in one line."""

import json

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron_align.data.formats import hub_data
from megatron_align.data.formats.files import expand
from megatron_align.errors import InputError
from tests.data.reading import read_records

RECORD = json.dumps({"prompt": "p", "completion": "c"})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A snapshot with the files of a data set, and the calls that were made for it."""
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub_data.local_path.cache_clear()
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "README.md"):
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / name).write_text(RECORD)
    yield tmp_path / "snapshot", calls
    hub_data.local_path.cache_clear()


def test_files_folders_and_patterns_of_a_data_set(hub):
    folder, calls = hub
    train = [str(folder / f"data/train-{i}.jsonl") for i in (0, 1)]
    assert expand("hf://org/name/data/train-*") == train
    assert expand("hf://datasets/org/name@v1/data/train-1.jsonl") == train[1:]
    (folder / "data/test-0.jsonl").unlink()
    assert expand("hf://org/name/data") == train
    assert [(repo, o["repo_type"], o["revision"]) for repo, o in calls] == [
        ("org/name", "dataset", None),
        ("org/name", "dataset", "v1"),
        ("org/name", "dataset", None),
    ]
    assert calls[0][1]["allow_patterns"] == ["data/train-*"]
    assert "data/*.parquet" in calls[2][1]["allow_patterns"]
    assert [r.prompt for r in read_records("hf://org/name/data/train-*")] == ["p", "p"]
    assert len(calls) == 3  # each is looked up once


@pytest.mark.parametrize("source", ["hf://org/name", "hf://org/name/data", "hf://org/name/data/"])
def test_a_data_set_or_folder_of_several_splits_needs_one_named(hub, source):
    folder, _ = hub
    with pytest.raises(InputError, match="must be one split, found test, train; name its files, ") as refused:
        expand(source)
    named = str(refused.value).partition("for example ")[2].split(", ")[0]
    assert expand(named) == [str(folder / "data/test-0.jsonl")]
    (folder / "data/test-0.jsonl").unlink()
    hub_data.local_path.cache_clear()
    assert len(expand(source)) == 2


def test_a_folder_named_for_a_split_is_one_split(hub):
    folder, _ = hub
    (folder / "train").mkdir()
    for name in ("a-test-of-strength.jsonl", "dev-notes.jsonl"):
        (folder / "train" / name).write_text(RECORD)
    assert len(expand("hf://org/name/train")) == 2


def test_what_cannot_be_downloaded_is_one_line(monkeypatch, tmp_path):
    def offline(repo, **options):
        raise LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    hub_data.local_path.cache_clear()
    with pytest.raises(
        InputError, match="cannot be downloaded .no connection at all.: .* run `hf download"
    ) as e:
        expand("hf://org/name")
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="must be hf://OWNER/NAME"):
        expand("hf://name")
    with pytest.raises(
        InputError, match="found nothing; a data set of the Hugging Face hub is hf://org/name"
    ):
        expand("org/name")
