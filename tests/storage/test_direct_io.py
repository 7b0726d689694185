"""A file written around the page cache holds what was written, wherever, and on any disk; a failing one is reported."""

import errno
import os
import random
import resource

import pytest

from megatron_align.storage import direct_io
from megatron_align.storage.direct_io import ALIGNMENT, DirectFile


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 2 * ALIGNMENT)


@pytest.fixture(params=["around", "through", "refused later", "cut short"])
def disk(request, monkeypatch):
    """What a file system makes of writes around the page cache."""
    pwrite = os.pwrite
    around = set()

    def open_direct(path):
        if request.param == "through":
            return None
        # An ordinary handle stands in, as not every disk that tests run on has the real thing.
        around.add(handle := os.open(path, os.O_WRONLY))
        return handle

    def strict(handle, view, place):
        if handle not in around:
            return pwrite(handle, view, place)
        assert place % ALIGNMENT == len(view) % ALIGNMENT == 0
        if request.param == "refused later" and place >= 4 * ALIGNMENT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(handle, view[:100] if request.param == "cut short" else view, place)

    monkeypatch.setattr(direct_io, "_open_direct", open_direct)
    monkeypatch.setattr(direct_io.os, "pwrite", strict)


WRITES = {
    "in order": [(0, 10), (10, 5000), (5010, 3 * ALIGNMENT), (5010 + 3 * ALIGNMENT, 1)],
    "complete blocks": [(0, ALIGNMENT), (ALIGNMENT, 5 * ALIGNMENT)],
    "backwards": [(9000, 3000), (5000, 4000), (0, 5000)],
    "with gaps": [(100, 10), (20000, 30000)],
    "over again": [(0, 20000), (3000, 9000)],
    "nothing": [],
}


@pytest.mark.parametrize("writes", WRITES.values(), ids=list(WRITES))
def test_the_file_holds_what_was_written(tmp_path, disk, writes):
    path, draw = tmp_path / "file", random.Random(0)
    path.write_bytes(before := b"x" * 60_000)
    want, file = bytearray(before), DirectFile(path)
    for offset, size in writes:
        data = bytearray(draw.randbytes(size))
        want[offset : offset + size] = data
        file.write(offset, memoryview(data))
        data[:] = bytes(size)  # the caller may
    file.finish()
    assert path.read_bytes() == want


def test_the_real_disk(tmp_path):
    path, data = tmp_path / "file", random.Random(0).randbytes(70_001)
    file = DirectFile(path)
    file.write(0, memoryview(data)[:9])
    file.write(9, memoryview(data)[9:])
    file.finish()
    assert path.read_bytes() == data


@pytest.mark.parametrize("later", [0, 9 * ALIGNMENT], ids=["at the end", "at a later write"])
def test_a_full_disk_is_reported(tmp_path, later):
    """A limit on the size of files, within a block: what is before it is written."""
    path = tmp_path / "file"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = DirectFile(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write(0, memoryview(bytes(10_001 + later))) or file.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        file.close()
    assert path.stat().st_size == 10_000


def test_a_handle_is_not_kept(tmp_path):
    """Finished, closed early, or failed."""
    before = os.listdir("/proc/self/fd")
    for end in ("finish", "close"):
        file = DirectFile(tmp_path / end)
        file.write(0, memoryview(b"some"))
        getattr(file, end)()
    assert os.listdir("/proc/self/fd") == before
