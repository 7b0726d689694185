"""Read runs for a report: rows, configuration, differences between configurations, summaries."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_align.config.yaml_text import read_yaml
from megatron_align.errors import InputError

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.yaml", "samples.jsonl"
_REWARDS = "rewards"
_NAMES_A_RUN = ("checkpoint.dir",)  # always differs between runs
_LAST = 0.1  # of the steps: final values are means over them

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run, perhaps unfinished."""

    name: str
    folder: Path
    rows: dict[str, list[Row]]  # by split
    config: dict[str, Any]  # {"section.key": value}; empty where the folder has none

    @property
    def training(self) -> list[Row]:
        """Rows of the training steps, at least one."""
        return self.rows["train"]

    def points(self, metric: str, split: str = "train") -> list[tuple[int, float]]:
        """Return ``(step, value)`` of a metric where it is a number."""
        return [
            (row["step"], row[metric])
            for row in self.rows.get(split, [])
            if isinstance(row.get(metric), (int, float))
        ]

    def final(self, metric: str, split: str = "train") -> float | None:
        """Return a metric's mean over the last tenth of its points, or None if it has none."""
        values = [value for _, value in self.points(metric, split)]
        last = values[-max(1, round(_LAST * len(values))) :]
        return sum(last) / len(last) if last else None

    def total(self, metric: str) -> float:
        """Return the sum of a metric over the training steps."""
        return math.fsum(value for _, value in self.points(metric))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read runs and give each a unique name.

    Raises:
        InputError: a folder has no metrics, the metrics are corrupt, or a folder is given twice.
    """
    paths = [Path(folder) for folder in folders]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"each run must be given once, got {path} twice")
        seen.add(path.resolve())
    return [
        Run(name=name, folder=path, rows=_read_rows(path), config=_read_config(path))
        for name, path in zip(_names(paths), paths, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct suffixes of the paths, at least one component long."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-length:]) for of in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def _read_rows(folder: Path) -> dict[str, list[Row]]:
    file = folder / METRICS
    if not file.is_file():
        children = sorted(str(child.parent) for child in folder.glob(f"*/{METRICS}"))
        hint = f"; it contains runs: {', '.join(children[:4])}" if children else ""
        raise InputError(f"{folder} is not the folder of a run: it has no {METRICS}{hint}")
    try:
        *lines, _ = file.read_text(encoding="utf-8").split("\n")  # the last one is empty, or incomplete
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} must be JSON Lines in UTF-8, got {error.reason} at {error.start}"
        ) from error
    rows: dict[str, list[Row]] = {}
    for number, line in enumerate(lines, start=1):
        row = _row(line, f"{file}:{number}")
        rows.setdefault(row.get("split", "train"), []).append(row)
    if not rows.get("train"):
        raise InputError(f"{file} has no row of a training step")
    return rows


def read_samples(folder: Path) -> list[Row]:
    """Return the answers of validation.generate, oldest first; none if the run has no samples.jsonl.

    Raises:
        InputError: the file is corrupt; names the line.
    """
    file = folder / SAMPLES
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    rows = [_row(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("prompt", "completion", "finish_reason") if name not in row]:
            raise InputError(f"{file}:{number}: must have {', '.join(missing)}, as a run writes it")
    return rows


def as_prompt(prompt: Any) -> str:
    """Return a prompt of samples.jsonl as text: messages one after the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: must be a line of JSON, got {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise InputError(f"{where}: must be an object with a step, got {line.strip()[:80]}")
    return row


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        return {}
    content = read_yaml(str(file))
    rewards = content.get(_REWARDS)  # a list, whose entries have names
    if isinstance(rewards, list) and all(isinstance(reward, dict) for reward in rewards):
        content[_REWARDS] = {reward.get("name", number): reward for number, reward in enumerate(rewards)}
    if not all(isinstance(section, dict) for section in content.values()):
        raise InputError(f"{file} must hold sections of options, as written by a run")
    return {f"{section}.{key}": value for section, of in content.items() for key, value in of.items()}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return ``{key: values of all runs}`` of the options that differ; "–" where an option is not set."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in _NAMES_A_RUN)
    values_of = {key: [as_text(run.config.get(key)) for run in runs] for key in keys}
    return {key: values for key, values in values_of.items() if len(set(values)) > 1}


def as_text(value: Any) -> str:
    """Return the value of an option as text."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary(run: Run) -> list[tuple[str, str]]:
    """Return key results of a run as ``(name, text)``, with the same names for every run."""
    seconds, tokens = run.total("step_seconds"), run.total("tokens")
    best = min(run.points("loss", "validation"), key=lambda point: point[1], default=None)
    shares = [run.final("accuracy", split) for split in ("validation", "train")]
    accuracy = next((share for share in shares if share is not None), None)
    troubles = {
        name: run.training[-1].get(name) for name in ("skipped_steps", "loss_spikes", "grad_norm_outliers")
    }
    return [
        ("steps", _steps(run)),
        ("loss, first", short(run.training[0].get("loss"))),
        ("loss, last tenth", short(run.final("loss"))),
        ("best validation loss", f"{short(best[1])} at step {best[0]:,}" if best else "–"),
        ("reward margin", short(run.final("reward_margin"))),
        ("accuracy", "–" if accuracy is None else f"{accuracy:.1%}"),
        ("tokens", f"{tokens:,.0f}"),
        ("time in steps", duration(seconds)),
        ("tokens/s", short(tokens / seconds) if seconds else "–"),
        ("skipped · spikes · outliers", " · ".join("–" if n is None else str(n) for n in troubles.values())),
    ]


def _steps(run: Run) -> str:
    last, planned = run.training[-1]["step"], run.config.get("train.steps")
    return f"{last:,} of {planned:,}" if isinstance(planned, int) else f"{last:,}"


def short(value: float | None) -> str:
    """Format a number with four significant digits."""
    if value is None:
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
