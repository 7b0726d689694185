"""Progress of a pass over items: a bar on a terminal, a line every half minute elsewhere; only rank 0 shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_align.storage.progress import SECONDS_PER_LINE

Advance = Callable[[int, int], None]  # items done since the last call, tokens generated since


@contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """Yield a function that counts items and tokens within a with-block.

    Args:
        title: of the pass.
        total: number of items.
        shown: False: nothing is shown (other ranks).
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
    began = reported = time.monotonic()
    done = tokens = 0
    with bar:
        task = bar.add_task(title, total=total, speed="")

        def advance(items: int, more_tokens: int = 0) -> None:
            nonlocal done, tokens, reported
            done, tokens, now = done + items, tokens + more_tokens, time.monotonic()
            speed = f"{tokens / max(now - began, 1e-3):,.0f} tokens/s" if tokens else ""
            bar.update(task, completed=done, speed=speed)
            if shown and not console.is_terminal and now - reported >= SECONDS_PER_LINE:
                reported = now
                print(
                    f"{title}: {done:,} of {total:,}{', ' * bool(speed)}{speed}", file=sys.stderr, flush=True
                )

        yield advance
