"""What cannot be deleted ends no run: as much as possible goes, a warning says what stays, and no link is followed."""

import os
import subprocess

import pytest

from megatron_align.storage.deletion import delete_folder, discard
from tests.harness import refusals


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "old"
    (folder / "state").mkdir(parents=True)
    for name in ("a", "state/b", "state/c"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture(params=["chattr", "simulated"])
def immutable(request, folder):
    """A file that even root cannot delete."""
    file = folder / "state" / "b"
    if request.param == "simulated":
        with refusals.immutable(file):
            yield file
        return
    if subprocess.run(["chattr", "+i", file], capture_output=True, check=False).returncode:
        pytest.skip("chattr needs root and a file system that has the attribute")
    yield file
    for path in folder.parent.rglob("b"):
        subprocess.run(["chattr", "-i", path], check=True)


def test_a_folder_is_deleted(folder):
    assert delete_folder(folder) is None
    assert not folder.exists()


def test_what_can_be_deleted_goes_and_the_reason_is_named(folder, immutable):
    reason = delete_folder(folder)
    assert reason == f"Operation not permitted: {immutable}"
    assert sorted(path.name for path in folder.rglob("*")) == ["b", "state"]


def test_what_stays_frees_the_name_and_is_named_once(folder, immutable, capsys):
    discard(folder)
    assert not folder.exists()
    [stays] = folder.parent.iterdir()
    assert stays.name.startswith(".old.")
    discard(stays)
    for _ in range(2):
        discard(stays)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"warning: a folder that is no longer needed cannot be deleted and stays at {stays}: "
        f"Operation not permitted: {folder / 'state' / 'b'}"
    )
    assert len(lines) == 2  # one for each of the two names


@pytest.mark.parametrize("place", ["folder", "below"])
def test_no_link_is_followed(folder, tmp_path, place):
    archive = tmp_path / "archive"
    (folder / "state").rename(archive)
    (folder / "state").symlink_to(archive)
    if place == "folder":
        link = tmp_path / "link"
        link.symlink_to(folder)
        assert f"link to {folder}" in delete_folder(link)
        assert link.is_symlink()
        discard(link)  # the link alone, its target stays
        assert not os.path.lexists(link)
        assert (folder / "a").exists()
    else:
        assert delete_folder(folder) is None
    assert sorted(path.name for path in archive.iterdir()) == ["b", "c"]
