"""A run's configuration: its sections and its objective's options, read from YAML, mappings and the command line.

An objective's options are those of its own class, chosen by ``objective.name``: an option that the objective does not
have is an unknown key, never ignored. The objectives themselves are on a floor above; callers pass their options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_align.config.paths import expand_home
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

OptionsClass = Callable[[str], type]  # from objective.name to the dataclass of its options
# A part of a command line: the content of a configuration file, or one argument.
Part = dict[str, Any] | str


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Each section checks itself; what needs the model or the data is checked once they are read."""

    model: ModelConfig
    data: DataConfig
    objective: Any  # an objectives.options.ObjectiveOptions
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
            f"optimizer.warmup_steps must not exceed train.steps = {steps}, got {warmup}",
        )


DRY_RUN = "--dry_run"  # or --dry_run=RANKS: an option of a launch, not of a run's configuration

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}


def parse(arguments: Sequence[str], options_class: OptionsClass) -> RunConfig:
    """Build a RunConfig from command-line arguments; see :func:`.objectives.configuration.parse`."""
    given = [argument for argument in arguments if argument.partition("=")[0] != DRY_RUN]
    return _build(_parts(given), options_class)


def load(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str],
    options_class: OptionsClass,
) -> RunConfig:
    """Build a RunConfig from a file or a mapping; see :func:`.objectives.configuration.load_config`."""
    content = _plain_mapping(config) if isinstance(config, Mapping) else _read_yaml(str(config))
    if not isinstance(overrides, Mapping):
        for override in overrides:
            require("=" in override, f"an override must be 'section.key=value', got '{override}'")
        return _build([content, *(f"--{override}" for override in overrides)], options_class)
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, option = key.partition(".")
        require(bool(option), f"an override must be named section.key, got '{key}'")
        nested.setdefault(section, {})[option] = value
    return _build([content, _plain_mapping(nested)], options_class)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def _build(parts: list[Part], options_class: OptionsClass) -> RunConfig:
    name = _objective_name(parts)
    sections = {**SECTIONS, "objective": options_class(name)}
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
        parsed = parser.parse_args([_argument(part, name) for part in parts])
    except ArgumentError as error:
        raise InputError(_one_line(str(error), sections)) from error
    for section in sections:
        require(parsed[section] is not None, f"{section} must be a mapping of options, got null")
    built = {section: kind(**_options(parsed[section])) for section, kind in sections.items()}
    return RunConfig(**built)


def _parts(arguments: Sequence[str]) -> list[Part]:
    """Replace ``--config FILE`` by the file's content; each file is read once."""
    parts: list[Part] = []
    remaining = iter(arguments)
    for argument in remaining:
        key, joined, value = argument.partition("=")
        if key != "--config":
            parts.append(argument)
        elif joined or (value := next(remaining, "")):
            parts.append(_read_yaml(value))
        else:
            raise InputError("--config needs a YAML file, got none")
    return parts


def _objective_name(parts: list[Part]) -> str:
    """Return objective.name before the real parse, as it decides which options exist; the last one given wins."""
    name = "sft"
    for i, part in enumerate(parts):
        if isinstance(part, dict):
            section = part.get("objective") or {}
            require(
                isinstance(section, dict), f"objective must be a mapping like {{name: sft}}, got {section!r}"
            )
            name = str(section.get("name", name))
        else:
            key, joined, value = part.partition("=")
            if key == "--objective.name":
                name = value if joined else str(parts[i + 1] if i + 1 < len(parts) else "")
    return name


def _argument(part: Part, name: str) -> str:
    """Return an argument for the parser; a configuration is passed as its text, with the objective that was chosen."""
    if isinstance(part, str):
        return part
    if part.get("objective"):
        part = {**part, "objective": {**part["objective"], "name": name}}
    return f"--config={yaml.safe_dump(part, allow_unicode=True, sort_keys=False)}"


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(expand_home(path))
    require(file.is_file(), f"--config needs a YAML file, found none at '{path}'")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    require(
        isinstance(content, dict), f"{path} must hold a mapping of sections, got {type(content).__name__}"
    )
    return content


def _plain_mapping(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as YAML can hold it: paths as strings, tuples as lists, data sources as mappings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        require(
            value is None or isinstance(value, (str, int, float, PurePath)),
            f"a configuration holds strings, numbers, lists and mappings, got {type(value).__name__}: {value!r}",
        )
        return str(value) if isinstance(value, PurePath) else value

    return plain(sections)


def _options(section: Namespace) -> dict[str, Any]:
    def plain(key: str, value: Any) -> Any:
        if key in ("betas", "profile_steps") and value is not None:
            return tuple(value)
        if isinstance(value, list):
            return [DataSource(**vars(item)) if isinstance(item, Namespace) else item for item in value]
        return value

    return {key: plain(key, value) for key, value in vars(section).items()}


def _one_line(message: str, sections: dict[str, type]) -> str:
    """Turn jsonargparse's message into one line, with the nearest key for an unknown one."""
    line = " ".join(message.split())
    keys = list(sections) + [f"{s}.{f.name}" for s, kind in sections.items() for f in fields(kind)]
    for pattern in (
        r"[Uu]nrecognized arguments?: --([\w.]+)",
        r"[Kk]ey '?([\w.]+)'? is not expected",
        r"Group '(\w+)' does not accept option '(\w+)'",
        r"does not accept option '([\w.]+)'",
        r"Option '([\w.]+)' is not accepted",
    ):
        if match := re.search(pattern, line):
            key = ".".join(match.groups())
            return f"unknown configuration key '{key}'{nearest(key, keys)}"
    return line
