"""Which implementation a model uses where several exist, and megatron-core's configuration with that choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_align.config import ParallelConfig, RunConfig
from megatron_align.errors import require
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape

OF_DOCUMENTS = ("flash", "te")  # attention of packages that know documents, but no shared prompts


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Implementations of a model's layers; the default needs torch and Triton only.

    Args:
        attention: as ``model.attention``.
        linear: as ``model.linear``.
        fp8: as ``train.fp8.recipe``; None: FP8 is off.
        fused_gradients: as ``train.gradient_accumulation_fusion``.
    """

    attention: str = "auto"
    linear: str = "torch"
    fp8: str | None = None
    fused_gradients: bool = False

    @classmethod
    def of_run(cls, config: RunConfig) -> KernelChoice:
        """Return the choice of a run's policy, its reference and its critic."""
        model, train = config.model, config.train
        return cls(
            attention=model.attention,
            linear=model.linear,
            fp8=train.fp8.recipe if train.fp8 else None,
            fused_gradients=train.gradient_accumulation_fusion,
        )

    @property
    def attends_by_document(self) -> bool:
        """Whether attention needs every pack to consist of separate documents."""
        return self.attention in OF_DOCUMENTS


@dataclass
class PolicyConfig(TransformerConfig):
    """megatron-core's configuration of a model, and the choice of its kernels."""

    kernels: KernelChoice = field(default_factory=KernelChoice)


def require_complete_packs(kernels: KernelChoice, shape: ModelShape, parallel: ParallelConfig) -> None:
    """Check that attention by documents sees all tokens of a pack on every rank.

    Raises:
        InputError: context-parallel ranks would hold some of the queries.
    """
    kind = context_kind_of(shape, parallel)
    require(
        not kernels.attends_by_document or kind != "allgather",
        f"model.attention: {kernels.attention} needs parallel.context_kind: ulysses, where a rank sees complete "
        f"documents, got {parallel.context_kind}"
        + (", which is allgather here" if parallel.context_kind == "auto" else ""),
    )
