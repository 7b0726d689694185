"""Alignment training on megatron-core: HF checkpoint in, HF checkpoint out.

The library's entry points, which the commands call too::

    from megatron_align import Trainer, load_config

    with Trainer.open(load_config("run.yaml", {"optimizer.lr": 2e-5})) as trainer: ...
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron_align.version import __version__

# Imported at first use: they need torch and megatron-core, which errors or versions do not.
_ENTRY_POINTS = {
    "Trainer": "megatron_align.training.trainer",
    "augment": "megatron_align.augmentation.augment",
    "evaluate": "megatron_align.evaluation.run",
    "generate": "megatron_align.evaluation.generation",
    "load_config": "megatron_align.objectives.configuration",
}
# What training and evaluation take from floors above them, by the same way.
_PROVIDED = {
    "augmenter": ("megatron_align.augmentation.augment", "augmenter"),
    "validation_tasks": ("megatron_align.evaluation.during_training", "prepare"),
}
__all__ = ["Trainer", "__version__", "augment", "evaluate", "generate", "load_config"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in _ENTRY_POINTS:
        return getattr(importlib.import_module(_ENTRY_POINTS[name]), name)
    if name in _PROVIDED:
        module, provided = _PROVIDED[name]
        return getattr(importlib.import_module(module), provided)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
