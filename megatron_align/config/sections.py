"""The sections of how a run trains and what it writes: layout, optimizer, steps, checkpoints, logging.

Frozen dataclasses that validate themselves; the docstring of a field is its help text. What a run reads is in
:mod:`.inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_align.config.paths import expand_fields
from megatron_align.config.validation import EarlyStoppingConfig
from megatron_align.errors import nearest, require, shown

RESUME_GROUPS = ("data", "tokenizer", "order", "objective", "reference", "rewards", "schedule")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is sharded over ranks; the data-parallel size is what remains of the world size.

    Args:
        tensor: tensor-parallel ranks
        pipeline: pipeline stages
        context: context-parallel ranks: each pack's tokens are sharded over them
        context_kind: attention over them. ulysses: all-to-all from tokens to heads; allgather: gather keys and values,
            work balanced for each pack; auto: see docs/parallel.md (the only one with context: 1)
        virtual_pipeline: model chunks per pipeline stage (interleaved schedule); null: one
        first_stage_layers: layers of the first pipeline stage, all its chunks together; null: as many as the others
        last_stage_layers: layers of the last pipeline stage; null: as many as the others
        count_embedding: pipeline: count the embedding as a layer of the first chunk when layers are distributed
        count_loss: pipeline: count head and loss as a layer of the last chunk when layers are distributed
        sequence: sequence parallelism: shard activations between tensor-parallel regions too (no effect at tensor: 1)
        overlap_grad_reduce: reduce gradients over data-parallel ranks during backward
        overlap_param_gather: gather the updated weights layer by layer during the next forward
        overlap_p2p: interleaved schedule: send and receive between stages while they compute
        timeout_seconds: collective timeout in seconds; a stalled rank aborts the run
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    context_kind: Literal["auto", "ulysses", "allgather"] = "auto"
    virtual_pipeline: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    count_embedding: bool = False
    count_loss: bool = False
    sequence: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p: bool = False
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            require(
                getattr(self, name) >= 1, f"parallel.{name} must be at least 1, got {getattr(self, name)}"
            )
        require(
            self.context > 1 or self.context_kind == "auto",
            f"parallel.context_kind needs parallel.context of at least 2, got {self.context_kind} with context "
            f"{self.context}",
        )
        require(
            0 < self.timeout_seconds <= 1e7,
            f"parallel.timeout_seconds must be positive and at most 1e7, got {self.timeout_seconds}",
        )
        if self.virtual_pipeline is not None:
            require(
                self.virtual_pipeline >= 2 and self.pipeline >= 2,
                "parallel.virtual_pipeline needs at least 2 chunks on at least 2 pipeline stages, "
                f"got virtual_pipeline {self.virtual_pipeline} with pipeline {self.pipeline}",
            )

        self._check_split()
        require(
            self.overlap_grad_reduce or not self.overlap_param_gather,
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce, as megatron-core has it; got false",
        )
        require(
            self.virtual_pipeline is not None or not self.overlap_p2p,
            "parallel.overlap_p2p needs parallel.virtual_pipeline: only the interleaved schedule overlaps; got null",
        )

    def _check_split(self) -> None:
        sizes = {name: getattr(self, name) for name in ("first_stage_layers", "last_stage_layers")}
        counted = {name: getattr(self, name) for name in ("count_embedding", "count_loss")}
        for name, value in {**sizes, **counted}.items():
            require(
                value in (None, False) or self.pipeline >= 2,
                f"parallel.{name} needs at least 2 stages of parallel.pipeline, got {self.pipeline}",
            )
        for name, value in sizes.items():
            require(value is None or value >= 1, f"parallel.{name} must be at least 1, got {value}")
        require(
            not (any(counted.values()) and any(sizes.values())),
            f"give parallel.first_stage_layers and last_stage_layers, or count_embedding and count_loss; got {sizes} "
            f"and {counted}",
        )

    @property
    def chunks(self) -> int:
        """Model chunks per pipeline stage."""
        return self.virtual_pipeline or 1

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel size, or raise InputError if the ranks do not divide."""
        model = self.tensor * self.pipeline * self.context
        require(
            world_size % model == 0,
            f"world size must be a multiple of tensor x pipeline x context = "
            f"{self.tensor} x {self.pipeline} x {self.context} = {model}, got {world_size}: start "
            f"{_torchrun(-(-world_size // model) * model)}",
        )
        ranks = world_size // model
        require(
            ranks > 1 or not self.overlap_grad_reduce,
            "parallel.overlap_grad_reduce needs at least 2 data-parallel ranks, got 1: there is nothing to reduce",
        )
        return ranks


