"""Lines of a pipe in batches: those that have come are taken together, so that nothing waits for what is not there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import IO


def arriving(stream: IO[bytes], most: int, name: str = "standard input") -> Iterator[list[tuple[str, str]]]:
    """Yield batches of lines that are not blank, each with its place ``name:line``.

    Args:
        stream: of UTF-8 text.
        most: lines of a batch.
        name: of the stream, for errors.
    """
    arrived: queue.Queue[tuple[int, bytes] | None] = queue.Queue(4 * most)

    def read() -> None:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                arrived.put((number, line))
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    is_open = True
    while is_open:
        batch, waiting = [], arrived.get()
        while waiting is not None:
            batch.append((f"{name}:{waiting[0]}", waiting[1].decode("utf-8", "replace")))
            if len(batch) == most:
                break
            try:
                waiting = arrived.get_nowait()
            except queue.Empty:
                break
        is_open = waiting is not None
        if batch:
            yield batch
