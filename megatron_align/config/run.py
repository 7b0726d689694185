"""A run's configuration: its sections and its objective's options, read from YAML, mappings and the command line.

An objective's options are those of its own class, chosen by ``objective.name``: an option that the objective does not
have is an unknown key, never ignored. The objectives themselves are on a floor above; callers pass their options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from megatron_align.config.arguments import Part, content_of_text, read_arguments, section_of_text
from megatron_align.config.inputs import (
    DataConfig,
    ModelConfig,
    ReferenceConfig,
)
from megatron_align.config.rewards import ABOUT as ABOUT_REWARDS
from megatron_align.config.rewards import RewardConfig, build_rewards, changed_rewards
from megatron_align.config.rollout import RolloutConfig
from megatron_align.config.sections import (
    CheckpointConfig,
    CriticConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_align.config.unknown_keys import OPTION_OF_TEXT, Owners, unknown_keys
from megatron_align.config.validation import ValidationConfig
from megatron_align.config.values import convert, option_types
from megatron_align.config.yaml_text import DEEPEST, read_yaml
from megatron_align.errors import InputError, listed, require, shown


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
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    rewards: tuple[RewardConfig, ...] = ()
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        self._fill_batches()
        steps = self.train.steps
        for section, optimizer in (
            ("optimizer", self.optimizer),
            ("critic.optimizer", self.critic.optimizer),
        ):
            require(
                steps is None or optimizer.warmup_steps <= steps,
                f"{section}.warmup_steps must not exceed train.steps = {steps}, got {optimizer.warmup_steps}",
            )
        for option, value in (
            ("train.early_stopping", self.train.early_stopping),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
        ):
            require(
                value is None or self.data.validation is not None or bool(self.validation.tasks),
                f"{option} needs data.validation or validation.tasks, whose metrics it follows, got none",
            )
        require(
            self.model.adapter is None or self.reference.sync_steps is None,
            "reference.sync_steps must be null with model.adapter: a reference that follows an adapter is not built, "
            f"got {self.reference.sync_steps}",
        )
        require(
            self.model.attention not in ("flash", "te") or self.train.precision == "bf16",
            f"model.attention: {self.model.attention} needs train.precision: bf16, got {self.train.precision}",
        )
        require(
            self.train.fp8 is None or self.model.linear == "te",
            f"train.fp8 needs model.linear: te, whose layers compute in FP8, got {self.model.linear}",
        )
        require(
            self.model.adapter is None or not self.train.gradient_accumulation_fusion,
            "train.gradient_accumulation_fusion must be false with model.adapter, which trains no weight of these "
            "layers, got true",
        )
        samples = hasattr(self.objective, "minibatches")  # of an objective that trains on rollouts
        require(
            not self.rewards or samples,
            f"rewards score sampled completions: they do not apply to objective {self.objective.name}, which trains "
            "on given data",
        )

    def _fill_batches(self) -> None:
        """Set the samples of a step and the prompts of rollouts where not given: one follows from the other."""
        train, rollout = self.train, self.rollout
        minibatches = getattr(self.objective, "minibatches", None)  # of an objective that trains on rollouts
        if minibatches is None:
            if train.global_batch_size is None and train.global_batch_tokens is None:
                object.__setattr__(self, "train", replace(train, global_batch_size=16))
            return
        require(
            train.global_batch_tokens is None,
            f"objective {self.objective.name} needs train.global_batch_size, prompts of a step: the length of their "
            f"completions is not known before; got global_batch_tokens {train.global_batch_tokens}",
        )
        batch, prompts = train.global_batch_size, rollout.prompts
        if prompts is None:
            prompts = 128 if batch is None else batch * minibatches
        require(
            prompts % minibatches == 0 and batch in (None, prompts // minibatches),
            f"rollout.prompts must be train.global_batch_size x objective.minibatches = {batch or 'SIZE'} x "
            f"{minibatches}, got {prompts}",
        )
        object.__setattr__(self, "rollout", replace(rollout, prompts=prompts))
        object.__setattr__(self, "train", replace(train, global_batch_size=prompts // minibatches))


@dataclass(frozen=True, slots=True)
class ObjectiveNames:
    """The names of objectives and of their options, for a configuration: objectives themselves are on a floor above.

    Args:
        options_class: from ``objective.name`` to the dataclass of its options; raises InputError for an unknown name.
        owners: from an option to the names of the objectives that have it.
    """

    options_class: Callable[[str], type]
    owners: Owners


DRY_RUN = "--dry_run"  # or --dry_run=RANKS: an option of a launch, not of a run's configuration

REWARDS = "rewards"  # a list, not a section of options
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "reference": ReferenceConfig,
    "parallel": ParallelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "validation": ValidationConfig,
    "rollout": RolloutConfig,
    "critic": CriticConfig,
}


def parse(arguments: Sequence[str], objectives: ObjectiveNames) -> RunConfig:
    """Build a RunConfig from command-line arguments; see :func:`.objectives.configuration.parse`."""
    flags = [argument.partition("=")[0] for argument in arguments]
    given = [argument for argument, flag in zip(arguments, flags, strict=True) if flag not in _PRINTING]
    printing = [argument for argument, flag in zip(arguments, flags, strict=True) if flag in _PRINTING]
    parts = read_arguments([argument for argument in given if argument.partition("=")[0] != DRY_RUN])
    return _build(parts, objectives, printing)


def load(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str],
    objectives: ObjectiveNames,
) -> RunConfig:
    """Build a RunConfig from a file or a mapping; see :func:`.objectives.configuration.load_config`."""
    content = plain_mapping(config) if isinstance(config, Mapping) else read_yaml(str(config))
    if not isinstance(overrides, Mapping):
        for override in overrides:
            require("=" in override, f"an override must be 'section.key=value', got '{override}'")
        return _build([content, *read_arguments([f"--{override}" for override in overrides])], objectives)
    for key in overrides:
        require(
            "." in key.strip(".") or key.removesuffix("+") == REWARDS,
            f"an override must be named section.key, got '{key}'",
        )
    return _build([content, *({key: value} for key, value in plain_mapping(overrides).items())], objectives)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, ready for YAML or JSON."""
    return _as_plain(config)


