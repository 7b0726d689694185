"""A name on the hub is downloaded once per node, a path never; if it cannot be, one line says what to do."""

import os
import threading

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from megatron_align.config import CheckpointConfig
from megatron_align.errors import InputError
from megatron_align.hf import hub
from megatron_align.training.setup import locate

NAME = "Org/Model-7B"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_folders", {})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(hub.tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """The downloads that were made: (repository, revision, patterns)."""
    made = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        made.append((repo, revision, allow_patterns))
        folder = tmp_path / "cache" / repo.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


def test_a_name_is_downloaded_once_and_a_path_never(downloads, tmp_path):
    folder = hub.model_folder(NAME)
    assert folder == tmp_path / "cache" / "Org--Model-7B"
    assert hub.model_folder(NAME) == folder
    assert locate(NAME) == (folder, folder)
    assert [(repo, revision) for repo, revision, _ in downloads] == [(NAME, None)]
    assert "*.safetensors" in downloads[0][2]
    assert not [pattern for pattern in downloads[0][2] if pattern.endswith((".py", ".bin"))]
    hub.model_folder(f"{NAME}@v1.0", weights=False)
    assert downloads[1][:2] == (NAME, "v1.0")
    assert "*.safetensors" not in downloads[1][2]
    (tmp_path / NAME).mkdir(parents=True)
    for path in (NAME, "/absent/folder", "./Org/Model-7C", "runs/sft/hf", "gpt2", "../Org/Model"):
        assert str(hub.model_folder(path)) == os.path.normpath(path) or path.startswith("./")
    assert len(downloads) == 2


def test_only_local_rank_0_downloads(downloads, monkeypatch):
    monkeypatch.setattr(hub, "POLL_SECONDS", 0.01)
    waiting = threading.Thread(target=hub.fetch_or_wait, args=(NAME, 1), kwargs={"waited_for": True})
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    assert downloads == []
    hub.fetch_or_wait(NAME, 0, waited_for=True)
    waiting.join(10)
    assert not waiting.is_alive()
    assert len(downloads) == 1
    assert hub.model_folder(NAME).is_dir()


def test_the_others_end_with_the_reason(monkeypatch):
    def fails(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(hub, "POLL_SECONDS", 0.01)
    said = []

    def wait():
        try:
            hub.fetch_or_wait(NAME, 3, waited_for=True)
        except InputError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(InputError) as error:
        hub.fetch_or_wait(NAME, 0, waited_for=True)
    waiting.join(10)
    offline = (
        f"no folder '{NAME}' here, and it cannot be downloaded (no connection): where there is a connection run "
        f"`hf download {NAME}`, and give the snapshot folder that it prints"
    )
    assert str(error.value) == offline
    assert said == [f"local rank 3 needs {NAME}, which local rank 0 downloads; it failed: {offline}"]


def test_offline_says_the_command():
    """conftest.py sets HF_HUB_OFFLINE: this is huggingface_hub itself."""
    with pytest.raises(
        InputError, match=r"run `hf download Org/Model-7B --revision v2`, and give the snapshot folder"
    ):
        hub.model_folder(f"{NAME}@v2")


def test_the_root_of_the_cache_names_the_snapshot(tmp_path):
    model = tmp_path / "hub" / "models--Org--Model-7B"
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "refs").mkdir()
    for path in (model, model / "snapshots"):
        with pytest.raises(InputError, match=f"give its snapshot folder {model}/snapshots/abc"):
            hub.model_folder(path)
    for path in (tmp_path / "hub", tmp_path):
        with pytest.raises(InputError, match=f"give one of its models by name, {NAME}"):
            hub.model_folder(path)
    assert hub.model_folder(model / "snapshots" / "abc") == model / "snapshots" / "abc"


def test_an_upload_is_refused_at_the_start_where_it_cannot_be_made(monkeypatch):
    with pytest.raises(InputError, match="HF_HUB_OFFLINE switches off"):
        hub.require_can_upload("Org/Mine")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="run `hf auth login`, or set HF_TOKEN"):
        hub.require_can_upload("Org/Mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    hub.require_can_upload("Org/Mine")
    with pytest.raises(InputError, match="is no name of a repository"):
        hub.require_can_upload("Org/-Mine")
    for wrong, line in (("Mine", "must be ORG/NAME, got 'Mine'"), ("Org/Mine", "needs checkpoint.export_hf")):
        with pytest.raises(InputError, match=line):
            CheckpointConfig(dir="run", push_to_hub=wrong, export_hf=wrong == "Mine")


def test_a_failed_upload_loses_nothing_and_says_the_command(monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if len(calls) == 1:
                raise OSError("quota")
            return f"hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(OSError, match=f"run `hf upload Org/Mine {tmp_path}`"):
        hub.upload(tmp_path, "Org/Mine")
    assert hub.upload(tmp_path, "Org/Mine") == "hub/Org/Mine"
    assert calls == [("Org/Mine", {"private": True, "exist_ok": True})] * 2
