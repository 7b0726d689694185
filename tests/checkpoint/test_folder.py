"""Which checkpoints of a run are kept, and what a start makes of folders that a kill has left."""

import subprocess
from contextlib import contextmanager

import pytest

from megatron_align.checkpoint.folder import clean_up_after_kill, find_checkpoint, list_steps, prune
from tests.harness import refusals


@pytest.fixture
def run(tmp_path):
    """A run's folder with ten checkpoints."""
    for step in range(1, 11):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "card.json").write_text("{}")
    return tmp_path


def test_which_checkpoints_are_kept(run):
    prune(run, keep=2, keep_every=4)
    assert [step for step, _ in list_steps(run)] == [4, 8, 9, 10]
    prune(run, keep=1)
    assert [step for step, _ in list_steps(run)] == [10]
    assert list(run.glob(".*")) == []


def test_the_newest_checkpoint_of_a_run_is_found_and_other_folders_are_not(run):
    assert find_checkpoint(run) == run / "step_000010"
    assert find_checkpoint(run / "step_000003") == run / "step_000003"
    (run / "step_000011.damaged").mkdir()
    assert find_checkpoint(run) == run / "step_000010"
    (run / "empty").mkdir()
    assert find_checkpoint(run / "empty") is None


def test_leftovers_of_a_kill_are_deleted_and_a_replaced_folder_is_restored(run):
    for name in (".step_000011.partial", ".step_000001.deleted", ".step_000010.replaced", ".hf.replaced"):
        (run / name).mkdir()
        (run / name / "file").write_text(name)
    clean_up_after_kill(run)
    assert list(run.glob(".*")) == []
    assert (run / "hf" / "file").read_text() == ".hf.replaced"  # its replacement was not completed
    assert not (run / "step_000010" / "file").exists()  # its replacement was


@pytest.mark.parametrize("name", ["SHA256SUMS", "card.json"])
@pytest.mark.parametrize("of_hf", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_hugging_face_folder_with_files_of_our_names_is_no_checkpoint(tmp_path, name, of_hf):
    (tmp_path / name).write_text("{}")
    assert find_checkpoint(tmp_path) == tmp_path  # an incomplete checkpoint, which is reported as one
    (tmp_path / of_hf).write_text("{}")
    (tmp_path / "step_000001").mkdir()
    assert find_checkpoint(tmp_path) is None


def test_a_checkpoint_that_is_a_link_stays_with_its_archive(run, tmp_path_factory, capsys):
    archive = tmp_path_factory.mktemp("archive") / "step"
    (run / "step_000003").rename(archive)
    (run / "step_000003").symlink_to(archive)
    for _ in range(2):
        prune(run, keep=1)
        clean_up_after_kill(run)
    assert [step for step, _ in list_steps(run)] == [3, 10]
    assert (archive / "card.json").exists()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: the old checkpoint of step 3 is not deleted, it stays at {run / 'step_000003'}: it"
    )
    assert f"is a link to {archive}" in line


@contextmanager
def changed_attribute(path):
    """Set the attribute of the file system until the with-block ends; the checkpoint may be renamed meanwhile."""
    run = path.parent if path.is_dir() else path.parent.parent
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("chattr needs root and a file system that has the attribute")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-R", "-i", run], check=True)


@pytest.mark.parametrize("immutable", [changed_attribute, refusals.immutable], ids=["chattr", "simulated"])
@pytest.mark.parametrize("what", ["card.json", ""])
def test_an_immutable_checkpoint_ends_no_run(run, capsys, immutable, what):
    """Neither its file nor its folder can be deleted, or even renamed; the others are."""
    with immutable(run / "step_000003" / what):
        prune(run, keep=1)
        clean_up_after_kill(run)
        left = [path.name for path in run.iterdir() if path.name != "step_000010"]
        assert len(left) == 1
        assert (left == ["step_000003"]) == (what == "")
        first = capsys.readouterr().err.splitlines()
        assert "the old checkpoint of step 3 is not deleted" in first[0]
        prune(run, keep=1)
        clean_up_after_kill(run)
        assert capsys.readouterr().err == ""
