"""A file of lines is complete or absent, is continued where a killed process stopped, and has one writer at a time."""

import os
from dataclasses import replace

import pytest

from megatron_align import faults
from megatron_align.errors import InputError
from megatron_align.storage import fsync
from megatron_align.storage.lock_holder import Holder
from megatron_align.storage.resumable_lines import ResumableLines

KEY = {"seed": 1}


def lock_elsewhere(path):
    """Another machine takes the lock of a file's writer."""
    lock = path.with_name(f".{path.name}.lock")
    lock.write_text(replace(Holder.this_process(lock, ""), host="node7", machine="another boot").to_text())


def test_lines_are_continued_and_the_file_appears_complete(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    with ResumableLines(path, KEY) as lines:
        lines.append(["a", "b"])
    assert not path.exists()
    with (path.parent / ".lines.jsonl.partial").open("ab") as file:
        file.write(b"inc")
    with (
        pytest.raises(InputError, match="other options .seed 1 instead of 2."),
        ResumableLines(path, {"seed": 2}),
    ):
        pass
    with ResumableLines(path, KEY) as lines:
        assert lines.done == 2
        lines.append(["c"])
        lines.finish()
    assert path.read_text() == "a\nb\nc\n"
    assert os.listdir(path.parent) == ["lines.jsonl"]


def test_a_second_writer_is_refused_and_one_that_waited_finds_the_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    second = ResumableLines(path, KEY)
    with ResumableLines(path, KEY) as lines:
        with (
            pytest.raises(InputError, match=f"is writing {path}: process {os.getpid()} on .*wait until"),
            second,
        ):
            pass
        lines.append(["a"])
        lines.finish()
    with pytest.raises(InputError, match="must be a new file"), second:
        pass
    assert os.listdir(tmp_path) == ["lines.jsonl"]


@pytest.mark.parametrize("call", ["append", "finish"])
def test_a_paused_writer_that_lost_its_lock_changes_nothing(tmp_path, call):
    path = tmp_path / "lines.jsonl"
    with ResumableLines(path, KEY) as lines:
        lines.append(["a"])
        lock_elsewhere(path)
        with pytest.raises(InputError, match="on node7, .* took the lock"):
            lines.append(["b"]) if call == "append" else lines.finish()
    assert (tmp_path / ".lines.jsonl.partial").read_text() == "a\n"
    assert (tmp_path / ".lines.jsonl.lock").exists()
    assert not path.exists()


def test_a_file_system_without_fsync_is_warned_of(tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(fsync.os, "fsync", refused)
    with ResumableLines(tmp_path / "lines.jsonl", KEY) as lines:
        lines.append(["a"])
        lines.finish()
    assert "cannot force files onto the disk" in capsys.readouterr().err
    assert (tmp_path / "lines.jsonl").read_text() == "a\n"


def test_a_full_disk_loses_no_line_that_was_written(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    with ResumableLines(path, KEY) as lines:
        lines.append(["a"])
        monkeypatch.setenv(faults.VARIABLE, "full@row.write")
        with pytest.raises(OSError, match="No space left"):
            lines.append(["b"])
    monkeypatch.delenv(faults.VARIABLE)
    with ResumableLines(path, KEY) as lines:
        assert lines.done == 1
