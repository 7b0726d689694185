"""A model on a parallel layout: how its layers and tensors are distributed, the input of every count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from megatron_align.config import ParallelConfig, RunConfig
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.model.context_kind import AttentionSplit, context_kind_of
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.families.frozen import frozen_tensors
from megatron_align.model.fp8 import token_multiple
from megatron_align.model.stages import layers_of_chunks
from megatron_align.model.tied_embedding import has_two_copies, is_tied

BYTES = {"bf16": 2, "fp32": 4}  # per element of a weight or an activation


@dataclass(frozen=True, slots=True)
class Chunk:
    """One model chunk of a pipeline stage; ``first`` is the number of its first layer in the model."""

    first: int
    layers: int
    embeds: bool  # starts with the embedding
    ends: bool  # ends with the final norm and the head


class SecondShapes(NamedTuple):
    """The shapes of a run's reference and critic where they are not the policy's; None: they are, or there is none."""

    reference: ModelShape | None = None
    critic: ModelShape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model on a parallel layout.

    Args:
        shape: model dimensions.
        parallel: the parallel layout.
        data: number of data-parallel ranks.
        precision: dtype of weights and activations.
        recompute_layers: 0: activations are saved; k: one checkpoint per k layers.
        recompute_modules: modules of every layer that are recomputed.
        adapter: trained instead of the model's weights; None: the weights are trained.
        frozen: Megatron names of weights that are not trained.
        fp8: recipe of FP8 in the linear layers; None: it is off.
        second: other shapes of the run's models on this layout.
    """

    shape: ModelShape
    parallel: ParallelConfig
    data: int
    precision: Literal["bf16", "fp32"]
    recompute_layers: int = 0
    recompute_modules: tuple[str, ...] = ()
    adapter: Adapter | None = None
    frozen: frozenset[str] = frozenset()
    fp8: str | None = None
    second: SecondShapes = SecondShapes()

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        shape: ModelShape,
        world_size: int,
        second: SecondShapes = SecondShapes(),  # noqa: B008  # a tuple
    ) -> Placement:
        """Create the placement of a run on ``world_size`` ranks.

        Args:
            config: configuration of the run; its sections parallel and train are read.
            shape: dimensions of the trained model, with a reward head for the objective ``reward``.
            world_size: number of ranks.
            second: shapes of reference and critic where they are not the policy's.

        Raises:
            InputError: the layout does not divide the number of ranks.
        """
        return cls(
            shape=shape,
            parallel=config.parallel,
            data=config.parallel.data_parallel(world_size),
            precision=config.train.precision,
            recompute_layers=config.train.recompute_layers,
            recompute_modules=tuple(config.train.recompute_modules),
            adapter=resolve_adapter(config.model.adapter, shape),
            frozen=frozen_tensors(shape, config.model.freeze),
            fp8=config.train.fp8.recipe if config.train.fp8 else None,
            second=second,
        )

    def as_critic(self) -> Placement:
        """Return the placement of the critic of a run on this one: a head of one row, every weight trained."""
        return self._of_second(self.second.critic or self.shape.as_reward())

    def as_reference(self) -> Placement:
        """Return the placement of a reference of another shape, which is run forward only; without one, this."""
        if self.second.reference is None:
            return self
        return replace(self._of_second(self.second.reference), recompute_layers=0, recompute_modules=())

    def _of_second(self, shape: ModelShape) -> Placement:
        """Return the placement of a second model, which computes in the packs of this one."""
        kind = context_kind_of(self.shape, self.parallel)
        parallel = self.parallel if kind is None else replace(self.parallel, context_kind=kind)
        return replace(
            self, shape=shape, parallel=parallel, adapter=None, frozen=frozenset(), second=SecondShapes()
        )

    @property
    def itemsize(self) -> int:
        """Bytes per element of a weight or an activation."""
        return BYTES[self.precision]

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.model_ranks * self.data

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model and one pack."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    @property
    def shard_ranks(self) -> int:
        """Ranks that share the optimizer state of one set of weights: data x context parallel."""
        return self.data * self.parallel.context

    @property
    def sequence_ranks(self) -> int:
        """Tensor-parallel ranks that share the activations between the tensor-parallel regions."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def token_multiple(self) -> int:
        """The padded length of a pack is a multiple of this."""
        return token_multiple(self.parallel, self.fp8)

    @property
    def micro_batch_multiple(self) -> int:
        """The micro-batches of a rank are a multiple of this: interleaved schedules run in rounds."""
        return self.parallel.pipeline if self.parallel.chunks > 1 else 1

    def runs_again(self, part: str) -> bool:
        """Return whether ``attention`` or ``mlp`` of each layer is recomputed in the backward pass."""
        return self.recompute_layers > 0 or part in self.recompute_modules

    @property
    def split(self) -> AttentionSplit:
        """How an attention layer is split over ranks."""
        shape, parallel = self.shape, self.parallel
        return AttentionSplit(
            shape.num_heads, shape.num_query_groups, shape.head_dim, parallel.tensor, parallel.context
        )

    @property
    def tied_copies(self) -> bool:
        """Whether first and last stage each hold a copy of the tied embedding."""
        return has_two_copies(self.shape, self.parallel.pipeline)

    @property
    def tied_on_one_stage(self) -> bool:
        """Whether embedding and head are one weight of one stage."""
        return is_tied(self.shape) and not self.tied_copies

    def chunks(self, stage: int) -> list[Chunk]:
        """Return the model chunks of a pipeline stage (0-based), in the order of the layers."""
        layers = layers_of_chunks(self.shape.num_layers, self.parallel)
        indices = range(stage, len(layers), self.parallel.pipeline)
        return [Chunk(sum(layers[:i]), layers[i], embeds=i == 0, ends=i == len(layers) - 1) for i in indices]

    def layers(self, stage: int) -> int:
        """Return the number of layers on a pipeline stage."""
        return sum(chunk.layers for chunk in self.chunks(stage))

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Return the peak number of chunk forward passes on a stage whose backward pass is still due.

        Follows megatron-core's schedules: 1F1B, and its interleaved form with virtual stages (arXiv:2104.04473).
        """
        stages, chunks = self.parallel.pipeline, self.parallel.chunks
        if stages == 1:
            return 1
        waiting = stages - 1 - stage
        warm_up = waiting if chunks == 1 else 2 * waiting + (chunks - 1) * stages
        return min(warm_up + 1, micro_batches * chunks)
