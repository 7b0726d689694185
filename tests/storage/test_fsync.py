"""Without fsync, of folders or at all, writing continues after one warning; a disk error is an error."""

import errno
import os
import stat

import pytest

from megatron_align.storage.atomic_write import commit_folder, partial_folder
from megatron_align.storage.direct_io import DirectFile
from megatron_align.storage.fsync import fsync


@pytest.fixture
def refuse(monkeypatch):
    """``refuse(number, kinds)`` makes fsync fail with an error number, for folders, files or both."""

    def install(number, kinds):
        for name in ("fsync", "fdatasync"):
            real = getattr(os, name)

            def call(handle, real=real):
                kind = "folders" if stat.S_ISDIR(os.fstat(handle).st_mode) else "files"
                if kind in kinds:
                    raise OSError(number, os.strerror(number))
                real(handle)

            monkeypatch.setattr(os, name, call)

    return install


def write(tmp_path):
    folder = tmp_path / "out"
    partial = partial_folder(folder)
    partial.mkdir()
    file = DirectFile(partial / "data")
    file.write(0, memoryview(b"content"))
    file.finish()
    commit_folder(partial, folder)
    return (folder / "data").read_bytes()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("kinds", [["folders"], ["files", "folders"]], ids=str)
def test_one_warning_and_the_folder_is_written(tmp_path, refuse, capsys, number, kinds):
    refuse(number, kinds)
    assert write(tmp_path) == b"content"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(kinds)
    for kind, line in zip(kinds, lines, strict=True):
        assert line.startswith(
            f"warning: the file system cannot force {kind} onto the disk (fsync), first seen at"
        )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_a_disk_that_fails_is_an_error(tmp_path, refuse, number, kind):
    refuse(number, [kind])
    with pytest.raises(OSError, match=os.strerror(number)):
        write(tmp_path)


def test_a_folder_that_may_be_written_and_not_read(tmp_path, monkeypatch, capsys):
    def denied(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    fsync(tmp_path)
    assert "folders that are not readable" in capsys.readouterr().err
