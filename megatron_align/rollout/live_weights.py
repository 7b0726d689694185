"""Give a generation engine the weights of the live policy, which may be sharded over tensor, pipeline and other ranks.

Tensors are gathered one row of the weight table at a time: beyond the engine's own copy a rank holds one row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_align.errors import InputError, TrainingFault, one_line
from megatron_align.hf.adapter import gather_adapter
from megatron_align.hf.adapter_start import plain_adapter, plain_tensors
from megatron_align.hf.assets import AssetChanges, write_assets
from megatron_align.hf.gather import gathered_rows
from megatron_align.model import cpu, parallel
from megatron_align.model.policy import Policy
from megatron_align.rollout.engine import Engine, LiveAdapter
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.rollout.types import Completion


def live_engine(chunks: Sequence[Policy], assets: Path, changes: AssetChanges) -> TransformersEngine:
    """Build a transformers engine for the live policy, in its dtype; :func:`update_engine` gives it weights.

    Args:
        chunks: this rank's.
        assets: Hugging Face folder with the config, generation config and tokenizer that training started from.
        changes: of training in these, as an exported model has them.

    Raises:
        InputError: transformers does not have the model, or it is no language model.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_align_engine_") as folder:
        write_assets(assets, Path(folder), chunks[0].shape, changes)
        return TransformersEngine.from_assets(folder, chunks[0].config.params_dtype, cpu.device())


def named_weights(chunks: Sequence[Policy], *, base: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of the live policy by name, an adapter merged, on every rank. Collective.

    Every rank must take all of them, in step with the others, and may read a tensor until it takes the next: memory is
    used again, and a tensor that a rank holds in full is the policy's own. All are in the policy's dtype.

    Args:
        chunks: this rank's; with overlapped gathering of weights (``parallel.overlap_param_gather``), gathered before.
        base: those of the base that an adapter is trained on, without it.
    """
    for tensors in gathered_rows(chunks, everywhere=True, base=base, reuse=True):
        yield from tensors.items()
        del tensors  # before the next row is gathered


def update_engine(engine: Engine | None, chunks: Sequence[Policy], version: int) -> str | None:
    """Give the ranks' engines the weights of the live policy. Collective over all ranks.

    Of a policy with an adapter they receive A and B alone, and once the base; all weights, merged, every time where the
    engine refuses such an adapter. Servers are updated by rank 0 for the engines of all ranks.

    Args:
        engine: of this rank; None: it has none, and only helps to gather.
        chunks: this rank's.
        version: of the weights, which completions then carry: the number of the training step.

    Returns:
        Why merged weights were sent although the policy has an adapter; None otherwise.

    Raises:
        InputError: on every rank: an engine could not take the weights; its completions are of unknown weights.
    """
    receiver = engine if engine is not None and (dist.get_rank() == 0 or not engine.shared) else None
    refusal, is_alone, own_base = None, False, False
    if chunks[0].adapter is not None:
        refusal, has_bases, own_base = _agreed(receiver, chunks[0])
        is_alone = refusal is None
        if is_alone and not has_bases:
            _update_bases(receiver, chunks, version)
    fault: str | None = None
    if is_alone:
        live = _live_adapter(chunks, plain=own_base)
        fault = _fault_of(lambda: receiver.update_adapter(live, version)) if receiver else None
    else:
        weights = named_weights(chunks)
        fault = _fault_of(lambda: receiver.update_weights(weights, version)) if receiver else None
        _take_the_rest(weights)
    _raise_fault_of_any(fault, version)
    served = [engine.served if engine is not None and engine.shared else ""]
    dist.broadcast_object_list(served, src=0)
    if engine is not None:
        engine.weight_version = version  # of shared servers, which rank 0 has updated
        if engine.shared:
            engine.served = served[0]
    return refusal


def _agreed(receiver: Engine | None, chunk: Policy) -> tuple[str | None, bool, bool]:
    """Return what holds for the engines of all ranks: why one refuses the adapter, all have its base, one its own."""
    assert chunk.adapter is not None, "the model has an adapter"
    found: tuple[str | None, bool, bool] | None = None
    if receiver is not None:
        own = receiver.has_own_base
        sent = plain_adapter(chunk.adapter) if own else chunk.adapter
        found = receiver.refuses_adapter(sent), own or receiver.holds_base(chunk.base_loaded), own
    states: list[tuple[str | None, bool, bool] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(states, found)
    given = [state for state in states if state is not None]
    refusal = next((reason for reason, _, _ in given if reason), None)
    return refusal, all(has for _, has, _ in given), any(own for _, _, own in given)


def _update_bases(receiver: Engine | None, chunks: Sequence[Policy], version: int) -> None:
    weights = named_weights(chunks, base=True)
    fault = (
        _fault_of(lambda: receiver.update_base(weights, chunks[0].base_loaded))
        if receiver and not receiver.has_own_base
        else None
    )
    _take_the_rest(weights)
    _raise_fault_of_any(fault, version)


def _live_adapter(chunks: Sequence[Policy], *, plain: bool) -> LiveAdapter:
    """Gather the adapter on every rank: as it is trained, or as the plain one of the unchanged base."""
    adapter, tensors = chunks[0].adapter, gather_adapter(chunks, everywhere=True)
    assert adapter is not None, "the model has an adapter"
    if plain:
        adapter, tensors = plain_adapter(adapter), plain_tensors(adapter, tensors)
    return LiveAdapter(adapter, tensors, chunks[0].shape)


def _fault_of(update: Callable[[], None]) -> str | None:
    """Make an update; return why it failed in one line, None if it did not."""
    try:
        update()
    except (InputError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return one_line(error)
    return None


def _take_the_rest(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take the weights that an engine did not take: other ranks wait in the gathering of each."""
    for _ in weights:
        pass


def _raise_fault_of_any(fault: str | None, version: int) -> None:
    if first := parallel.first_fault(fault):
        raise InputError(f"the engine could not take the weights of version {version}: {first}")


def require_version(answers: Iterable[Iterable[Completion]], version: int) -> None:
    """Check that completions were generated with the weights of a version.

    Raises:
        TrainingFault: naming the version found.
    """
    for completions in answers:
        for completion in completions:
            if completion.weight_version != version:
                raise TrainingFault(
                    f"completions must be of the weights of version {version}, the engine answered with version "
                    f"{completion.weight_version}: another run updates it, or it was restarted; give each run an "
                    "engine of its own, and resume from the last checkpoint"
                )
