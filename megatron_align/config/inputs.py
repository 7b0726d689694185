"""The sections of what a run reads: model and adapter, data, reference. Frozen dataclasses that validate themselves.

The docstring of a field is its help text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_align.config.paths import expand_fields
from megatron_align.errors import require, shown

PISSA = re.compile(r"pissa(_niter_(?P<iterations>\d+))?")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A low-rank adapter (LoRA): the model's weights W stay as they are, and W + scale x B A is used in their place.

    Args:
        kind: lora (arXiv:2106.09685), with one A and one B for each Hugging Face module, as PEFT has them
        rank: rows of A and columns of B; null: 16, or that of the adapter at path
        alpha: scale = alpha / rank, with rslora alpha / sqrt(rank); null: 32, or that of the adapter at path
        targets: all-linear (every linear layer but the output head), or a list of Hugging Face module names or
            patterns (q_proj, layers.3.mlp.*, embed_tokens, lm_head); null: all-linear, or those of the adapter at path
        dropout: probability that an element of the input of A is dropped in training, as PEFT's lora_dropout
        dora: scale each row of W + scale x B A to a trained magnitude (DoRA, arXiv:2402.09353); null: false, or that of
            the adapter at path
        rslora: rank-stabilised scale (arXiv:2312.03732); null: false, or that of the adapter at path
        init: initial values: default (A is drawn from train.seed, B is 0), or those of PiSSA (arXiv:2404.02948): pissa
            (A and B are the largest singular values and vectors of W, which are taken out of W), pissa_niter_N (the
            same by N iterations of a fast method, for large models)
        modules_to_save: modules of which a complete copy is trained with the adapter, as PEFT's: embed_tokens, lm_head,
            and norms (norm: all of them, model.norm, input_layernorm, post_attention_layernorm); [score] of a reward
            model, whose head is always trained; null: none, or those of the adapter at path
        ensure_weight_tying: of a model whose embed_tokens and lm_head are one weight, train one copy of it for both, as
            PEFT's option; needed where modules_to_save names either
        path: PEFT folder of an adapter of this model to start from; null: start from init
    """

    kind: Literal["lora"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: str | list[str] | None = None
    dropout: float = 0.0
    dora: bool | None = None
    rslora: bool | None = None
    init: str = "default"
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
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
            0 <= self.dropout < 1, f"model.adapter.dropout must be at least 0 and below 1, got {self.dropout}"
        )
        require(
            self.targets is None or self.targets == "all-linear" or isinstance(self.targets, list),
            f"model.adapter.targets must be all-linear or a list of module names, got '{self.targets}'",
        )
        require(
            not (self.dora and self.dropout),
            f"model.adapter.dropout must be 0 with dora, which would need the base's output of the dropped input, got "
            f"{self.dropout}",
        )
        require(
            self.modules_to_save != [],
            "model.adapter.modules_to_save must name at least one module, or be null, got none",
        )
        require(
            self.modules_to_save is not None or not self.ensure_weight_tying,
            "model.adapter.ensure_weight_tying is of modules_to_save, which names none",
        )
        require(self.targets != [], "model.adapter.targets must name at least one module, got none")
        require(
            self.init == "default" or PISSA.fullmatch(self.init) is not None,
            f"model.adapter.init must be default, pissa or pissa_niter_N, got '{self.init}'",
        )
        require(
            self.path is None or self.init == "default",
            f"model.adapter.init must be left out with path, which brings the values to start from, got '{self.init}'",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained.

    Args:
        path: a Hugging Face folder (config.json, tokenizer, safetensors) or one of our checkpoints
        adapter: train a low-rank adapter of the model instead of its weights; null: train its weights
        attention: implementation, also of reference and critic: auto (triton on a GPU, torch on a CPU), triton (our
            kernels), torch (plain PyTorch; on a GPU with a dense mask, to compare with), flash (flash-attn) and te
            (Transformer Engine's), where prompts are not shared
        linear: implementation of the transformer's linear layers, also of reference and critic: torch (megatron-core's)
            or te (Transformer Engine's)
        freeze: Hugging Face tensor names or patterns that are not trained (embed_tokens.*, layers.0.*); []: none
    """

    path: str
    adapter: AdapterConfig | None = None
    attention: Literal["auto", "triton", "torch", "flash", "te"] = "auto"
    linear: Literal["torch", "te"] = "torch"
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        expand_fields(self, "path")
        require(
            self.adapter is None or not self.freeze,
            f"model.freeze must be [] with model.adapter, which trains nothing else, got {self.freeze}",
        )
        require(
            self.adapter is None or self.linear == "torch",
            f"model.linear must be torch with model.adapter: adapters of Transformer Engine's layers are not built, "
            f"got {self.linear}",
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
    """The model that the policy is compared with (only for objectives that do so: dpo, kto, bco, ...).

    Args:
        mode: cached: its log-probs are computed once before training and kept in a file; live: it stays in memory
            and is run at every step; none: all its log-probs are 0; null: cached
        path: a Hugging Face folder or one of our checkpoints, of the policy's shape; null: model.path.
            Of distill it is the teacher, which must be given; it may have another shape, as in runs on rollouts, with
            the policy's tokenizer
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
