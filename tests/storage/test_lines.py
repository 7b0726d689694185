"""Only a line feed ends a line: names of files and texts may hold every other separator that Python splits at."""

from pathlib import Path

from megatron_align.storage import journal, mounts
from megatron_align.storage.checksums import read_checksums, write_checksums
from megatron_align.storage.journal import Journal
from megatron_align.storage.resumable_lines import ResumableLines, read_rows

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
ODD = f"a{SEPARATORS}b"


def test_checksums_of_oddly_named_files(tmp_path):
    checksums = {ODD: "0" * 64, "plain": "1" * 64}
    write_checksums(tmp_path, checksums)
    assert read_checksums(tmp_path) == checksums


def test_mounts_at_oddly_named_folders(tmp_path, monkeypatch):
    listing = tmp_path / "mountinfo"
    listing.write_bytes(
        f"1 2 0:3 / /mnt/{ODD}\r ro - tmpfs x ro\n1 2 0:3 / /mnt/c\\040d ro - tmpfs x ro\n".encode()
    )
    monkeypatch.setattr(mounts, "_MOUNTS", listing)
    assert mounts.mounts_within(Path("/mnt")) == [Path(f"/mnt/{ODD}\r"), Path("/mnt/c d")]


def test_rows_and_journals(tmp_path):
    with ResumableLines(tmp_path / "rows", {}) as lines:
        lines.append([f'"{line}"' for line in ("\x85", "\u2028", "x")])
        lines.finish()
    assert read_rows(tmp_path / "rows") == ["\x85", "\u2028", "x"]
    written = Journal(tmp_path / "out", {"of": ODD})
    (written.partial / ODD).write_text("x")
    written.add(written.partial / ODD, ODD)
    written.abandon(KeyboardInterrupt)  # kept for the next start
    assert Journal(tmp_path / "out", {"of": ODD}).done == {ODD: ODD}


def test_a_fingerprint_leaves_out_hidden_files(tmp_path):
    """The unfinished output of a generation may be next to the model that it reads."""
    (tmp_path / "weights").write_text("x")
    before = journal.fingerprint(tmp_path)
    (tmp_path / ".answers.jsonl.partial").write_text("x")
    assert journal.fingerprint(tmp_path) == before
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "template").write_text("x")
    assert journal.fingerprint(tmp_path) != before
