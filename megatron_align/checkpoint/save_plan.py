"""Plan which tensors each rank writes of a model and its optimizer, with megatron-core; nothing is written here."""

from __future__ import annotations

import gc
import io
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_align.checkpoint.host_optimizer_state import SaveableOptimizer
from megatron_align.checkpoint.torch_metadata import CRITIC, REFERENCE
from megatron_align.model.families.saved_modules import copy_name
from megatron_align.model.policy import Policy
from megatron_align.model.tied_embedding import EMBEDDING, HEAD, is_tied

_CRITIC_OPTIMIZER = "critic_optimizer"
_FILES = 2  # per rank, written concurrently
_PADDED = "embedding.", "output_layer."  # modules whose rows are the vocabulary

SaveItem = tuple[WriteItem, Tensor | io.BytesIO]


@dataclass(frozen=True, slots=True)
class RankSavePlan:
    """The part of a save that this rank writes; ``buckets`` are files of about equal size. Rank 0 has ``metadata``."""

    buckets: list[list[SaveItem]]
    metadata: Metadata | None
    common: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SavedCritic:
    """A critic in a checkpoint: this rank's chunks, and their optimizer."""

    model: Sequence[Policy | DistributedDataParallel]
    optimizer: SaveableOptimizer


class SavePlanCache:
    """Plan saves, and keep the plan for the next save of the same objects."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._plan: RankSavePlan | None = None

    def plan(
        self,
        model: Sequence[Policy | DistributedDataParallel],
        optimizer: SaveableOptimizer | None,
        reference: Sequence[Policy] | None,
        critic: SavedCritic | None = None,
    ) -> RankSavePlan:
        """Agree with the other ranks on who writes what; every rank calls this.

        The model's tensors are those of training, the optimizer's the host memory that is filled later. Its other
        entries (steps, learning rate) are read immediately.
        """
        objects = [
            *model,
            optimizer,
            *(reference or []),
            *([*critic.model, critic.optimizer] if critic else []),
        ]
        is_same = len(objects) == len(self._objects) and all(map(operator.is_, objects, self._objects))
        if self._plan is None or not is_same:
            self._objects, self._plan = objects, _plan(model, optimizer, reference, critic)
            return self._plan
        if optimizer is not None:
            self._plan.common["optimizer"] |= optimizer.state_dict()
        if critic is not None:
            self._plan.common[_CRITIC_OPTIMIZER] |= critic.optimizer.state_dict()
        return self._plan


def _plan(
    model: Sequence[Policy | DistributedDataParallel],
    optimizer: SaveableOptimizer | None,
    reference: Sequence[Policy] | None,
    critic: SavedCritic | None,
) -> RankSavePlan:
    chunks, groups = unwrap(model)
    with _hidden_from_garbage_collector():
        state = sharded_state(chunks, optimizer, groups)
        if critic is not None:
            state |= _critic_with_optimizer(critic, groups)
    state |= reference_state(reference, groups)
    sharded, common = save_preprocess(state)
    named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    storage = _PlanOnlyStorage()
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    answer = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(named, is_loading=False), storage, None, 0, planner=planner
    )
    metadata = answer[0][1]
    if metadata is not None:
        metadata.all_local_plans = None  # megatron-core's cache, as large as everything else
    return RankSavePlan(storage.buckets, metadata, common)


@contextmanager
def _hidden_from_garbage_collector() -> Iterator[None]:
    """Hide all objects from the garbage collector: megatron-core calls it here, and it would walk the entire heap."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _PlanOnlyStorage:
    """A storage writer for megatron-core's planning that keeps the items to write and writes nothing.

    megatron-core's storage would copy every tensor that is a view, and write from forked processes, which outlive a
    killed rank.
    """

    can_run_decentralized_global_plan = True

    def __init__(self) -> None:
        self.buckets: list[list[SaveItem]] = []

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Do nothing: no folder is created here."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Keep the plan's items, distributed over files of about equal size."""
        self.buckets = [
            [(item, planner.resolve_data(item)) for item in bucket]
            for bucket in _split_by_size_and_type(_FILES, plan.items)
            if bucket
        ]


