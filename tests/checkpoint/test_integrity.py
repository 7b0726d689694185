"""Each file of a checkpoint, cut short, with one bit flipped, or missing: it is named, and a run goes on before it."""

import re
import shutil
import subprocess

import pytest

from megatron_align.checkpoint import folder as sharded
from megatron_align.convert.convert import export_hf, import_hf
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.storage import checksums as sums
from megatron_align.storage.atomic_write import files_below
from megatron_align.training.resume import ResumePoint, find_resume_point
from tests.harness.damage import DAMAGES, flip
from tests.harness.tiny import make_model, run_arguments


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    import_hf(make_model(folder / "hf", num_hidden_layers=1), folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture
def run(tmp_path, whole):
    """A run's folder with two checkpoints."""
    for step in (1, 2):
        shutil.copytree(whole, tmp_path / f"step_{step:06d}")
    return tmp_path


def resume_point(run, **options):
    config = parse(run_arguments("model", "chat.jsonl", run, **options))
    return find_resume_point(config, run, sharded.checkpoint_shape(run / "step_000001"))


def test_a_whole_checkpoint_is_whole(whole):
    assert sharded.damage(whole) == sharded.damage(whole, small=True) == []
    files = files_below(whole)
    assert {"SHA256SUMS", "card.json", "hf_assets/tokenizer.json", "state/.metadata"} < set(files)
    assert len(files) == len((whole / "SHA256SUMS").read_text().splitlines())  # all but itself, and a head


def test_coreutils_reads_the_list_too(run):
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(command, cwd=run / "step_000001", capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    flip(run / "step_000001" / "state" / "__0_0.distcp")
    bad = subprocess.run(command, cwd=run / "step_000001", capture_output=True, text=True, check=False)
    assert "state/__0_0.distcp: FAILED" in bad.stdout


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_damaged_file_is_named(run, whole, kind):
    for name in files_below(whole):
        path = run / "step_000002" / name
        DAMAGES[kind](path)
        [line] = sharded.damage(path.parents[name.count("/")])
        assert str(path) in line
        with pytest.raises(InputError, match="an undamaged checkpoint is needed"):
            sharded.require_intact(run / "step_000002")
        shutil.copyfile(whole / name, path)
    assert sharded.damage(run / "step_000002") == []


@pytest.mark.parametrize("kind", DAMAGES)
def test_nothing_is_exported_of_a_damaged_checkpoint(run, whole, kind):
    """Hashed while it is read: what was read of it by then comes to nothing, and the damaged file is what is named."""
    for name in files_below(whole):
        path = run / "step_000002" / name
        DAMAGES[kind](path)
        with pytest.raises(InputError, match=re.escape(str(path))):
            export_hf(run / "step_000002", run / "hf")
        assert not list(run.glob("*hf*"))
        shutil.copyfile(whole / name, path)
    export_hf(run / "step_000002", run / "hf")


def test_files_of_weights_are_hashed_in_passing(run, monkeypatch):
    """Export reads them once, for use and for the hash."""
    hashed, hash_file = [], sums.hash_file
    monkeypatch.setattr(sums, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    export_hf(run / "step_000001", run / "hf")
    assert "card.json" in hashed
    assert not [name for name in hashed if name.endswith(".distcp")]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_goes_on_before_it(run, whole, kind):
    for name in files_below(whole):
        if name.endswith(".distcp") and kind != "missing":
            continue  # read and hashed when the ranks have met, see test_crash.py
        path = run / "step_000002" / name
        DAMAGES[kind](path)
        point = resume_point(run)
        assert (point.step, point.folder) == (1, run / "step_000001")
        [(folder, line)] = point.corrupt
        assert folder == run / "step_000002"
        assert str(path) in line
        shutil.copyfile(whole / name, path)
    assert resume_point(run) == ResumePoint(2, run / "step_000002")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run):
    for step in (1, 2):
        (run / f"step_{step:06d}" / "card.json").unlink()
    config = parse(run_arguments("model", "chat.jsonl", run))
    with pytest.raises(InputError, match="no intact checkpoint in .*: .*step_000002.*step_000001"):
        find_resume_point(config, run, shape=None)


def test_what_is_kept(run, whole):
    for step in range(3, 11):
        shutil.copytree(whole, run / f"step_{step:06d}")
    sharded.prune(run, keep=2, keep_every=4)
    assert [step for step, _ in sharded.list_steps(run)] == [4, 8, 9, 10]
    sharded.prune(run, keep=1)
    assert [step for step, _ in sharded.list_steps(run)] == [10]
    assert list(run.glob(".*")) == []
