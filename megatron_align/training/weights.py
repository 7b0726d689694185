"""Load the weights that training starts from, or that a reference model has, into this rank's model chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.checkpoint.card import require_all_weights
from megatron_align.checkpoint.integrity import require_intact
from megatron_align.checkpoint.load import load_checkpoint
from megatron_align.hf.adapter import load_adapter
from megatron_align.hf.adapter_start import start_with_base
from megatron_align.hf.finite import find_nonfinite_weights
from megatron_align.hf.load import load_weights
from megatron_align.model.families import ModelShape
from megatron_align.model.lora import initialise_adapters, layer_adapters, trained_copies
from megatron_align.model.policy import Policy
from megatron_align.storage.tensor_digest import require_finite
from megatron_align.training.critic_start import CriticStart
from megatron_align.training.setup import RunSetup, locate

REWARD_WEIGHT = "reward_head.weight"
REWARD_DEVIATION = 0.02  # of a new reward head's initial values, as in transformers


def load_start_weights(
    chunks: Sequence[Policy], setup: RunSetup, groups: ProcessGroupCollection, *, resumes: bool = False
) -> None:
    """Load the weights of ``model.path``, and start the adapter if there is one.

    Args:
        chunks: this rank's.
        setup: of the run.
        groups: of this rank.
        resumes: a checkpoint is loaded next, and with it what an adapter that starts with a part of the base took out.
    """
    load_model_weights(chunks, setup.config.model.path, setup, groups)
    if (options := setup.config.model.adapter) is None:
        return
    assert setup.adapter is not None, "the options describe it"
    for copy in trained_copies(chunks):
        copy.start()
    if options.path is not None:
        load_adapter(options.path, chunks)
    elif not setup.adapter.holds_start:
        initialise_adapters(chunks, setup.config.train.seed)
    elif not resumes:
        start_with_base(chunks)


def load_reference_weights(chunks: Sequence[Policy], setup: RunSetup, groups: ProcessGroupCollection) -> None:
    """Load the weights of the reference: ``reference.path``, or the model that training starts from.

    Raises:
        InputError: the weights are incomplete, corrupt, not finite, or of another shape.
    """
    reference = setup.reference
    read_model_weights(chunks, reference.path, reference.shape, groups)
    require_finite_weights(chunks, reference.path)


def load_critic_weights(
    chunks: Sequence[Policy], start: CriticStart, seed: int, groups: ProcessGroupCollection
) -> None:
    """Load the weights that a critic starts from; a new value head is drawn, so small that all values are near 0.

    Raises:
        InputError: the weights are incomplete, corrupt, or not finite.
    """
    absent = frozenset(() if start.has_head else {REWARD_WEIGHT})
    read_model_weights(chunks, start.path, start.start_shape, groups, absent=absent)
    if absent and chunks[-1].post_process:
        chunks[-1].reward_head.initialise(1 / (start.shape.hidden_size + 1), seed)
    require_finite_weights(chunks, start.path)


def load_model_weights(
    chunks: Sequence[Policy], path: str, setup: RunSetup, groups: ProcessGroupCollection
) -> None:
    """Load a Hugging Face folder or a checkpoint; a reward head that it lacks is initialised from the seed.

    An adapter of the chunks is left unchanged.

    Args:
        chunks: this rank's.
        path: Hugging Face folder, checkpoint, or run folder (its newest checkpoint).
        setup: of the run.
        groups: of this rank.

    Raises:
        InputError: the weights are incomplete, corrupt, not finite, or of another shape.
    """
    starts_reward_head = setup.shape.is_reward and not setup.start_shape.is_reward
    absent = frozenset({REWARD_WEIGHT} if starts_reward_head else ())
    read_model_weights(chunks, path, setup.start_shape, groups, absent=absent)
    if starts_reward_head and chunks[-1].post_process:
        chunks[-1].reward_head.initialise(REWARD_DEVIATION, setup.config.train.seed)
    require_finite_weights(chunks, path)


def read_model_weights(
    chunks: Sequence[Policy],
    path: str,
    shape: ModelShape,
    groups: ProcessGroupCollection,
    *,
    absent: frozenset[str] = frozenset(),
) -> None:
    """Read a Hugging Face folder or a checkpoint into this rank's chunks; an adapter of theirs is left unchanged.

    Args:
        chunks: this rank's.
        path: Hugging Face folder, checkpoint, or run folder (its newest checkpoint).
        shape: of the stored model.
        groups: of this rank.
        absent: parameters that are not stored; they are left unchanged.

    Raises:
        InputError: the weights are incomplete, corrupt, or of another shape.
    """
    for chunk in chunks:
        chunk.base_loaded = object()
    for adapter in layer_adapters(chunks):
        adapter.is_reduced = False
    weights, assets = locate(path)
    if weights == assets:
        parameters = {name: p for chunk in chunks for name, p in chunk.base_parameters().items()}
        stored = {name: parameter for name, parameter in parameters.items() if name not in absent}
        load_weights(weights, shape, stored, groups.tp.rank(), groups.tp.size())
    else:
        require_intact(weights)
        require_all_weights(weights)
        load_checkpoint(weights, list(chunks), absent=absent, base=True)


def require_finite_weights(chunks: Sequence[Policy], source: str | Path) -> None:
    """Refuse loaded weights that are not finite; collective.

    Raises:
        InputError: on every rank, naming such tensors with their numbers of NaN and infinite elements.
    """
    require_finite(find_nonfinite_weights(chunks), source)
