"""Training runs of a test file, each made once: most are compared with the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of


def remembered_runs(pool, tmp_path_factory, arguments: Callable[..., list[str]]) -> Callable[..., list[dict]]:
    """Return ``run(what, world=1, **options)``: the training rows of a run, from an earlier call if it was the same.

    Args:
        pool: of ranks.
        tmp_path_factory: pytest's.
        arguments: ``(folder, what, **options)`` -> command line.
    """
    done: dict[Any, list[dict]] = {}

    def run(what: Any, world: int = 1, **options: Any) -> list[dict]:
        key = (json.dumps(what), world, tuple(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            pool.run(world, training_ranks.train, arguments(folder, what, **options))
            done[key] = metrics_of(folder)
        return done[key]

    return run
