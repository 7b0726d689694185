"""Open a generation engine for a model on disk: a Hugging Face folder, or a checkpoint of any layout without export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_align.checkpoint.card import read_checkpoint_metadata
from megatron_align.checkpoint.folder import find_checkpoint
from megatron_align.checkpoint.integrity import require_intact
from megatron_align.convert.open_checkpoint import Checkpoint, open_checkpoint, open_state
from megatron_align.errors import InputError
from megatron_align.evaluation.adapter_names import ONLY
from megatron_align.evaluation.adapters import attach_adapters
from megatron_align.evaluation.config import EvaluationConfig
from megatron_align.hf.load import open_hf
from megatron_align.hf.safetensors import DTYPES
from megatron_align.model.families import rows
from megatron_align.rollout.endpoint import Endpoint
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.rollout.vllm_server import VLLM_DTYPES, shared_server
from megatron_align.storage.journal import fingerprint
from megatron_align.training.setup import DTYPES as PRECISIONS
from megatron_align.training.setup import locate

Precision = Literal["bf16", "fp32"]


def open_engine(
    model: str | Path, precision: Precision | None = None, adapter: str | Path | None = None
) -> TransformersEngine:
    """Load a model into a transformers engine, on this rank's GPU or the CPU.

    Args:
        model: Hugging Face folder, checkpoint, or run folder (its newest checkpoint).
        precision: of weights and computation; None: as stored.
        adapter: of the model, a PEFT folder or a checkpoint; None: none.

    Raises:
        InputError: the model is missing, corrupt, or no language model; or the adapter is not one of it.
    """
    engine = _open_model(model, precision)
    if adapter is not None:
        attach_adapters(engine, model, {ONLY: str(adapter)})
    return engine


def _open_model(model: str | Path, precision: Precision | None) -> TransformersEngine:
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if find_checkpoint(model) is None:
        weights, _ = open_hf(_folder(model))
        stored = DTYPES[weights.dtype(weights.names[0])]
        return TransformersEngine.from_folder(model, PRECISIONS[precision] if precision else stored, device)
    checkpoint = open_checkpoint(model)
    require_intact(checkpoint.folder)
    dtype = PRECISIONS[precision] if precision else checkpoint.dtype
    engine = TransformersEngine.from_assets(assets_of(model), dtype, device)
    step = read_checkpoint_metadata(checkpoint.folder)["step"]
    engine.update_weights(_tensors(checkpoint), version=step)
    return engine


@contextmanager
def vllm_servers(config: EvaluationConfig) -> Iterator[list[str | Endpoint]]:
    """Give the vLLM servers of an evaluation within a with-block; rank 0 starts and stops one, if need be. Collective.

    Raises:
        InputError: on every rank: the server does not start, or the ranks are on several machines.
    """
    rollout = config.rollout
    if rollout.vllm_python is None:
        yield list(rollout.urls)
        return
    log, dtype = Path(config.out) / "vllm.log", VLLM_DTYPES[config.precision]
    with shared_server(rollout.vllm_python, config.model, log, rollout.vllm_options, dtype) as server:
        yield [server]


def assets_of(model: str | Path) -> Path:
    """Return the folder of a model's config and tokenizer."""
    return locate(str(model))[1]


def weights_state(model: str | Path) -> str:
    """Return a hash of the state of a model's files, tokenizer and template too: another or a newer one differs."""
    folders = dict.fromkeys(locate(str(model)))
    return hashlib.sha256(json.dumps([fingerprint(folder) for folder in folders]).encode()).hexdigest()[:16]


def _folder(model: str | Path) -> Path:
    if not Path(model).is_dir():
        raise InputError(f"a model must be a Hugging Face folder or a checkpoint, found nothing at {model}")
    return Path(model)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a checkpoint, one row of the weight table at a time in memory."""
    state = open_state(checkpoint)
    for row in rows(checkpoint.shape):
        yield from state.read(row).items()
