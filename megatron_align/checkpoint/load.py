"""Load a checkpoint into a model and its optimizer, in place and on any layout.

megatron-core says which box of which stored tensor each of this rank's parameters is. Each rank reads the boxes it
holds, and of masters and moments the range that it owns among its data-parallel ranks, directly into its memory.
megatron-core's own loading would read all of them on every data-parallel rank, into additional memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_align.checkpoint.card import read_checkpoint_metadata
from megatron_align.checkpoint.folder import STATE
from megatron_align.checkpoint.read_tensors import ReadRequest, read_tensors
from megatron_align.checkpoint.save_plan import (
    critic_state,
    model_state,
    reference_state,
    state_of_trained,
    unwrap,
)
from megatron_align.errors import InputError
from megatron_align.model.policy import Policy

_OPTIMIZER = "optimizer.state"  # prefix of the names of masters and moments


def load_checkpoint(
    folder: Path,
    model: list[Policy] | list[DistributedDataParallel],
    optimizer: DistributedOptimizer | None = None,
    reference: list[Policy] | None = None,
    *,
    absent: frozenset[str] = frozenset(),
    base: bool = False,
) -> None:
    """Load weights, and optionally optimizer state and a reference model, in place; every rank calls this.

    Args:
        folder: of the checkpoint.
        model: this rank's chunks.
        optimizer: None: weights only.
        reference: chunks of a reference model that training updates.
        absent: parameters that the checkpoint does not have; they are left unchanged.
        base: the checkpoint holds the base of a model with an adapter, which is left unchanged.

    Raises:
        InputError: the checkpoint does not fit, or has no optimizer state where it is needed.
    """
    if optimizer is not None and not read_checkpoint_metadata(folder)["optimizer"]:
        raise InputError(f"cannot resume: the checkpoint holds weights only, no optimizer state: {folder}")
    chunks, groups = unwrap(model)
    states = list(model_state(chunks, groups, base=base).values())
    for state in states:
        for name in absent:
            state.pop(name, None)
    requests = [
        request
        for state in [*states, reference_state(reference, groups)]
        for request in _model_requests(state)
    ]
    if optimizer is not None:
        requests += _optimizer_requests(list(state_of_trained(chunks, groups).values()), optimizer)
    _on_all_ranks(lambda: read_tensors(folder / STATE, requests))


def load_critic(
    folder: Path, critic: Sequence[Policy | DistributedDataParallel], optimizer: DistributedOptimizer
) -> None:
    """Load the critic of a checkpoint and the state of its optimizer, in place; every rank calls this.

    Raises:
        InputError: the checkpoint has no critic.
    """
    if not read_checkpoint_metadata(folder).get("critic"):
        raise InputError(
            f"cannot resume: the checkpoint has no critic, as its run had another objective: {folder}; for a run with "
            "one give another checkpoint.dir, and this checkpoint as model.path"
        )
    chunks, groups = unwrap(critic)
    states = list(critic_state(chunks, groups).values())
    requests = [request for state in states for request in _model_requests(state)]
    requests += _optimizer_requests(states, optimizer)
    _on_all_ranks(lambda: read_tensors(folder / STATE, requests))


def _on_all_ranks(call: Callable[[], None]) -> None:
    """Make a call on every rank; an InputError of one rank is raised on all."""
    error: str | None = None
    try:
        call()
    except InputError as refused:
        error = str(refused)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if messages := sorted(set(filter(None, errors))):
        raise InputError(messages[0])


def _model_requests(state: dict[str, Any]) -> Iterator[ReadRequest]:
    """Yield the requests for all tensors of a model's sharded state dict."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            for box in _boxes(entry):
                yield _request(box, 0, box.data.detach().view(-1))


def _optimizer_requests(
    states: Sequence[dict[str, Any]], optimizer: DistributedOptimizer
) -> Iterator[ReadRequest]:
    """Yield the requests for this rank's masters and moments; ``states`` are those of its model's chunks."""
    entries = {id(entry.data): entry for state in states for entry in nested_values(state)}
    for ranges in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, parameter_ranges in bucket["param_map"].items():
                own = optimizer._get_main_param_and_optimizer_states(parameter)
                entry = entries[id(parameter)]
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    # The entire parameter, without memory: its boxes know where in it they begin.
                    entire = torch.empty(entry.data.shape, dtype=torch.float32, device="meta")
                    key = f"{_OPTIMIZER}.{name}.{entry.key}"
                    state = replace(entry, key=key, data=entire, **_dtype_of(entry))
                    for box in _boxes(state):
                        yield from _owned_part(box, parameter_ranges["param"], own[name].detach())


def _dtype_of(entry: ShardedTensor | ShardedTensorFactory) -> dict[str, Any]:
    return {"dtype": torch.float32} if isinstance(entry, ShardedTensor) else {}


def _boxes(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the boxes that a parameter is stored in: gate and up are stored separately."""
    return entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]


def _owned_part(box: ShardedTensor, owned: Any, shard: Tensor) -> Iterator[ReadRequest]:
    """Yield the request for the part of a box within the range ``owned`` of its flattened parameter, if any."""
    begin = box.data.storage_offset()
    start, stop = max(owned.start, begin), min(owned.end, begin + box.data.numel())
    if start < stop:
        yield _request(box, start - begin, shard[start - owned.start : stop - owned.start])


def _request(box: ShardedTensor, start: int, target: Tensor) -> ReadRequest:
    return ReadRequest(
        key=box.key,
        global_shape=tuple(box.global_shape),
        offsets=tuple(box.global_offset),
        sizes=(1,) * box.prepend_axis_num + tuple(box.local_shape),
        layer_dims=box.prepend_axis_num,
        allow_padding=box.allow_shape_mismatch,
        start=start,
        target=target,
    )
