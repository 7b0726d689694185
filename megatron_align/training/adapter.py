"""The base of a run that trains an adapter: its weights never change, and a checkpoint names them by their hash."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_align.errors import InputError
from megatron_align.hf.adapter import require_base
from megatron_align.training.reference.cache import hash_of_rank_0
from megatron_align.training.resume import ResumePoint
from megatron_align.training.setup import RunSetup


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The model that an adapter is trained on.

    Args:
        base: ``model.path``.
        weights: hash of its weight files.
    """

    base: str
    weights: str


def adapter_base(
    setup: RunSetup, resume: ResumePoint | None, reference_hash: str | None
) -> AdapterBase | None:
    """Return the base of the run's adapter; None: the run trains all weights. Collective.

    Args:
        setup: of the run.
        resume: the checkpoint that the run resumes from; its adapter must be of the same base.
        reference_hash: of a frozen reference's weights, used where that is the base.

    Raises:
        InputError: the checkpoint's adapter, or that of ``model.adapter.path``, is of another base.
    """
    model, reference = setup.config.model, setup.config.reference.path
    if model.adapter is None:
        return None
    weights = reference_hash if reference is None and reference_hash else hash_of_rank_0(setup.weights)
    if resume is not None and (before := resume.metadata["adapter"]["weights"]) != weights:
        raise InputError(
            f"the base has changed: the adapter in {resume.folder} was trained on weights with sha256 {before[:16]}, "
            f"those in {model.path} have {weights[:16]}; give the base that it was trained on as model.path"
        )
    if model.adapter.path is not None:
        require_base(model.adapter.path, weights, model.path)
    return AdapterBase(model.path, weights)
