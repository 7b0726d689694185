"""Give a generation engine the weights of the live policy, which may be sharded over tensor, pipeline and other ranks.

Tensors are gathered one row of the weight table at a time: beyond the engine's own copy a rank holds one row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_align.errors import InputError, TrainingFault, one_line
from megatron_align.hf.assets import AssetChanges, write_assets
from megatron_align.hf.gather import gathered_rows
from megatron_align.model import cpu, parallel
from megatron_align.model.policy import Policy
from megatron_align.rollout.engine import Engine
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


def named_weights(chunks: Sequence[Policy]) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of the live policy by name, an adapter merged, on every rank. Collective.

    Every rank must take all of them, in step with the others; the tensors are copies, in the policy's dtype.

    Args:
        chunks: this rank's; with overlapped gathering of weights (``parallel.overlap_param_gather``), gathered before.
    """
    for tensors in gathered_rows(chunks, everywhere=True):
        yield from tensors.items()
        del tensors  # before the next row is gathered


def update_engine(engine: Engine | None, chunks: Sequence[Policy], version: int) -> None:
    """Replace the weights of the ranks' engines by those of the live policy. Collective over all ranks.

    Servers are updated by rank 0 for the engines of all ranks.

    Args:
        engine: of this rank; None: it has none, and only helps to gather.
        chunks: this rank's.
        version: of the weights, which completions then carry: the number of the training step.

    Raises:
        InputError: on every rank: an engine could not take the weights; its completions are of unknown weights.
    """
    weights = named_weights(chunks)
    fault: str | None = None
    try:
        if engine is not None and (dist.get_rank() == 0 or not engine.shared):
            engine.update_weights(weights, version)
    except (InputError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        fault = one_line(error)
    for _ in weights:  # those that the engine did not take: other ranks wait in the gathering of each
        pass
    if first := parallel.first_fault(fault):
        raise InputError(f"the engine could not take the weights of version {version}: {first}")
    if engine is not None:
        engine.weight_version = version  # of shared servers, which rank 0 has updated


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
