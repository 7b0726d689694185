"""A mount point cannot be renamed: it is refused before the first byte is written, whatever kind of mount it is."""

import subprocess
from contextlib import ExitStack

import pytest

from megatron_align.errors import InputError
from megatron_align.storage.atomic_write import CommitFailed, commit_folder, partial_folder, require_new
from megatron_align.storage.deletion import delete_folder
from megatron_align.storage.mounts import mounts_within, require_replaceable
from tests.harness import refusals

KINDS = {
    "tmpfs": lambda tmp_path: ["-t", "tmpfs", "tmpfs"],
    "bind": lambda tmp_path: [
        "--bind",
        tmp_path / "volume",
    ],  # on the same file system: a device number tells nothing
    "simulated": None,  # needs no rights
}


@pytest.fixture(params=KINDS)
def mounted(request, tmp_path):
    """``mounted(folder)`` mounts at a folder until the test ends."""
    mounts, make = [], KINDS[request.param]
    (tmp_path / "volume").mkdir()

    def mount(folder):
        folder.mkdir(parents=True)
        if make is None:
            mounts.append(folder)
            return folder
        command = ["mount", *make(tmp_path), folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        mounts.append(folder)
        return folder

    with ExitStack() as simulated:
        if make is None:
            simulated.enter_context(refusals.mounted(mounts, tmp_path / "mountinfo"))
        yield mount
    for folder in mounts if make else ():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["out", "a folder with spaces", "back\\slash"])
def test_a_mount_point_is_refused_as_output(mounted, tmp_path, name):
    out = mounted(tmp_path / name)
    with pytest.raises(InputError, match="must not be a mount point") as refused:
        require_new(out)
    assert f"mounted at {out}" in str(refused.value)
    assert "\n" not in str(refused.value)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(InputError, match="must not be a mount point"):
        require_new(tmp_path / "link")


def test_folders_in_a_mount_and_next_to_it_are_fine(mounted, tmp_path):
    volume = mounted(tmp_path / "out")
    for folder in (volume / "model", tmp_path / "out2", tmp_path / "other"):
        assert require_new(folder) == folder
        assert mounts_within(folder) == []
        folder.mkdir()
        partial_folder(folder).mkdir()
        commit_folder(partial_folder(folder), folder)


def test_a_mount_below_is_neither_replaced_nor_emptied(mounted, tmp_path):
    volume = mounted(tmp_path / "old" / "data")
    (volume / "precious").write_text("x")
    with pytest.raises(InputError, match="must not be a mount point or contain one"):
        require_replaceable(tmp_path / "old", "the folder")
    assert f"mounted at {volume}" in delete_folder(tmp_path / "old")
    assert (volume / "precious").exists()


def test_a_result_that_cannot_get_its_name_is_kept(mounted, tmp_path):
    """It was mounted meanwhile."""
    out, partial = tmp_path / "out", partial_folder(tmp_path / "out")
    partial.mkdir()
    (partial / "model").write_text("x")
    mounted(out)
    with pytest.raises(CommitFailed, match=f"stays at {partial}: Device or resource busy"):
        commit_folder(partial, out)
    assert (partial / "model").read_text() == "x"
