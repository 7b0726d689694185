"""A model on a layout: where its layers and tensors lie, which every count starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_align.config import ParallelConfig, RunConfig
from megatron_align.model.context_kind import AttentionSplit
from megatron_align.model.families import ModelShape
from megatron_align.model.stages import layers_of_chunks

BYTES = {"bf16": 2, "fp32": 4}  # of a weight or an activation


@dataclass(frozen=True, slots=True)
class Chunk:
    """One model chunk of a pipeline stage."""

    layers: int
    embeds: bool  # it begins with the embedding
    ends: bool  # it ends with the final norm and the head


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model on a layout.

    Args:
        shape: of the model.
        parallel: the layout.
        data: data-parallel ranks.
        precision: of weights and activations.
        recompute_layers: 0: activations are kept; k: one checkpoint per k layers.
        recompute_modules: parts of every layer that are made again.
    """

    shape: ModelShape
    parallel: ParallelConfig
    data: int
    precision: Literal["bf16", "fp32"]
    recompute_layers: int = 0
    recompute_modules: tuple[str, ...] = ()

    @classmethod
    def of_run(cls, config: RunConfig, shape: ModelShape, world_size: int) -> Placement:
        """Return what a run places on ``world_size`` ranks.

        Args:
            config: of the run; parallel and train are read.
            shape: of the model that is trained: a reward model's, where the objective is ``reward``.
            world_size: ranks.

        Raises:
            InputError: the ranks do not divide over the layout.
        """
        return cls(
            shape=shape,
            parallel=config.parallel,
            data=config.parallel.data_parallel(world_size),
            precision=config.train.precision,
            recompute_layers=config.train.recompute_layers,
            recompute_modules=tuple(config.train.recompute_modules),
        )

    def with_data(self, data: int) -> Placement:
        """Return the same with another number of data-parallel ranks."""
        return replace(self, data=data)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES[self.precision]

    @property
    def world_size(self) -> int:
        """All ranks."""
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
        """What the padded length of a pack must be a multiple of."""
        return self.parallel.context * self.sequence_ranks

    @property
    def micro_batch_multiple(self) -> int:
        """What the micro-batches of a rank must be a multiple of: interleaved schedules go in rounds."""
        return self.parallel.pipeline if self.parallel.chunks > 1 else 1

    def runs_again(self, part: str) -> bool:
        """Return whether ``attention`` or ``mlp`` of each layer is run again before its backward."""
        return self.recompute_layers > 0 or part in self.recompute_modules

    @property
    def split(self) -> AttentionSplit:
        """How ranks share an attention layer."""
        shape, parallel = self.shape, self.parallel
        return AttentionSplit(
            shape.num_heads, shape.num_query_groups, shape.head_dim, parallel.tensor, parallel.context
        )

    @property
    def tied_copies(self) -> bool:
        """Whether first and last stage each hold the tied embedding."""
        return self.parallel.pipeline > 1 and self.shape.tied_embeddings and not self.shape.is_reward

    def chunks(self, stage: int) -> list[Chunk]:
        """Return the model chunks of a pipeline stage (0-based), in the order of the layers."""
        layers = layers_of_chunks(self.shape.num_layers, self.parallel)
        numbers = range(stage, len(layers), self.parallel.pipeline)
        return [Chunk(layers[number], number == 0, number == len(layers) - 1) for number in numbers]

    def layers(self, stage: int) -> int:
        """Return the layers of a pipeline stage."""
        return sum(chunk.layers for chunk in self.chunks(stage))

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Return how many forward passes of one chunk a stage has done at most before their backward.

        megatron-core's schedules: 1F1B, and its interleaved form with virtual stages (arXiv:2104.04473).
        """
        stages, chunks = self.parallel.pipeline, self.parallel.chunks
        if stages == 1:
            return 1
        waiting = stages - 1 - stage
        ahead = waiting if chunks == 1 else 2 * waiting + (chunks - 1) * stages
        return min(ahead + 1, micro_batches * chunks)
