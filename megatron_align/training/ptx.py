"""Supervised samples in the steps of a run on rollouts: which, and the reference's likeliest tokens of theirs.

The samples of a step are a function of its number, the seed and the data, so a resumed run has the same.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.data.batching.sampler import EpochOrder, SampleSteps
from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.objectives.ptx import PTX, PTXOptions
from megatron_align.records import PackedBatch
from megatron_align.training.batches import data_rank, pack_options
from megatron_align.training.reference.builder import compute_columns
from megatron_align.training.reference.cache import hash_of_rank_0
from megatron_align.training.reference.top_k import TopKColumns
from megatron_align.training.setup import RunSetup, locate
from megatron_align.training.watchdog import Watchdog


class PTXSteps:
    """The supervised part of each step.

    Args:
        setup: of the run, with ``ptx``.
        options: of the term.
        groups: of this rank.

    Attributes:
        objective: the term.
    """

    def __init__(self, setup: RunSetup, options: PTXOptions, groups: ProcessGroupCollection):
        assert isinstance(setup.ptx, TokenStore), "it is opened where the objective has the option"
        self._setup, self._options, self._groups = setup, options, groups
        self.objective = PTX(options)
        self._store = setup.ptx
        self._steps = self._of(self._store)

    def batches(self, step: int) -> list[PackedBatch]:
        """Return this rank's packs of a 0-based step."""
        return self._steps.step(step).batches

    def read_reference(self, weights: str | None, watchdog: Watchdog, first_step: int) -> None:
        """Add the reference's likeliest tokens to the data; compute those that are not on the disk. Collective.

        Args:
            weights: hash of the reference's weights; None: it was not computed.
            watchdog: of this rank.
            first_step: 0-based step at which the run starts.
        """
        config, store = self._setup.config, self._store
        if not self.objective.top_k:
            return
        with watchdog.patient("opening the reference's likeliest tokens"):
            if weights is None:
                weights = hash_of_rank_0(locate(config.reference.path or config.model.path)[0])
            columns = TopKColumns.open(store, config, self.objective.top_k, weights, self._setup.reference)
        missing = columns.missing(self._steps, range(first_step, self._setup.steps))
        if missing:
            work = [(columns, self._steps, missing)]
            compute_columns(work, self._setup, self.objective, self._groups, watchdog)
        self._steps = self._of(columns.added_to(store))

    def _of(self, store: TokenStore) -> StepBatches:
        setup, config = self._setup, self._setup.config
        order = EpochOrder(store.sources, (1.0,), config.train.seed, config.data.shuffle)
        steps = SampleSteps(order, self._options.samples, steps=setup.steps)
        rank = data_rank(setup.shape, config.parallel, self._groups)
        batches = StepBatches(
            store, steps, pack_options(setup, self.objective), rank, self.objective.normalization
        )
        if setup.adapter is not None and setup.adapter.dropout > 0:
            batches.dropout_seed = config.train.seed
        return batches
