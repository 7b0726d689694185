"""A file is hashed as it is written; a background write that fails is reported at the next write or at the end."""

import hashlib
import io

import pytest
import torch

from megatron_align.storage import direct_io
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.checksums import HashingFile, HashWhileReading, without_zip_checksums


def test_the_hash_is_that_of_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("a longer text of a run that was killed")
    with HashingFile(path) as file:
        for part in (b"some ", b"bytes", torch.arange(3, dtype=torch.int16).numpy()):
            file.write(part)
        digest = file.finish()
    assert path.read_bytes() == b"some bytes" + bytes([0, 0, 1, 0, 2, 0])
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


BLOCKS = {  # of 100 bytes that somebody reads
    "none": [],
    "all in order": [(0, 40), (40, 100)],
    "with gaps": [(3, 40), (41, 99)],
    "out of order": [(50, 70), (10, 20), (65, 80), (70, 90)],
    "twice": [(0, 30), (0, 30), (30, 31)],
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=list(BLOCKS))
def test_a_file_is_hashed_once_whatever_the_order_of_blocks(tmp_path, blocks):
    path, content = tmp_path / "file", bytes(range(100))
    path.write_bytes(content)
    file = HashWhileReading(path)
    for start, stop in blocks:
        file.add(start, memoryview(content)[start:stop])
    assert file.finish() == hashlib.sha256(content).hexdigest()


def test_what_was_read_is_what_is_hashed(tmp_path):
    """Not what the file holds by then."""
    path = tmp_path / "file"
    path.write_bytes(b"before it was changed")
    file = HashWhileReading(path)
    file.add(0, memoryview(b"before"))
    path.write_bytes(b"after_ it was changed")
    assert file.finish() == hashlib.sha256(b"before it was changed").hexdigest()


@pytest.mark.parametrize("more", [b"", b"more"], ids=["at the end", "at the next write"])
def test_a_background_write_that_fails_is_reported(tmp_path, monkeypatch, more):
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 4)

    def full(*arguments):
        raise OSError(28, "No space left")

    monkeypatch.setattr(direct_io.DirectFile, "_write_buffer", full)
    with HashingFile(tmp_path / "file") as file:
        file.write(b"some")
        with pytest.raises(OSError, match="No space left"):
            file.write(more) if more else file.finish()


def test_save_raises_the_disks_error_and_not_torchs(tmp_path, monkeypatch):
    """torch.save replaces it by a RuntimeError about its own writer."""
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 64)

    def full(*arguments):
        raise OSError(28, "No space left")

    monkeypatch.setattr(direct_io.DirectFile, "_write_buffer", full)
    with HashingFile(tmp_path / "file") as file, pytest.raises(OSError, match="No space left"):
        file.save(torch.ones(3))


def test_the_zips_have_their_checksums_again_afterwards():
    """Within the block none has, also if it is written in the background."""

    def saved():
        buffer = io.BytesIO()
        torch.save(torch.ones(3), buffer)
        return buffer.getvalue()

    usual = saved()
    with without_zip_checksums():
        assert saved() != usual
        assert torch.load(io.BytesIO(saved()), weights_only=True).equal(torch.ones(3))
        found = []
        with BackgroundWorker() as worker:
            worker.run(lambda: found.append(saved()))
        assert found == [saved()]
    assert saved() == usual
