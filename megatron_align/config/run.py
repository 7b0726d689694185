"""A run's configuration: its sections and objective, read from YAML and the command line.

An objective's options are those of its own class, chosen by ``objective.name``: an option that the objective does not
have is an unknown key, never ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_align.config.objectives import OBJECTIVES
from megatron_align.config.sections import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    TrainConfig,
)
from megatron_align.errors import InputError, nearest, require


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Each section checks itself; what needs the model or the data is checked once they are known."""

    model: ModelConfig
    data: DataConfig
    objective: Any  # one of OBJECTIVES
    checkpoint: CheckpointConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        steps, warmup = self.train.steps, self.optimizer.warmup_steps
        require(
            steps is None or warmup <= steps,
            f"optimizer.warmup_steps must not pass train.steps = {steps}, got {warmup}",
        )
        require(
            self.objective.compares or self.reference in (ReferenceConfig(), ReferenceConfig(mode="none")),
            f"objective {self.objective.name} compares with no reference: the options reference.* do not apply",
        )


DRY_RUN = "--dry_run"  # or --dry_run=RANKS: of a launch, so no part of a run's configuration

_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


def parse(arguments: list[str]) -> RunConfig:
    """Build a RunConfig from ``--config FILE`` and ``--section.key value`` arguments (later ones win).

    ``--dry_run`` is passed over: the training command reads it.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
        SystemExit: after ``--help`` or ``--print_config`` has printed.
    """
    arguments = [argument for argument in arguments if argument.partition("=")[0] != DRY_RUN]
    name = _objective_name(arguments)
    require(
        name in OBJECTIVES,
        f"objective.name must be one of {sorted(OBJECTIVES)}, got '{name}'{nearest(name, list(OBJECTIVES))}",
    )
    sections = {**_SECTIONS, "objective": OBJECTIVES[name]}
    parser = ArgumentParser(
        prog="python -m megatron_align.train",
        description="Train a model: torchrun --nproc-per-node N -m megatron_align.train --config run.yaml. With "
        "--dry_run[=RANKS] nothing is trained: all is checked, and layout, batch, memory and steps are printed.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections below")
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
    try:
        parsed = parser.parse_args(_with_objective(arguments, name))
    except ArgumentError as error:
        raise InputError(_one_line(str(error), sections)) from error
    for section in sections:
        require(parsed[section] is not None, f"{section} must be a mapping of options, got null")
    made = {section: kind(**_plain(parsed[section])) for section, kind in sections.items()}
    return RunConfig(**made)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def _plain(section: Namespace) -> dict[str, Any]:
    def plain(key: str, value: Any) -> Any:
        if key in ("betas", "profile_steps") and value is not None:
            return tuple(value)
        if isinstance(value, list):
            return [DataSource(**vars(item)) if isinstance(item, Namespace) else item for item in value]
        return value

    return {key: plain(key, value) for key, value in vars(section).items()}


def _objective_name(arguments: list[str]) -> str:
    """Find objective.name before the real parse, as it decides which options exist."""
    name = "sft"
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key not in ("--config", "--objective.name"):
            continue
        value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
        if key == "--objective.name":
            name = value
        else:
            section = _read_yaml(value).get("objective") or {}
            require(
                isinstance(section, dict),
                f"objective must be a mapping like {{name: sft}}, got {section!r} in {value}",
            )
            name = str(section.get("name", name))
    return name


def _with_objective(arguments: list[str], name: str) -> list[str]:
    """Put the objective of the command line into the files that name another one, as their text."""
    changed = list(arguments)
    for i, argument in enumerate(arguments):
        key, joined, value = argument.partition("=")
        if key != "--config":
            continue
        content = _read_yaml(value or arguments[i + 1])
        if (content.get("objective") or {}).get("name", name) == name:
            continue
        text = yaml.safe_dump({**content, "objective": {**content["objective"], "name": name}})
        changed[i if joined else i + 1] = f"--config={text}" if joined else text
    return changed


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    require(file.is_file(), f"--config needs a YAML file, found none at '{path}'")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    require(
        isinstance(content, dict), f"{path} must hold a mapping of sections, got {type(content).__name__}"
    )
    return content


def _one_line(message: str, sections: dict[str, type]) -> str:
    """Turn jsonargparse's message into one line, with the nearest key for an unknown one."""
    line = " ".join(message.split())
    known = list(sections) + [f"{s}.{f.name}" for s, kind in sections.items() for f in fields(kind)]
    for pattern in (
        r"[Uu]nrecognized arguments?: --([\w.]+)",
        r"[Kk]ey '?([\w.]+)'? is not expected",
        r"Group '(\w+)' does not accept option '(\w+)'",
        r"does not accept option '([\w.]+)'",
    ):
        found = re.search(pattern, line)
        if found:
            key = ".".join(found.groups())
            return f"unknown configuration key '{key}'{nearest(key, known)}"
    return line
