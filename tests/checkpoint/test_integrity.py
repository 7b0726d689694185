"""Each file of a checkpoint, truncated, with one bit flipped, or missing: it is named, and a run falls back from it."""

import re
import shutil
import subprocess

import pytest

from megatron_align.checkpoint.card import checkpoint_shape
from megatron_align.checkpoint.integrity import find_corrupt_files, require_intact
from megatron_align.convert.export_hf import export_hf
from megatron_align.convert.import_hf import import_hf
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.storage import checksums
from megatron_align.storage.atomic_write import files_below
from megatron_align.training.resume import ResumePoint, find_resume_point
from tests.harness.corruption import CORRUPTIONS, flip
from tests.harness.tiny import make_model, run_arguments


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    import_hf(make_model(folder / "hf", num_hidden_layers=1), folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture
def run(tmp_path, intact):
    """A run's folder with two checkpoints."""
    for step in (1, 2):
        shutil.copytree(intact, tmp_path / f"step_{step:06d}")
    return tmp_path


def resume_point(run, **options):
    config = parse(run_arguments("model", "chat.jsonl", run, **options))
    return find_resume_point(config, run, checkpoint_shape(run / "step_000001"))


def test_an_intact_checkpoint_is_intact(intact):
    assert find_corrupt_files(intact) == find_corrupt_files(intact, quick=True) == []
    files = files_below(intact)
    assert {"SHA256SUMS", "card.json", "hf_assets/tokenizer.json", "state/.metadata"} < set(files)
    assert len(files) == len((intact / "SHA256SUMS").read_text().splitlines())  # all but itself, and a head


def test_coreutils_reads_the_list_too(run):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(command, cwd=run / "step_000001", capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    flip(run / "step_000001" / "state" / "__0_0.distcp")
    bad = subprocess.run(command, cwd=run / "step_000001", capture_output=True, text=True, check=False)
    assert "state/__0_0.distcp: FAILED" in bad.stdout


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_corrupt_file_is_named(run, intact, kind):
    for name in files_below(intact):
        path = run / "step_000002" / name
        CORRUPTIONS[kind](path)
        [line] = find_corrupt_files(path.parents[name.count("/")])
        assert str(path) in line
        with pytest.raises(InputError, match="checkpoint is corrupt: "):
            require_intact(run / "step_000002")
        shutil.copyfile(intact / name, path)
    assert find_corrupt_files(run / "step_000002") == []


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_nothing_is_exported_of_a_corrupt_checkpoint(run, intact, kind):
    """Checked while it is read: the output is discarded, and the error names the corrupt file."""
    for name in files_below(intact):
        path = run / "step_000002" / name
        CORRUPTIONS[kind](path)
        with pytest.raises(InputError, match=re.escape(str(path))):
            export_hf(run / "step_000002", run / "hf")
        assert not list(run.glob("*hf*"))
        shutil.copyfile(intact / name, path)
    export_hf(run / "step_000002", run / "hf")


def test_files_of_weights_are_read_once(run, monkeypatch):
    """Export reads them once, for the weights and for the checksum."""
    hashed, hash_file = [], checksums.hash_file
    monkeypatch.setattr(checksums, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    export_hf(run / "step_000001", run / "hf")
    assert "card.json" in hashed
    assert not [name for name in hashed if name.endswith(".distcp")]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_run_falls_back_from_it(run, intact, kind):
    for name in files_below(intact):
        if name.endswith(".distcp") and kind != "missing":
            continue  # read and hashed when the ranks have met, see test_crash.py
        path = run / "step_000002" / name
        CORRUPTIONS[kind](path)
        point = resume_point(run)
        assert (point.step, point.folder) == (1, run / "step_000001")
        [(folder, line)] = point.corrupt
        assert folder == run / "step_000002"
        assert str(path) in line
        shutil.copyfile(intact / name, path)
    assert resume_point(run) == ResumePoint(2, run / "step_000002")


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_restart(run):
    for step in (1, 2):
        (run / f"step_{step:06d}" / "card.json").unlink()
    config = parse(run_arguments("model", "chat.jsonl", run))
    with pytest.raises(InputError, match="no intact checkpoint in .*: .*step_000002.*step_000001"):
        find_resume_point(config, run, shape=None)
