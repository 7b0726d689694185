"""The policy: megatron-core's embedding, transformer block and head, composed for packs.

Shapes: T tokens of the pack, Q of them on this context-parallel rank (Q / TP on each rank between layers under sequence
parallel), N scored rows, H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from torch.func import functional_call

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import cpu
from megatron_align.model.adapted_linear import ADAPTER, ColumnLinear, RowLinear, without_adapter
from megatron_align.model.attention import PackParams
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.context_parallel import gather_rows
from megatron_align.model.families import ModelShape, padded_vocab
from megatron_align.model.families.adapter import START, Adapter, adaptable_rows
from megatron_align.model.families.saved_modules import copies_of, copy_name, saved_rows
from megatron_align.model.flash import Documents
from megatron_align.model.fp8 import require_widths
from megatron_align.model.head import PackLoss, RewardHead, RowObjective, RowScore, VocabularyHead
from megatron_align.model.kernel_choice import KernelChoice, PolicyConfig, require_complete_packs
from megatron_align.model.layer import RECOMPUTE_MODULES, RMSNorm, join_layers, layer_spec
from megatron_align.model.layer_adapter import LayerAdapter
from megatron_align.model.lora import adapters_off, attach
from megatron_align.model.lora_pair import Adaptable
from megatron_align.model.megatron_versions import Block
from megatron_align.model.rope import rope_tables
from megatron_align.model.stages import layers_of_chunks, split_options
from megatron_align.model.tied_embedding import head_weight, is_tied
from megatron_align.model.trained_copy import TrainedCopy, weight_in_use
from megatron_align.records import PackedBatch


def _no_init(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    recompute_layers: int = 0,
    recompute_modules: Sequence[str] = (),
    kernels: KernelChoice | None = None,
) -> PolicyConfig:
    """Return megatron-core's configuration of a model on this layout; ``kernels``: by default those that need nothing.

    Raises:
        InputError: if heads or layers do not divide over the layout, ``recompute_layers`` exceeds a chunk's layers, or
            kernels do not fit the layout.
    """
    kernels = kernels or KernelChoice()
    _check_layout(shape, parallel, recompute_layers)
    require_complete_packs(kernels, shape, parallel)
    require_widths(shape, parallel, kernels.fp8)
    recompute: dict[str, Any] = {}
    if recompute_layers:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": recompute_layers,
        }
    elif recompute_modules:
        recompute = {
            "recompute_granularity": "selective",
            "recompute_modules": [RECOMPUTE_MODULES[name] for name in recompute_modules],
        }
    return PolicyConfig(
        kernels=kernels,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the layer spec names ours (feed_forward.py)
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Fused bias-dropout uses torch.compile; off until measured on a GPU.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=kernels.fused_gradients,
        # Weights are always loaded. But perform_initialization=False would leave parameters unmarked as
        # tensor-parallel, and the gradient norm would then count one rank's shards only.
        init_method=_no_init,
        output_layer_init_method=_no_init,
        embedding_init_method=_no_init,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        **split_options(parallel),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        calculate_per_token_loss=True,  # the loss is normalised already: megatron-core must not average it
        # Batched, two messages between the same two ranks can be swapped; seen on gloo with virtual stages.
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.overlap_p2p,
        variable_seq_lengths=False,
        **recompute,
    )


def _check_layout(shape: ModelShape, parallel: ParallelConfig, recompute_layers: int) -> None:
    def require(condition: bool, line: str) -> None:
        if not condition:
            raise InputError(line)

    tensor = parallel.tensor
    require(
        shape.num_heads % tensor == 0,
        f"parallel.tensor must divide the model's {shape.num_heads} attention heads, got {tensor}",
    )
    require(
        shape.num_query_groups % tensor == 0 or tensor % shape.num_query_groups == 0,
        f"parallel.tensor must divide the model's {shape.num_query_groups} key/value heads or be a multiple "
        f"of them, got {tensor}",
    )
    require(
        shape.ffn_size % tensor == 0,
        f"parallel.tensor must divide the model's ffn size {shape.ffn_size}, got {tensor}",
    )
    context_kind_of(shape, parallel)
    layers = max(layers_of_chunks(shape.num_layers, parallel))
    require(
        recompute_layers <= layers,
        f"train.recompute_layers must be at most the {layers} layers of a model chunk, got {recompute_layers}",
    )


class Policy(LanguageModule):
    """One pipeline chunk of the language model.

    Called with a :class:`PackedBatch`. The last stage returns the log-probs of the scored rows, or with an objective
    the pack's loss; every other stage returns hidden states for the next one.
    """

    def __init__(
        self,
        config: PolicyConfig,
        shape: ModelShape,
        groups: ProcessGroupCollection,
        chunk: int | None = None,
        adapter: Adapter | None = None,
    ):
        super().__init__(config, groups)
        self.shape = shape
        self.vp_stage = chunk
        self.model_type = ModelType.encoder_or_decoder
        chunks = config.virtual_pipeline_model_parallel_size
        self.pre_process = is_pp_first_stage(groups.pp) and is_vp_first_stage(chunk, chunks)
        self.post_process = is_pp_last_stage(groups.pp) and is_vp_last_stage(chunk, chunks)
        self.share_embeddings_and_output_weights = is_tied(shape)
        self._by_document = config.kernels.attends_by_document
        self.rope_frequencies = shape.rope_frequencies().to(cpu.device())
        vocab = padded_vocab(shape.vocab_size, config.tensor_model_parallel_size)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab, shape.max_positions, position_embedding_type="rope", tp_group=groups.tp
            )
        layers = get_num_layers_to_build(config, chunk, groups.pp.rank())
        self.decoder = Block(
            config,
            TransformerBlockSubmodules(
                layer_specs=[layer_spec(shape, config.kernels)] * layers, layer_norm=RMSNorm
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=chunk,
        )
        join_layers(self.decoder)
        if self.post_process and shape.is_reward:
            self.reward_head = RewardHead(config)
        elif self.post_process:
            tied = self.pre_process and is_tied(shape)
            self.output_layer = VocabularyHead(config, shape, groups, tied=tied)
        if not shape.is_reward:
            self.setup_embeddings_and_output_layer()
        # Recomputed layers and pipeline stages run backward only if their input has a gradient: that of a frozen
        # embedding has none, and the layers after it would silently not be trained.
        recomputes = config.recompute_granularity is not None
        self._needs_gradient = recomputes or config.pipeline_model_parallel_size > 1
        self.adapter, self.partly_frozen = adapter, False
        self.base_loaded = object()  # another one whenever weights are loaded: engines hold the base once
        if adapter is not None:
            self._attach(adapter)

    def freeze(self, names: Collection[str]) -> None:
        """Exclude the parameters of these names, with the layers' numbers in the entire model, from training."""
        self.partly_frozen = bool(names)
        for name, parameter in self.global_parameters().items():
            if name in names:
                parameter.requires_grad_(False)

    def _attach(self, adapter: Adapter) -> None:
        """Add an adapter's parameters, uninitialised; they and a reward head are then all that is trained."""
        self.requires_grad_(False)
        attach(self._adaptable(), self.shape, adapter, adaptable_rows(self.shape), self.config)
        names = {name for row in saved_rows(self.shape, adapter) for name in copies_of(row, self.shape)}
        for name, module in self._of_kinds(VocabParallelEmbedding, VocabularyHead, RMSNorm).items():
            if copy_name(name) in names and module.weight is not None:  # a tied head has none on one stage
                module.adapter = TrainedCopy(module)
        if self.post_process and self.shape.is_reward:
            self.reward_head.requires_grad_(True)

    def _set_attention_backend(self) -> None:
        """Leave Transformer Engine's variables alone: megatron-core would set them, though ours chooses attention."""

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states of the previous stage (called by megatron-core's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        batch: PackedBatch,
        objective: RowObjective | None = None,
        *,
        row_score: RowScore | None = None,
        top_k: int = 0,
    ) -> Tensor | PackLoss:
        """Return hidden states ``[Q or Q / TP, 1, H]``; on the last stage the result of the head's ``forward``."""
        hidden = self._hidden(batch)
        if not self.post_process:
            return hidden
        if self.shape.is_reward:
            return self.reward_head(hidden, batch, objective, self.pg_collection)
        return self.output_layer(
            hidden, batch, objective, weight=self._head(), row_score=row_score, top_k=top_k
        )

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """Return full logits ``[T, vocab_size]``, for verification; one pipeline stage only."""
        hidden = self._hidden(batch)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        weight_VH = F.normalize(self._head()) if self.shape.norm_head else self._head()
        hidden_QH, weight_VH = self.output_layer.adapted(hidden.squeeze(1), weight_VH)
        logits_QV = hidden_QH @ weight_VH.T
        logits_QV = gather_from_tensor_model_parallel_region(logits_QV, group=self.tp_group)
        logits_QV = logits_QV[:, : self.shape.vocab_size]
        if batch.part is None:
            return logits_QV
        return gather_rows(logits_QV, batch.part.token_Q, batch.tokens_T.shape[0], self.cp_group)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return megatron-core's sharded state of the base, without an adapter.

        A reward model skips its code for the output layer, which it lacks.
        """
        with adapters_off([self]):  # so that the tied weight of the last stage is the base's too
            if self.shape.is_reward:
                state = super(LanguageModule, self).sharded_state_dict(*args, **kwargs)
            else:
                state = super().sharded_state_dict(*args, **kwargs)
        return without_adapter(state)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the tied weight of this stage, whose gradient megatron-core sums over both ends: the one in use."""
        if self.pre_process:
            return weight_in_use(self.embedding.word_embeddings)
        return weight_in_use(self.output_layer) if self.post_process else None

    def global_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, layers numbered over the entire model."""
        return {self._global_name(name): parameter for name, parameter in self.named_parameters()}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of :meth:`global_parameters` that are no adapter's."""
        return {name: p for name, p in self.global_parameters().items() if ADAPTER not in name}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of :meth:`global_parameters` that are trained."""
        return {name: p for name, p in self.global_parameters().items() if p.requires_grad}

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of :meth:`global_parameters` that a checkpoint of an adapter holds."""
        return {name: p for name, p in self.global_parameters().items() if p.requires_grad or START in name}

    def layer_adapters(self) -> dict[str, LayerAdapter]:
        """Return the low-rank adapters of this chunk's layers by the name of the weight that each changes."""
        adapters = {name: getattr(m, "adapter", None) for name, m in self._adaptable().items()}
        return {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LayerAdapter)}

    def trained_copies(self) -> dict[str, TrainedCopy]:
        """Return the trained copies of this chunk's weights by the name of the weight that each replaces."""
        modules = self._of_kinds(VocabParallelEmbedding, VocabularyHead, RMSNorm)
        copies = {name: getattr(module, "adapter", None) for name, module in modules.items()}
        return {name: copy for name, copy in copies.items() if isinstance(copy, TrainedCopy)}

    def _adaptable(self) -> dict[str, Adaptable]:
        """Return this chunk's layers that can have a low-rank adapter by the name of their weight."""
        return self._of_kinds(ColumnLinear, RowLinear, VocabParallelEmbedding, VocabularyHead)

    def _of_kinds(self, *kinds: type[nn.Module]) -> dict[str, Any]:
        """Return this chunk's modules of some kinds by the name of their weight."""
        return {
            f"{self._global_name(name)}.weight": module
            for name, module in self.named_modules()
            if isinstance(module, kinds)
        }

    def _global_name(self, name: str) -> str:
        """Return the name of a module or parameter with the layer's number in the entire model."""
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            offset = get_transformer_layer_offset(self.config, self.vp_stage, self.pp_group.rank())
            parts[2] = str(int(parts[2]) + offset)
        return ".".join(parts)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        embedded = None
        tokens_Q, positions_Q = batch.held()
        if self.pre_process:
            embedded = self._embedded(tokens_Q, positions_Q)
            if self._needs_gradient and torch.is_grad_enabled() and not embedded.requires_grad:
                embedded.requires_grad_()
        cos_QD, sin_QD = rope_tables(positions_Q, self.rope_frequencies)
        pack = PackParams(
            layout=batch.layout,
            part=batch.part,
            cos_QD=cos_QD,
            sin_QD=sin_QD,
            dropout_Q=batch.held_dropout(),
            documents=Documents.of_layout(batch.layout) if self._by_document else None,
        )
        return self.decoder(embedded, attention_mask=None, packed_seq_params=pack)

    def _embedded(self, tokens_Q: Tensor, positions_Q: Tensor) -> Tensor:
        given = tokens_Q[None], positions_Q[None]
        adapter = getattr(self.embedding.word_embeddings, "adapter", None)
        if adapter is None or not adapter.enabled:
            return self.embedding(*given)
        if isinstance(adapter, TrainedCopy):
            return functional_call(self.embedding, {"word_embeddings.weight": adapter()}, given)
        return adapter(tokens_Q, self.embedding(*given))

    def _head(self) -> Tensor:
        return head_weight(self.output_layer, self.embedding if self.pre_process else None)


def build_policy(
    config: PolicyConfig,
    shape: ModelShape,
    groups: ProcessGroupCollection,
    adapter: Adapter | None = None,
    frozen: Collection[str] = (),
) -> list[Policy]:
    """Build this rank's chunks of the model with uninitialised weights.

    Args:
        config: megatron-core's.
        shape: of the model.
        groups: of this rank.
        adapter: only it is trained; None: the model's weights are.
        frozen: Megatron names of weights that are not trained.
    """
    count = config.virtual_pipeline_model_parallel_size
    indices = [None] if count is None else list(range(count))
    chunks = [Policy(config, shape, groups, index, adapter).to(cpu.device()) for index in indices]
    for chunk in chunks:
        chunk.freeze(frozen)
    return chunks
