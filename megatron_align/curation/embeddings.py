"""Embeddings of texts: a column, a function of a user's file, or the mean hidden state of a model.

Shapes: B texts, T tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from megatron_align.config.paths import expand_home
from megatron_align.config.user_files import raised_at, user_function
from megatron_align.curation.chat_models import is_function
from megatron_align.curation.open_scorers import COLUMN
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, one_line, require, shown

Embed = Callable[[Sequence[RawPrompt]], np.ndarray]  # -> [B, D] float32
BATCH = 16
OPTION = "embeddings"


def open_embeddings(spec: str, max_tokens: int) -> Embed:
    """Return what embeds texts.

    Args:
        spec: ``column:NAME`` (lists of numbers), ``FILE.py:FUNCTION`` (a list of texts in, a vector for each out), or a
            Hugging Face folder.
        max_tokens: of a text that a model reads; the rest of a longer text is left out.

    Raises:
        InputError: there is no such function or model.
    """
    if spec.startswith(COLUMN):
        return _column(spec.removeprefix(COLUMN))
    if is_function(spec):
        return _function(spec)
    return _Model(expand_home(spec), max_tokens)


def _column(name: str) -> Embed:
    require(bool(name), f"{OPTION}: {COLUMN}NAME needs the name of a field, got none")
    return lambda prompts: np.stack([_vector(p.raw.get(name), f"{p.where}: field '{name}'") for p in prompts])


def _function(path: str) -> Embed:
    file, function = user_function(path, OPTION)

    def embed(prompts: Sequence[RawPrompt]) -> np.ndarray:
        try:
            made = list(function([prompt.text for prompt in prompts]))
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"{OPTION} {raised_at(error, file)}") from error
        line = f"{OPTION}: {path} must return a vector for each of {len(prompts)} texts, got {len(made)}"
        require(len(made) == len(prompts), line)
        return np.stack([_vector(v, f"{OPTION}: {path}") for v in made])

    return embed


class _Model:
    """The mean of the last hidden states over a text's tokens."""

    def __init__(self, folder: str, max_tokens: int) -> None:
        found = f"{OPTION} must be column:NAME, FILE.py:FUNCTION or a Hugging Face folder, found nothing at {folder}"
        require(Path(folder).is_dir(), found)
        self._folder, self._max_tokens = folder, max_tokens
        self._encoder = Encoder(load_tokenizer(folder))
        self._model: Any = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[RawPrompt]) -> np.ndarray:
        model = self._model = self._model or self._load()
        device = next(model.parameters()).device
        ids = [self._encoder.ids(prompt.text, added=True)[: self._max_tokens] for prompt in prompts]
        rows: list[Any] = [None] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            length = max(len(ids[i]) for i in batch)
            ids_BT = torch.tensor([[*ids[i], *[0] * (length - len(ids[i]))] for i in batch], device=device)
            mask_BT = torch.tensor(
                [[1] * len(ids[i]) + [0] * (length - len(ids[i])) for i in batch], device=device
            )
            hidden_BTD = model(ids_BT, attention_mask=mask_BT).last_hidden_state.float()
            mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
            for i, vector_D in zip(batch, mean_BD.cpu().numpy(), strict=True):
                rows[i] = vector_D
        return np.stack(rows)

    def _load(self) -> Any:
        disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            line = f"{OPTION}: transformers could not load {self._folder}: {one_line(error)}"
            raise InputError(line) from error
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _vector(value: Any, what: str) -> np.ndarray:
    try:
        vector_D = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        vector_D = np.empty((0, 0), np.float32)
    require(
        vector_D.ndim == 1 and bool(len(vector_D)), f"{what} must be a list of numbers, got {shown(value)}"
    )
    return vector_D
