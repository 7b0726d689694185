"""The options of every section of a run except its objective: frozen dataclasses that validate themselves.

The docstring of a field is its help text. Longer than 400 lines: all options of a run are read on one page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_align.config.paths import expand_fields
from megatron_align.errors import nearest, require, shown

RESUME_GROUPS = ("data", "tokenizer", "order", "objective", "reference", "schedule")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A low-rank adapter (LoRA): the model's weights W stay as they are, and W + scale x B A is used in their place.

    Args:
        kind: lora (arXiv:2106.09685), with one A and one B for each Hugging Face module, as PEFT has them
        rank: rows of A and columns of B; null: 16, or that of the adapter at path
        alpha: scale = alpha / rank, with rslora alpha / sqrt(rank); null: 32, or that of the adapter at path
        targets: all-linear (every linear layer but the output head), or a list of Hugging Face module names or
            patterns (q_proj, layers.3.mlp.*); null: all-linear, or those of the adapter at path
        dropout: must be 0: dropout before A is not built
        rslora: rank-stabilised scale (arXiv:2312.03732); null: false, or that of the adapter at path
        path: PEFT folder of an adapter of this model to start from; null: A is drawn from train.seed, B is 0
    """

    kind: Literal["lora"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: str | list[str] | None = None
    dropout: float = 0.0
    rslora: bool | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        require(
            self.rank is None or self.rank >= 1, f"model.adapter.rank must be at least 1, got {self.rank}"
        )
        require(
            self.alpha is None or 0 < self.alpha < float("inf"),
            f"model.adapter.alpha must be positive (at 0 the adapter has no effect and learns nothing), "
            f"got {self.alpha}",
        )
        require(
            self.dropout == 0,
            f"model.adapter.dropout must be 0, as dropout is not built, got {self.dropout}",
        )
        require(
            self.targets is None or self.targets == "all-linear" or isinstance(self.targets, list),
            f"model.adapter.targets must be all-linear or a list of module names, got '{self.targets}'",
        )
        require(self.targets != [], "model.adapter.targets must name at least one module, got none")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained.

    Args:
        path: a Hugging Face folder (config.json, tokenizer, safetensors) or one of our checkpoints
        adapter: train a low-rank adapter of the model instead of its weights; null: train its weights
        freeze: Hugging Face tensor names or patterns that are not trained (embed_tokens.*, layers.0.*); []: none
    """

    path: str
    adapter: AdapterConfig | None = None
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        require(
            self.adapter is None or not self.freeze,
            f"model.freeze must be [] with model.adapter, which trains nothing else, got {self.freeze}",
        )


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of a mixture.

    Args:
        path: file, folder or glob pattern
        weight: passes over it per epoch; 0.5: half of its samples, a different half each epoch; 2: each sample twice
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        require(
            self.weight > 0, f"the weight of data source '{self.path}' must be positive, got {self.weight}"
        )
        require(
            1e-9 <= self.weight <= 1e6,
            f"the weight of data source '{self.path}' must be within 1e-9 and 1e6 passes per epoch, got {self.weight}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation data, and how they are packed.

    Args:
        train: file, folder or glob pattern (.jsonl, .json, .parquet, .gz), or a list of them or of {path, weight}
        validation: the same for validation data; null: none
        shape: format of the records (messages, pair, ...); null: recognised from each file's first record
        columns: columns with other names in the files, as {prompt: question}; {NAME: null} leaves column NAME alone
        chat_template: file with a Jinja chat template; null: the tokenizer's own
        template_date: date that the chat template reads from the clock (2024-07-26); null: that of the preparation
        train_turns: turns of a conversation that are trained: all of the assistant's, or those after the last question
        drop_fields: fields of turns to leave out before the chat template sees them (reasoning_content, name, tools)
        on_bad_record: error: stop at a malformed record; skip: drop it and count it
        sequence_length: longest sample (pair, group) and capacity of one pack, in tokens
        packing: true: several samples per micro-batch, attention isolated between them; false: one sample each
        shuffle: true: a new order every epoch, a function of the seed; false: file order
        share_prefix: compute the prompt of a pair or group once (no effect on chat samples)
        too_long: what to do with a sample longer than sequence_length: error, drop or truncate it
        cache: folder for tokenised data; null: a folder inside checkpoint.dir
    """

    train: str | list[str | DataSource]
    validation: str | list[str | DataSource] | None = None
    shape: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None
    template_date: str | None = None
    train_turns: Literal["all", "last"] = "all"
    drop_fields: list[str] = field(default_factory=list)
    on_bad_record: Literal["error", "skip"] = "error"
    sequence_length: int = 4096
    packing: bool = True
    shuffle: bool = True
    share_prefix: bool = True
    too_long: Literal["error", "drop", "truncate"] = "error"
    cache: str | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "train", "validation", "chat_template", "cache")
        require(
            1 < self.sequence_length < 2**31,
            f"data.sequence_length must be at least 2 tokens, at most 2^31, got {self.sequence_length}",
        )
        for name in ("role", "content"):
            require(name not in self.drop_fields, f"data.drop_fields cannot leave out a turn's {name}")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that the policy is compared with (only for objectives that do so: dpo, kto, bco).

    Args:
        mode: cached: its log-probs are computed once before training and kept in a file; live: it stays in memory
            and is run at every step; none: all its log-probs are 0; null: cached
        path: a Hugging Face folder or one of our checkpoints, of the policy's shape; null: model.path
        sync_steps: mode live: steps between moves of the reference towards the policy (TR-DPO); null: never
        mixup_alpha: TR-DPO mixing weight: reference = mixup_alpha x policy + (1 - mixup_alpha) x reference; null: 0.6
    """

    mode: Literal["cached", "live", "none"] | None = None
    path: str | None = None
    sync_steps: int | None = None
    mixup_alpha: float | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        require(
            self.sync_steps is None or self.mode == "live",
            f"reference.sync_steps needs reference.mode live, got mode {shown(self.mode)}",
        )
        require(
            self.sync_steps is None or self.sync_steps >= 1,
            f"reference.sync_steps must be at least 1, got {self.sync_steps}",
        )
        require(
            self.mixup_alpha is None or (self.sync_steps is not None and 0 < self.mixup_alpha <= 1),
            f"reference.mixup_alpha needs reference.sync_steps and must be in (0, 1], got {shown(self.mixup_alpha)} "
            f"with sync_steps {shown(self.sync_steps)}",
        )
        require(
            self.path is None or self.mode != "none",
            f"reference.path is not read with reference.mode none, got {self.path}",
        )
        if self.sync_steps is not None and self.mixup_alpha is None:
            object.__setattr__(self, "mixup_alpha", 0.6)  # TR-DPO's, arXiv:2404.09656


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
    """

    lr: float = 1.0e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        require(
            self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}"
        )
        require(
            all(0 <= b < 1 for b in self.betas), f"optimizer.betas must be in [0, 1), got {list(self.betas)}"
        )
        require(self.eps > 0, f"optimizer.eps must be positive, got {self.eps}")
        require(
            self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, got {self.warmup_steps}"
        )
        require(self.clip_grad >= 0, f"optimizer.clip_grad must not be negative, got {self.clip_grad}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch size, length, precision and checks of training.

    Args:
        global_batch_size: samples (pairs, groups) per optimiser step, independent of the layout; null: 16, or
            decided by global_batch_tokens
        global_batch_tokens: instead of global_batch_size: tokens per optimiser step; samples are taken in order
            while they fit, at least one
        steps: optimiser steps; give this or epochs
        epochs: passes over the training data; give this or steps
        seed: random seed of the data order
        precision: bf16: bf16 weights and activations, fp32 master weights and gradients; fp32: all fp32
        recompute_layers: 0: keep the activations of all layers; k: keep the input of every k-th layer, and
            recompute k layers at a time in backward
        recompute_modules: parts of every layer whose activations are recomputed in backward: attention, mlp,
            norms; not together with recompute_layers
        validate_every: steps between validations, besides the one after the last step; null: only that one
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
    recompute_layers: int = 0
    recompute_modules: list[Literal["attention", "mlp", "norms"]] = field(default_factory=list)
    validate_every: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    self_check: bool = True

    def __post_init__(self) -> None:
        require(
            self.global_batch_size is None or self.global_batch_tokens is None,
            f"give train.global_batch_size or train.global_batch_tokens, got {self.global_batch_size} and "
            f"{self.global_batch_tokens}",
        )
        if self.global_batch_size is None and self.global_batch_tokens is None:
            object.__setattr__(self, "global_batch_size", 16)
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
        require(self.seed >= 0, f"train.seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, resuming and export.

    Args:
        dir: folder of the run: metrics.jsonl, config.yaml, step_NNNNNN/, hf/
        save_every: steps between checkpoints, besides the one after the last step; null: only that one
        keep: number of most recent checkpoints to retain
        keep_every: also retain checkpoints of steps divisible by this, permanently; null: none
        async_save: write checkpoints in the background; needs host memory for a copy of the state
        resume: auto: resume from the newest intact checkpoint in dir, if any; never: refuse a dir that has one
        resume_allow: differences from the resumed run to accept: data, tokenizer, order (seed, batch size,
            shuffling), objective, reference, schedule (learning rate, warm-up, number of steps)
        export_hf: write the trained model as a Hugging Face folder to dir/hf at the end
        push_to_hub: upload dir/hf to this repository of the Hugging Face hub (ORG/NAME), which is created as a private
            one if there is none; null: no upload
    """

    dir: str
    save_every: int | None = None
    keep: int = 2
    keep_every: int | None = None
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
