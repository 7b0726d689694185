"""The prompts of an online run, as training data whose completions do not exist yet.

Where the run plans (steps, layout, memory, self-check) a prompt counts with the longest completions it may get.

Shapes: S prompts, L tokens of one sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.config import DataConfig, DataSource
from megatron_align.config.rollout import RolloutConfig
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.template_clock import parse_date
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.data.tokenize.turn_options import TurnOptions
from megatron_align.errors import InputError, require
from megatron_align.records import Conversation, Sample
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer, prompt_record

USUAL_COMPLETIONS = 3
KIND = "prompt"


class PromptTable:
    """A :class:`.SampleTable` of prompts, each with its planned completions.

    Args:
        records: the prompts.
        token_ids: of each prompt.
        sources: int32[S], index of each prompt's source.
        completions: of each prompt.
        max_tokens: of a completion.
        described: further entries of the manifest.

    Attributes:
        records: the prompts.
        manifest: counts and inputs, as those of a :class:`.TokenStore`.
        path: its name is a hash of the prompts; there is no such file.
    """

    kind = KIND

    def __init__(
        self,
        records: Sequence[PromptRecord],
        token_ids: Sequence[Sequence[int]],
        sources: np.ndarray,
        completions: int,
        max_tokens: int,
        described: Mapping[str, Any],
    ):
        self.records, self.token_ids = records, [np.asarray(ids, np.int32) for ids in token_ids]
        self.completions, self.max_tokens = completions, max_tokens
        count = len(records)
        self.prompt_lengths = np.array([len(ids) for ids in self.token_ids], np.int64)
        self.completion_counts = np.full(count, completions, np.int64)
        self.completion_offsets = np.arange(count + 1, dtype=np.int64) * completions
        self.completion_lengths = np.full(count * completions, max_tokens, np.int64)
        self.completion_scored = self.completion_lengths
        self.lengths = self.prompt_lengths + completions * max_tokens
        self.duplicated_lengths = self.lengths + (completions - 1) * self.prompt_lengths
        self.scored_counts = np.full(count, completions * max_tokens, np.int64)
        self.weights = np.ones(count)
        self.sources = np.asarray(sources, np.int32)
        self.completion_columns: dict[str, np.ndarray] = {}
        self.row_columns: dict[str, np.ndarray] = {}
        self.path = Path(f"prompts_{self._digest()}")
        self.manifest: dict[str, Any] = {
            "kind": KIND,
            "shapes": [KIND],
            "samples": count,
            "tokens": int(self.prompt_lengths.sum()),
            "scored_tokens": 0,
            "truncated": 0,
            "largest_token": max(int(ids.max()) for ids in self.token_ids),
            **described,
        }

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, i: int) -> Sample:
        """Return prompt ``i`` with completions of the greatest length, made of its own tokens."""
        prompt_L = self.token_ids[i]
        planned_L = np.resize(prompt_L, self.completions * self.max_tokens)
        scored_L = np.arange(len(prompt_L) + len(planned_L)) >= len(prompt_L)
        return Sample(
            np.concatenate([prompt_L, planned_L]),
            scored_L,
            prompt_length=len(prompt_L),
            completion_lengths=(self.max_tokens,) * self.completions,
        )

    def last_tokens(self) -> list[int]:
        """See :meth:`.TokenStore.last_tokens`; completions do not exist yet."""
        return []

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for record, ids in zip(self.records, self.token_ids, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
            digest.update(json.dumps(record.raw, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]


def open_prompts(data: DataConfig, rollout: RolloutConfig, tokenizer: str) -> PromptTable:
    """Read and tokenise the prompts of ``data.train``.

    Args:
        data: the section ``data``.
        rollout: the section ``rollout``.
        tokenizer: Hugging Face folder.

    Raises:
        InputError: a malformed or too long prompt, named by file and line, or none at all.
    """
    require(
        data.shape in (None, KIND),
        f"data.shape must be null or {KIND} where completions are generated, got {data.shape}",
    )
    reader = _Reader(data, rollout, tokenizer)
    given = data.train
    sources = [given] if isinstance(given, str) else given
    for index, source in enumerate(sources):
        reader.read(source.path if isinstance(source, DataSource) else source, index)
    return reader.table()


class _Reader:
    """Reads the sources one after the other."""

    def __init__(self, data: DataConfig, rollout: RolloutConfig, tokenizer: str):
        self._data, self._rollout = data, rollout
        now = parse_date(data.template_date) if data.template_date else None
        template = load_chat_template(data.chat_template) if data.chat_template else None
        self._tokenizer = PromptTokenizer(load_tokenizer(tokenizer), template, now)
        self._turns = TurnOptions(now, drop_fields=tuple(data.drop_fields))
        self._completions = rollout.completions or USUAL_COMPLETIONS
        self._records: list[PromptRecord] = []
        self._ids: list[list[int]] = []
        self._of_source: list[int] = []
        self._paths: list[str] = []
        self._dropped = self._skipped = 0
        self._fields: dict[str, None] = {}

    def read(self, path: str, source: int) -> None:
        self._paths.append(path)
        for file in expand(path):
            for where, raw in read_fields(file, self._data.columns):
                try:
                    if isinstance(raw, InputError):
                        raise raw
                    record = self._without_fields(prompt_record(raw, where, self._rollout.as_chat))
                    ids = self._tokenizer.continued(record, "")
                except InputError:
                    if self._data.on_bad_record == "error":
                        raise
                    self._skipped += 1
                    continue
                self._fields |= dict.fromkeys(raw)
                if self._fits(ids, where):
                    self._records.append(record)
                    self._ids.append(ids)
                    self._of_source.append(source)

    def table(self) -> PromptTable:
        require(
            bool(self._records),
            f"{', '.join(self._paths)}: must hold at least one prompt within data.sequence_length, got none "
            f"({self._dropped} too long, {self._skipped} malformed)",
        )
        sources = np.array(self._of_source, np.int32)
        counts = np.bincount(sources, minlength=len(self._paths)).tolist()
        described = {
            "dropped": self._dropped,
            "skipped": self._skipped,
            "fields": {"used": list(self._fields), "left": []},
            "sources": [
                {"path": path, "samples": count} for path, count in zip(self._paths, counts, strict=True)
            ],
        }
        return PromptTable(
            self._records, self._ids, sources, self._completions, self._rollout.max_tokens, described
        )

    def _without_fields(self, record: PromptRecord) -> PromptRecord:
        if isinstance(record.prompt, str) or not self._data.drop_fields:
            return record
        turns = self._turns.applied(Conversation(record.prompt, record.where, record.tools))
        assert isinstance(turns, Conversation), "it was one"
        return replace(record, prompt=turns.messages, tools=turns.tools)

    def _fits(self, ids: Sequence[int], where: str) -> bool:
        """Return whether a prompt with its longest completions fits into a pack."""
        prompts = 1 if self._data.share_prefix else self._completions
        longest = prompts * len(ids) + self._completions * self._rollout.max_tokens
        if longest <= self._data.sequence_length:
            return True
        if self._data.too_long == "drop":
            self._dropped += 1
            return False
        raise InputError(
            f"{where}: a prompt of {len(ids)} tokens with {self._completions} completions of up to "
            f"rollout.max_tokens = {self._rollout.max_tokens} takes {longest} tokens, more than data.sequence_length = "
            f"{self._data.sequence_length}: raise it, generate less, or set data.too_long: drop"
        )