def _torchrun(ranks: int) -> str:
    """Return the command that starts this number of ranks."""
    nodes = "" if ranks <= 8 or ranks % 8 else f"--nnodes {ranks // 8} "
    return f"torchrun {nodes}--nproc-per-node {8 if nodes else ranks} -m megatron_align.train --config ..."


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate
        weight_decay: decoupled weight decay on matrices; vectors (norms, biases) have none
        betas: decay rates of the first and second moment
        eps: added to the square root of the second moment
        warmup_steps: steps of linear warm-up from 0
        schedule: after the warm-up: cosine or linear decay to 0 at the last step, or constant
        clip_grad: largest global gradient norm; 0: no clipping
        implementation: of the update: torch, or apex (Apex's kernel, with the same state)
    """

    section: ClassVar[str] = "optimizer"  # as errors name it

    lr: float = 1.0e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_grad: float = 1.0
    implementation: Literal["torch", "apex"] = "torch"

    def __post_init__(self) -> None:
        at = self.section
        require(self.lr > 0, f"{at}.lr must be positive, got {self.lr}")
        require(self.weight_decay >= 0, f"{at}.weight_decay must not be negative, got {self.weight_decay}")
        require(all(0 <= b < 1 for b in self.betas), f"{at}.betas must be in [0, 1), got {list(self.betas)}")
        require(self.eps > 0, f"{at}.eps must be positive, got {self.eps}")
        require(self.warmup_steps >= 0, f"{at}.warmup_steps must not be negative, got {self.warmup_steps}")
        require(self.clip_grad >= 0, f"{at}.clip_grad must not be negative, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """The same of the critic of objective ppo."""

    section: ClassVar[str] = "critic.optimizer"


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The critic of objective ppo: a second model on the policy's layout, with a value head.

    Args:
        path: folder of a reward model or a language model of the policy's tokenizer to start from, of any shape that
            the layout divides; null: the first reward of kind model that has the policy's shape and tokenizer, else
            model.path with a new value head
        optimizer: its own, with the options of the section optimizer
    """

    path: str | None = None
    optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)

    def __post_init__(self) -> None:
        expand_fields(self, "path")


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products of the transformer's linear layers in FP8, by Transformer Engine.

    Args:
        recipe: what shares a scale: tensorwise (a tensor), blockwise (128 values of an activation, 128 x 128 of a
            weight), mxfp8 (32 values); delayed is refused, as its scales come from earlier steps
    """

    recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = "tensorwise"

    def __post_init__(self) -> None:
        require(
            self.recipe != "delayed",
            "train.fp8.recipe must be tensorwise, blockwise or mxfp8, got delayed: its scales come from the largest "
            "values of earlier steps, which checkpoints do not hold: a resumed run would not repeat its numbers",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch size, length, precision and checks of training.

    Args:
        global_batch_size: samples (pairs, groups) per optimiser step, independent of the layout; null: 16, or
            decided by global_batch_tokens or by rollout.prompts
        global_batch_tokens: instead of global_batch_size: tokens per optimiser step; samples are taken in order
            while they fit, at least one
        steps: optimiser steps; give this or epochs
        epochs: passes over the training data; give this or steps
        seed: random seed of the data order
        precision: bf16: bf16 weights and activations, fp32 master weights and gradients; fp32: all fp32
        fp8: {recipe}: compute the transformer's linear layers in FP8, also of reference and critic; needs model.linear:
            te and precision: bf16; null: in precision
        gradient_accumulation_fusion: add the gradients of linear layers to the fp32 buffer in the product that makes
            them: by Apex with model.linear: torch, by itself with te
        recompute_layers: 0: keep the activations of all layers; k: keep the input of every k-th layer, and
            recompute k layers at a time in backward
        recompute_modules: parts of every layer whose activations are recomputed in backward: attention, mlp,
            norms; not together with recompute_layers
        validate_every: steps between validations, besides the one after the last step; null: only that one
        early_stopping: {metric, patience, mode}: end the run when a validation metric no longer improves; null: never
        on_nonfinite: when loss or gradients are NaN or infinite: stop: end the run; skip: continue without the
            step's update, at most 10 times in a row
        self_check: before the first step, resumed or not, check that ranks agree and that packing changes nothing;
            after step 1, that a policy which starts as its own reference has reward 0
    """

    global_batch_size: int | None = None
    global_batch_tokens: int | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 1234
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: Fp8Config | None = None
    gradient_accumulation_fusion: bool = False
    recompute_layers: int = 0
    recompute_modules: list[Literal["attention", "mlp", "norms"]] = field(default_factory=list)
    validate_every: int | None = None
    early_stopping: EarlyStoppingConfig | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    self_check: bool = True

    def __post_init__(self) -> None:
        require(
            self.global_batch_size is None or self.global_batch_tokens is None,
            f"give train.global_batch_size or train.global_batch_tokens, got {self.global_batch_size} and "
            f"{self.global_batch_tokens}",
        )
        require(
            (self.steps is None) != (self.epochs is None),
            f"give either train.steps or train.epochs, got steps {shown(self.steps)} and epochs {shown(self.epochs)}",
        )
        most = {"global_batch_size": 10**7, "global_batch_tokens": 10**10, "steps": 10**9, "epochs": 10**6}
        for name in (*most, "validate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"train.{name} must be at least 1, got {value}")
            require(
                value is None or value <= most.get(name, value),
                f"train.{name} must be at most {most.get(name, 0):,}, got {value}",
            )
        require(
            self.fp8 is None or self.precision == "bf16",
            f"train.fp8 needs train.precision: bf16, got {self.precision}",
        )
        require(
            self.recompute_layers >= 0,
            f"train.recompute_layers must not be negative, got {self.recompute_layers}",
        )
        require(
            not (self.recompute_layers and self.recompute_modules),
            f"give train.recompute_layers or train.recompute_modules, got {self.recompute_layers} and "
            f"{', '.join(self.recompute_modules)}",
        )
        require(
            len(set(self.recompute_modules)) == len(self.recompute_modules),
            f"train.recompute_modules must name each part once, got {', '.join(self.recompute_modules)}",
        )
        require(
            self.early_stopping is None or self.validate_every is not None,
            "train.early_stopping needs train.validate_every, got none",
        )
        require(self.seed >= 0, f"train.seed must not be negative, got {self.seed}")

    @property
    def arithmetic(self) -> str:
        """Return what a forward pass is computed in: the precision, and the recipe of FP8."""
        return self.precision if self.fp8 is None else f"{self.precision}, {self.fp8.recipe} fp8"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, resuming and export.

    Args:
        dir: folder of the run: metrics.jsonl, config.yaml, step_NNNNNN/, hf/
        save_every: steps between checkpoints, besides the one after the last step; null: only that one
        keep: number of most recent checkpoints to retain
        keep_every: also retain checkpoints of steps divisible by this, permanently; null: none
        keep_best: also retain the checkpoint of the best validation by this metric (loss, accuracy, ...; of loss and
            nll the lowest, else the highest); it is saved when it is validated; null: none
        async_save: write checkpoints in the background; needs host memory for a copy of the state
        resume: auto: resume from the newest intact checkpoint in dir, if any; never: refuse a dir that has one
        resume_allow: differences from the resumed run to accept: data, tokenizer, order (seed, batch size,
            shuffling), objective, reference, rewards, schedule (learning rate, warm-up, number of steps)
        export_hf: write the trained model as a Hugging Face folder to dir/hf at the end
        push_to_hub: upload dir/hf to this repository of the Hugging Face hub (ORG/NAME), which is created as a private
            one if there is none; null: no upload
    """

    dir: str
    save_every: int | None = None
    keep: int = 2
    keep_every: int | None = None
    keep_best: str | None = None
    async_save: bool = True
    resume: Literal["auto", "never"] = "auto"
    resume_allow: list[str] = field(default_factory=list)
    export_hf: bool = True
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "dir")
        require(
            self.push_to_hub is None or self.push_to_hub.count("/") == 1,
            f"checkpoint.push_to_hub must be ORG/NAME, got '{self.push_to_hub}'",
        )
        require(
            self.push_to_hub is None or self.export_hf,
            f"checkpoint.push_to_hub needs checkpoint.export_hf, got {self.push_to_hub} with false",
        )
        for name in ("save_every", "keep", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"checkpoint.{name} must be at least 1, got {value}")
        require(
            self.keep_every is None or self.save_every is not None,
            f"checkpoint.keep_every needs checkpoint.save_every, got keep_every {self.keep_every} without it",
        )
        require(
            self.keep_every is None or self.save_every is None or self.keep_every % self.save_every == 0,
            f"checkpoint.keep_every must be a multiple of save_every = {self.save_every}, "
            f"got {self.keep_every}",
        )
        for name in self.resume_allow:
            require(
                name in RESUME_GROUPS,
                f"checkpoint.resume_allow takes {', '.join(RESUME_GROUPS)}, got '{name}'"
                f"{nearest(name, list(RESUME_GROUPS))}",
            )
        require(
            self.resume == "auto" or not self.resume_allow,
            f"checkpoint.resume_allow needs checkpoint.resume auto, got {self.resume_allow} with {self.resume}",
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Trackers, timing and profiling; metrics.jsonl is always written.

    Args:
        tensorboard: write event files to checkpoint.dir/tensorboard
        wandb: Weights & Biases project; true: named like the run, by the last part of checkpoint.dir; null: off
        mlflow: MLflow experiment, on the server of MLFLOW_TRACKING_URI; true: named like the run; null: off
        timing_every: steps between measurements of the phases of a step, on every rank; null: never
        profile_steps: first and last step of a PyTorch profiler trace per rank, in checkpoint.dir/profile; null: none
    """

    tensorboard: bool = True
    wandb: bool | str | None = None
    mlflow: bool | str | None = None
    timing_every: int | None = 100
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require(
            self.timing_every is None or self.timing_every >= 1,
            f"logging.timing_every must be at least 1, got {self.timing_every}",
        )
        steps = self.profile_steps
        require(
            steps is None or 1 <= steps[0] <= steps[1],
            f"logging.profile_steps must be a first and a last step, counted from 1, got {steps and list(steps)}",
        )
