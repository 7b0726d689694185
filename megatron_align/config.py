"""A run's configuration: frozen dataclasses, each checking itself; read from YAML and the command line.

The docstring of a field is its help text. An objective's options are those of its own class, chosen by
``objective.name``: an option that the objective does not have is an unknown key, never ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from megatron_align.errors import InputError, nearest, need
from megatron_align.objectives import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Args:
        path: a Hugging Face folder (config.json, tokenizer, safetensors) or one of our checkpoints
    """

    path: str


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of a mixture.

    Args:
        path: file, folder or glob pattern
        weight: passes over it per epoch; 0.5: half of its samples, another half each epoch; 2: each twice
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        need(self.weight > 0, f"the weight of data source '{self.path}' must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on.

    Args:
        train: file, folder or glob pattern (.jsonl, .json, .parquet, .gz), or a list of them or of {path, weight}
        validation: the same for validation; null: none
        shape: shape of the records (messages, pair, ...); null: recognised from each file's first record
        chat_template: file with a Jinja chat template; null: the tokenizer's own
        on_bad_record: error: stop at a malformed record; skip: leave it out and count it
        sequence_length: longest sample (pair, group) and capacity of one pack, in tokens
        packing: true: several samples per micro-batch, attention isolated; false: one sample each
        shuffle: true: a new order every epoch, a function of the seed; false: file order
        share_prefix: pairs and groups compute their prompt once (chat samples have nothing to share)
        too_long: what to do with a sample longer than sequence_length
        cache: folder for tokenised data; null: a folder inside checkpoint.dir
    """

    train: str | list[str | DataSource]
    validation: str | list[str | DataSource] | None = None
    shape: str | None = None
    chat_template: str | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    sequence_length: int = 4096
    packing: bool = True
    shuffle: bool = True
    share_prefix: bool = True
    too_long: Literal["error", "drop", "truncate"] = "error"
    cache: str | None = None

    def __post_init__(self) -> None:
        need(
            self.sequence_length > 1,
            f"data.sequence_length must be at least 2 tokens, got {self.sequence_length}",
        )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that preference objectives compare with (only for those that do: dpo, kto, bco).

    Args:
        mode: cached: its log-probs are computed once before training and kept as a column of numbers; live: it
            stays in memory and is run at every step; none: every log-prob of it is 0; null: cached
        path: a Hugging Face folder or one of our checkpoints, of the policy's shape; null: model.path
        sync_steps: mode live: every so many steps it moves towards the policy (TR-DPO); null: never
        mixup_alpha: how far: reference = mixup_alpha x policy + (1 - mixup_alpha) x reference
    """

    mode: Literal["cached", "live", "none"] | None = None
    path: str | None = None
    sync_steps: int | None = None
    mixup_alpha: float | None = None

    def __post_init__(self) -> None:
        need(
            self.sync_steps is None or self.mode == "live",
            f"reference.sync_steps needs reference.mode live, got mode {self.mode}",
        )
        need(
            self.sync_steps is None or self.sync_steps >= 1,
            f"reference.sync_steps must be at least 1, got {self.sync_steps}",
        )
        need(
            self.mixup_alpha is None or (self.sync_steps is not None and 0 < self.mixup_alpha <= 1),
            f"reference.mixup_alpha needs reference.sync_steps and lies in (0, 1], got {self.mixup_alpha} "
            f"with sync_steps {self.sync_steps}",
        )
        need(
            self.path is None or self.mode != "none",
            f"reference.path is not read with reference.mode none, got {self.path}",
        )
        if self.sync_steps is not None and self.mixup_alpha is None:
            object.__setattr__(self, "mixup_alpha", 0.6)  # TR-DPO's, arXiv:2404.09656


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model lies on the ranks; data parallelism takes what is left of the world size.

    Args:
        tensor: tensor-parallel ranks
        pipeline: pipeline stages
        context: context-parallel ranks (only 1 so far)
        virtual_pipeline: model chunks per pipeline stage (interleaved schedule); null: one
        sequence: shard activations between the tensor-parallel regions too (no effect at tensor: 1)
        timeout_seconds: a rank that keeps the others waiting longer ends the run, in seconds
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual_pipeline: int | None = None
    sequence: bool = True
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            need(getattr(self, name) >= 1, f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        need(
            self.context == 1,
            f"parallel.context must be 1: context parallelism is not built yet, got {self.context}",
        )
        need(
            self.timeout_seconds > 0, f"parallel.timeout_seconds must be positive, got {self.timeout_seconds}"
        )
        if self.virtual_pipeline is not None:
            need(
                self.virtual_pipeline >= 2 and self.pipeline >= 2,
                "parallel.virtual_pipeline needs at least 2 chunks on at least 2 pipeline stages, "
                f"got virtual_pipeline {self.virtual_pipeline} with pipeline {self.pipeline}",
            )

    @property
    def chunks(self) -> int:
        """Model chunks per pipeline stage."""
        return self.virtual_pipeline or 1

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel size, or raise InputError if the ranks do not divide."""
        model = self.tensor * self.pipeline * self.context
        need(
            world_size % model == 0,
            f"world size must be a multiple of tensor x pipeline x context = "
            f"{self.tensor} x {self.pipeline} x {self.context} = {model}, got {world_size}",
        )
        return world_size // model


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate
        weight_decay: decoupled weight decay on matrices; vectors (norms, biases) have none
        betas: decay of the first and second moment
        eps: added to the root of the second moment
        warmup_steps: steps of linear warm-up from 0
        schedule: what follows the warm-up, down to 0 at the last step (constant: stays)
        clip_grad: largest global gradient norm; 0: no clipping
    """

    lr: float = 1.0e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        need(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        need(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        need(
            all(0 <= b < 1 for b in self.betas), f"optimizer.betas must lie in [0, 1), got {list(self.betas)}"
        )
        need(self.eps > 0, f"optimizer.eps must be positive, got {self.eps}")
        need(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, got {self.warmup_steps}")
        need(self.clip_grad >= 0, f"optimizer.clip_grad must not be negative, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how precisely.

    Args:
        global_batch_size: samples (pairs, groups) of one optimiser step, whatever the layout; null: 16, or as
            many as global_batch_tokens says
        global_batch_tokens: instead of global_batch_size: samples are taken in order while they fit into so
            many tokens, at least one
        steps: optimiser steps; give this or epochs
        epochs: passes over the training data; give this or steps
        seed: of the data order
        precision: bf16: bf16 weights and activations, fp32 master weights and gradients; fp32: all fp32
        recompute_layers: 0: keep all activations; k: one checkpoint per k merged layers
        validate_every: steps between validations, besides the one after the last step; null: only that one
    """

    global_batch_size: int | None = None
    global_batch_tokens: int | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 1234
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute_layers: int = 0
    validate_every: int | None = None

    def __post_init__(self) -> None:
        need(
            self.global_batch_size is None or self.global_batch_tokens is None,
            f"give train.global_batch_size or train.global_batch_tokens, got {self.global_batch_size} and "
            f"{self.global_batch_tokens}",
        )
        if self.global_batch_size is None and self.global_batch_tokens is None:
            object.__setattr__(self, "global_batch_size", 16)
        need(
            (self.steps is None) != (self.epochs is None),
            f"give either train.steps or train.epochs, got steps {self.steps} and epochs {self.epochs}",
        )
        for name in ("global_batch_size", "global_batch_tokens", "steps", "epochs", "validate_every"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"train.{name} must be at least 1, got {value}")
        need(
            self.recompute_layers >= 0,
            f"train.recompute_layers must not be negative, got {self.recompute_layers}",
        )
        need(self.seed >= 0, f"train.seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept.

    Args:
        dir: folder of the run: metrics.jsonl, config.yaml, step_NNNNNN/, hf/
        save_every: steps between checkpoints, besides the one after the last step; null: only that one
        keep: newest checkpoints kept
        resume: auto: go on from the newest complete checkpoint in dir, if any; never: refuse a dir that has one
        export_hf: write the trained model as a Hugging Face folder to dir/hf at the end
    """

    dir: str
    save_every: int | None = None
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"
    export_hf: bool = True

    def __post_init__(self) -> None:
        need(
            self.save_every is None or self.save_every >= 1,
            f"checkpoint.save_every must be at least 1, got {self.save_every}",
        )
        need(self.keep >= 1, f"checkpoint.keep must be at least 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where the numbers go besides metrics.jsonl.

    Args:
        tensorboard: write event files to checkpoint.dir/tensorboard
        wandb: Weights & Biases project; null: off
    """

    tensorboard: bool = True
    wandb: str | None = None


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
        need(
            steps is None or warmup <= steps,
            f"optimizer.warmup_steps must not pass train.steps = {steps}, got {warmup}",
        )
        need(
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
    need(
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
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(_one_line(str(error), sections)) from error
    for section in sections:
        need(parsed[section] is not None, f"{section} must be a mapping of options, got null")
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
        if key == "betas":
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
            need(
                isinstance(section, dict),
                f"objective must be a mapping like {{name: sft}}, got {section!r} in {value}",
            )
            name = str(section.get("name", name))
    return name


def _read_yaml(path: str) -> dict[str, Any]:
    file = Path(path)
    need(file.is_file(), f"--config needs a YAML file, found none at '{path}'")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    need(isinstance(content, dict), f"{path} must hold a mapping of sections, got {type(content).__name__}")
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