def unwrap(
    model: Sequence[Policy | DistributedDataParallel],
) -> tuple[list[Policy], ProcessGroupCollection]:
    """Return the chunks without their data-parallel wrappers, and their process groups."""
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    return chunks, chunks[0].pg_collection


def sharded_state(
    chunks: list[Policy],
    optimizer: SaveableOptimizer | None,
    groups: ProcessGroupCollection,
) -> dict[str, Any]:
    """Return megatron-core's sharded state dict of a model and its optimizer."""
    model = model_state(chunks, groups)
    state = dict(model)
    if optimizer is not None:
        trained = state_of_trained(chunks, groups) if chunks[0].partly_frozen else model
        state["optimizer"] = _optimizer_state(optimizer, trained, groups)
    return state


def model_state(
    chunks: list[Policy], groups: ProcessGroupCollection, *, base: bool = False
) -> dict[str, Any]:
    """Return megatron-core's sharded state dict of a model alone, by chunk.

    Of a model with an adapter: of what is trained, or with ``base`` of everything else.
    """
    metadata = _metadata(groups)
    return {
        f"model{n}": chunk.sharded_state_dict(metadata=metadata)
        if chunk.adapter is None or base
        else _trained_state(chunk, groups)
        for n, chunk in enumerate(chunks)
    }


def state_of_trained(chunks: list[Policy], groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the sharded state dict by whose tensors those of the optimizer are named and cut.

    A tensor that is stacked over layers cannot lack the frozen ones: where there are any, every layer has its own.
    """
    if not chunks[0].partly_frozen:
        return model_state(chunks, groups)
    metadata = {**_metadata(groups), "non_homogeneous_layers": True}
    return {f"model{n}": chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}


def _trained_state(chunk: Policy, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the sharded tensors of an adapter's checkpoint, each a tensor of its own as only some layers have it."""
    state: dict[str, Any] = {}
    for name, parameter in chunk.stored_parameters().items():
        options: dict[str, Any] = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
        if getattr(parameter, "tensor_model_parallel", False):
            axis = parameter.partition_dim  # type: ignore[attr-defined]  # megatron-core's
            key = name
            if axis == 0 and name.startswith(_PADDED):  # vocabulary padding depends on the number of ranks
                options["allow_shape_mismatch"] = True
            if name == copy_name(HEAD) and is_tied(chunk.shape):  # stored once, as the embedding's
                key, options["replica_id"] = copy_name(EMBEDDING), (1, 0, groups.dp_cp.rank())
            state[name] = make_tp_sharded_tensor_for_checkpoint(parameter, key, axis, **options)
        else:
            state[name] = make_sharded_tensor_for_checkpoint(parameter, name, **options)
    return state


def reference_state(reference: Sequence[Policy] | None, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return megatron-core's sharded state dict of a reference model."""
    return {
        f"reference{n}": chunk.sharded_state_dict(prefix=REFERENCE, metadata=_metadata(groups))
        for n, chunk in enumerate(reference or [])
    }


def critic_state(critic: Sequence[Policy], groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return megatron-core's sharded state dict of a critic, alone; its optimizer's tensors are named after these."""
    return {
        f"critic{n}": chunk.sharded_state_dict(prefix=CRITIC, metadata=_metadata(groups))
        for n, chunk in enumerate(critic)
    }


def _critic_with_optimizer(critic: SavedCritic, groups: ProcessGroupCollection) -> dict[str, Any]:
    chunks, _ = unwrap(critic.model)
    state = critic_state(chunks, groups)
    return {**state, _CRITIC_OPTIMIZER: _optimizer_state(critic.optimizer, dict(state), groups)}


def _optimizer_state(
    optimizer: SaveableOptimizer, trained: dict[str, Any], groups: ProcessGroupCollection
) -> dict[str, Any]:
    """Return megatron-core's sharded state dict of an optimizer, whose tensors are named after those of ``trained``.

    None on ranks that have nothing to write is left out: megatron-core would take it for a difference between ranks.
    """
    entries = optimizer.sharded_state_dict(trained, is_loading=False, metadata=_metadata(groups))
    return {key: value for key, value in entries.items() if value is not None}


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": groups.dp_cp,
    }


def with_exact_storage(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU tensor as a view whose storage has its size: torch.save writes the entire storage."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape)