def _as_plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _as_plain(getattr(value, f.name)) for f in fields(value)}
    return [_as_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


_PRINTING = ("-h", "--help", "--print_config")  # options that print and end the program


def _build(parts: list[Part], objectives: ObjectiveNames, printing: Sequence[str] = ()) -> RunConfig:
    given = _merged(parts)
    rewards = given.pop(REWARDS)
    name = convert(given["objective"].get("name", "sft"), str, "objective.name")
    sections = {**SECTIONS, "objective": objectives.options_class(name)}
    given["objective"]["name"] = name
    unknown, known = _known(given, sections)
    if unknown and not any(flag.startswith(("-h", "--help")) for flag in printing):
        raise InputError(unknown_keys(unknown, {**sections, REWARDS: RewardConfig}, objectives.owners))
    values = {
        section: {
            option: convert(value, option_types(sections[section])[option], f"{section}.{option}")
            for option, value in options.items()
        }
        for section, options in known.items()
    }
    if printing:
        _print(sections, values, rewards, printing)
    _require_all(sections, values)
    built = {section: kind(**values[section]) for section, kind in sections.items()}
    return RunConfig(**built, rewards=build_rewards(rewards))


def _merged(parts: list[Part]) -> dict[str, Any]:
    """Merge parts into ``{section: {option: value}}`` and the list of rewards; later ones win. Keys may be dotted."""
    merged: dict[str, Any] = {section: {} for section in (*SECTIONS, "objective")}
    merged[REWARDS] = None
    for part in parts:
        for key, value in part.items():
            section, dotted, option = str(key).partition(".")
            if section in (REWARDS, f"{REWARDS}+"):
                merged[REWARDS] = changed_rewards(merged[REWARDS], str(key), value)
                continue
            if dotted:
                _set(merged.setdefault(section, {}), option, value)
                continue
            if section in merged and isinstance(value, str):
                value = section_of_text(section, value)
            if section not in merged:  # unknown: reported with all others
                merged[section] = value
                continue
            if not isinstance(value, Mapping):
                raise InputError(_no_mapping(section, value))
            for inner, content in value.items():
                _set(merged[section], str(inner), content)
    return merged


def _set(options: Any, key: str, value: Any) -> None:
    """Set ``key`` of a section's options; ``key+`` adds to a list, ``key.inner`` and a mapping change a mapping."""
    if not isinstance(options, dict):
        return  # an unknown section that was given a value as well
    name, dotted, inner = key.partition(".")
    adds = not dotted and name.endswith("+")
    name = name.removesuffix("+") if adds else name
    before, value = content_of_text(options.get(name), name), content_of_text(value, name)
    if dotted:
        options[name] = dict(before) if isinstance(before, Mapping) else {}
        _set(options[name], inner, value)
    elif adds:
        options[name] = [*_as_list(before), *_as_list(value)]
    elif isinstance(before, Mapping) and isinstance(value, Mapping):
        options[name] = {**before, **value}
    else:
        options[name] = value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _known(
    given: Mapping[str, Any], sections: Mapping[str, type]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split options into those that do not exist, by key, and those that do, by section."""
    unknown: dict[str, Any] = {section: value for section, value in given.items() if section not in sections}
    known: dict[str, dict[str, Any]] = {}
    for section, kind in sections.items():
        names = option_types(kind)
        known[section] = {}
        for option, value in given[section].items():
            if option in names:
                known[section][option] = value
            else:
                unknown[f"{section}.{option}"] = value
    return unknown, known


def _require_all(sections: Mapping[str, type], values: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that every option without a default was given."""
    missing = [
        f"{section}.{option.name}"
        for section, kind in sections.items()
        for option in fields(kind)
        if option.default is MISSING
        and option.default_factory is MISSING
        and option.name not in values[section]
    ]
    require(
        not missing,
        f"{listed(missing)} must be given, in the file of --config or as "
        f"{' '.join(f'--{key} VALUE' for key in missing)} (--help explains every option)",
    )


def _no_mapping(section: str, value: Any) -> str:
    line = f"{section} must be a mapping of options, got {shown(value)}"
    if isinstance(value, str) and section in OPTION_OF_TEXT:
        return f"{line}; did you mean '{OPTION_OF_TEXT[section]}'?"
    return line


def _print(
    sections: Mapping[str, type], values: Mapping[str, Any], rewards: Any, printing: Sequence[str]
) -> None:
    """Print help or the configuration, and end the program."""
    parser = ArgumentParser(
        prog="python -m megatron_align.train",
        description="Train a model: torchrun --nproc-per-node N -m megatron_align.train --config run.yaml. With "
        "--dry_run[=RANKS] nothing is trained: all is checked, and layout, batch, memory and steps are printed. "
        "--version prints versions.",
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections below")
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
    parser.add_argument(f"--{REWARDS}", type=Any, default=[], help=ABOUT_REWARDS)
    plain: dict[str, Any] = {
        section: {key: _as_plain(value) for key, value in of.items()} for section, of in values.items() if of
    }
    if rewards:
        plain[REWARDS] = _as_plain(build_rewards(rewards))
    parser.parse_args([f"--config={yaml.safe_dump(plain, allow_unicode=True, sort_keys=False)}", *printing])


def plain_mapping(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as YAML can hold it: paths as strings, tuples as lists, data sources as mappings."""

    def plain(value: Any, depth: int) -> Any:
        require(depth <= DEEPEST, f"a configuration must be nested at most {DEEPEST} levels deep")
        if isinstance(value, Mapping):
            return {str(key): plain(item, depth + 1) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name), depth + 1) for f in fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
        require(
            value is None or isinstance(value, (str, int, float, PurePath)),
            f"a configuration holds strings, numbers, lists and mappings, got {type(value).__name__}: {shown(value)}",
        )
        require(
            not isinstance(value, int) or value.bit_length() < 1000,
            "a configuration holds numbers of at most 300 digits",
        )
        return str(value) if isinstance(value, PurePath) else value

    return plain(sections, 0)
