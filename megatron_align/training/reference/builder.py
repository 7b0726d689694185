"""The reference model of a run, however it is run: cached log-probs, a second model in memory, or zeros.

Built in steps, as memory allows. *Before* the policy is built, :meth:`ReferenceBuilder.cached_columns` computes the
cached log-probs with a model that it then frees. *After* the optimizer exists, :meth:`ReferenceBuilder.live_model`
builds the second model of ``reference.mode: live``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.model.head import limit_top_tokens
from megatron_align.model.policy import Policy, build_policy
from megatron_align.objectives.base import Objective
from megatron_align.objectives.registry import ReferenceMode, reference_mode
from megatron_align.training.reference.cache import ReferenceColumns, hash_of_rank_0
from megatron_align.training.reference.logprobs import LiveReference, Reference, ZeroReference
from megatron_align.training.reference.top_k import TopKColumns
from megatron_align.training.reference_model import ReferenceModel
from megatron_align.training.resume import ResumePoint
from megatron_align.training.resume_compatibility import require_same_reference
from megatron_align.training.scoring import Scorer
from megatron_align.training.setup import RunSetup, locate
from megatron_align.training.watchdog import Watchdog
from megatron_align.training.weights import load_reference_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """References that the pre-pass compares the policy with.

    Args:
        mode: how it is run; None: the objective compares with none.
        columns: cached log-probs of each split, or likeliest tokens and their logits.
        live: the second model of ``reference.mode: live``.
        sync_steps: interval in steps at which the live reference moves towards the policy; None: it is frozen.
        mixup_alpha: how far it then moves, see :meth:`.LiveReference.move`; None: it is frozen.
        weights_hash: of a frozen reference's weights; None: training moves it, or there is none.
    """

    mode: ReferenceMode | None
    columns: Mapping[str, ReferenceColumns | TopKColumns]
    live: LiveReference | None
    sync_steps: int | None
    mixup_alpha: float | None
    weights_hash: str | None

    def of_split(self, split: str) -> Reference | None:
        """Return the reference for a split's samples; None: the objective compares with none."""
        if split in self.columns:
            return self.columns[split].reference()
        return ZeroReference() if self.mode == "none" else self.live

    def synced_chunks(self) -> list[Policy] | None:
        """Return the reference's chunks if training moves them: checkpoints hold them too."""
        chunks = self.live.scorer.chunks if self.live and self.sync_steps else None
        return cast("list[Policy] | None", chunks)  # not wrapped, as no gradients are computed

    def is_synced_after(self, step: int) -> bool:
        """Return whether the reference moves towards the policy after a step."""
        return bool(self.live and self.sync_steps and step % self.sync_steps == 0)

    def sync(self, policy: Sequence[Policy]) -> None:
        """Move the live reference towards the policy's chunks."""
        live, alpha = self.live, self.mixup_alpha
        assert live is not None, "is_synced_after is true of a live reference only"
        assert alpha is not None, "it comes with sync_steps"
        live.move(policy, alpha)


class ReferenceBuilder:
    """Makes the parts of :class:`References`, each when the model it needs exists.

    Args:
        setup: of the run.
        objective: of the run.
        groups: of this rank.
        watchdog: of this rank.
    """

    def __init__(
        self, setup: RunSetup, objective: Objective, groups: ProcessGroupCollection, watchdog: Watchdog
    ):
        self.setup, self.objective, self.groups, self.watchdog = setup, objective, groups, watchdog
        self.mode = reference_mode(setup.config)

    def frozen_weights_hash(self, resume: ResumePoint | None) -> str | None:
        """Hash the weights of a reference that training does not move; None: there is no such reference.

        Raises:
            InputError: the resumed run had a reference with other weights.
        """
        config = self.setup.config
        if self.mode not in ("cached", "live") or config.reference.sync_steps:
            return None
        with self.watchdog.patient("hashing the reference"):
            weights_hash = hash_of_rank_0(locate(config.reference.path or config.model.path)[0])
        if resume is not None:
            require_same_reference(weights_hash, config, resume.metadata, resume.folder)
        return weights_hash

    def cached_columns(
        self,
        batches_of: Callable[[str], StepBatches],
        weights_hash: str | None,
        first_step: int,
    ) -> Mapping[str, ReferenceColumns | TopKColumns]:
        """Return the cached columns of each split, computing what is missing; empty for other modes.

        If anything is missing, the reference is built and loaded for it, and freed again.

        Args:
            batches_of: returns the steps of a split, without cached columns.
            weights_hash: see :meth:`frozen_weights_hash`.
            first_step: 0-based training step at which the run starts.
        """
        if self.mode != "cached" or weights_hash is None:
            return {}
        with self.watchdog.patient("opening the reference's log-probs"):
            kind = TopKColumns if "reference_top_k" in self.objective.needs else ReferenceColumns
            columns = kind.open_all(self.setup, self.setup.config, self.objective, weights_hash)
        missing = {}
        for split, column in columns.items():
            batches = batches_of(split)
            wanted = range(first_step if split == "train" else 0, batches.steps)
            if steps := column.missing(batches, wanted):
                missing[split] = (batches, steps)
        if missing:
            work = [(columns[split], *of_split) for split, of_split in missing.items()]
            compute_columns(work, self.setup, self.objective, self.groups, self.watchdog)
        return columns

    def live_model(self, policy: Sequence[nn.Module]) -> LiveReference | None:
        """Build and load the second model of ``reference.mode: live``; None for other modes.

        The reference of an adapter is the policy's own chunks with the adapter off, unless ``reference.path`` differs.

        Args:
            policy: the policy's chunks.
        """
        if self.mode != "live":
            return None
        if self.setup.adapter is not None and self.setup.config.reference.path is None:
            return LiveReference(Scorer(policy, self.objective, base=True), self.groups)
        chunks = build_reference(self.setup.reference, self.groups)
        load_reference_weights(chunks, self.setup, self.groups)
        return LiveReference(Scorer(chunks, self.objective), self.groups)


def build_reference(reference: ReferenceModel, groups: ProcessGroupCollection) -> list[Policy]:
    """Build this rank's chunks of a reference, of its own shape, with uninitialised weights that are not trained."""
    chunks = build_policy(reference.megatron, reference.shape, groups)
    for chunk in chunks:
        chunk.requires_grad_(False)
    limit_top_tokens(chunks, reference.tokens)
    return chunks


def compute_columns(
    work: Sequence[tuple[ReferenceColumns | TopKColumns, StepBatches, list[int]]],
    setup: RunSetup,
    objective: Objective,
    groups: ProcessGroupCollection,
    watchdog: Watchdog,
) -> None:
    """Fill cached columns with a model that is built and loaded for it; its memory is free afterwards. Collective.

    Args:
        work: columns, the steps of their data, and which of these to compute.
        setup: of the run.
        objective: what is computed for.
        groups: of this rank.
        watchdog: of this rank.
    """
    _compute(work, setup, objective, groups, watchdog)
    gc.collect()  # modules refer to each other
    torch.cuda.empty_cache()


def _compute(
    work: Sequence[tuple[ReferenceColumns | TopKColumns, StepBatches, list[int]]],
    setup: RunSetup,
    objective: Objective,
    groups: ProcessGroupCollection,
    watchdog: Watchdog,
) -> None:
    with watchdog.patient("loading the reference"):
        chunks = build_reference(setup.reference, groups)
        load_reference_weights(chunks, setup, groups)
    scorer = Scorer(chunks, objective, top_k=objective.top_k)
    for columns, batches, steps in work:
        columns.fill(batches, steps, scorer, groups, watchdog)
