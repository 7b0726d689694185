"""The rows that are being generated: when each is finished, and the text it makes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_align.rollout.types import Completion, FinishReason, Sampling

_MARGIN = 8  # tokens more than a stop text can take: the first ones of a window may decode differently


@dataclass(slots=True)
class Row:
    """One completion in progress.

    Args:
        prompt: index of its prompt in the call.
        sample: its index among the prompt's completions.
        uniforms: random number of each position; empty when greedy.
        limit: most tokens that it may get.
    """

    prompt: int
    sample: int
    uniforms: np.ndarray
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def uniform(self) -> float:
        """Return the random number of the next position."""
        return float(self.uniforms[len(self.token_ids)]) if len(self.uniforms) else 0.0


class Decoder:
    """Decides when rows end, and turns them into completions.

    Args:
        tokenizer: of the model.
        end_ids: tokens that end a completion.
        sampling: its stop texts are read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int], sampling: Sampling
    ) -> None:
        self._tokenizer, self._end_ids, self._stop = tokenizer, end_ids, sampling.stop
        self._window = max((len(stop.encode()) for stop in sampling.stop), default=0) + _MARGIN

    def add(self, row: Row, token: int, logprob: float) -> None:
        """Append a token, and note whether it ends the row."""
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        if token in self._end_ids or self._stop_in(self._decode(row.token_ids[-self._window :])) is not None:
            row.finish_reason = "stop"
        elif len(row.token_ids) >= row.limit:
            row.finish_reason = "length"

    def completion(self, row: Row, version: int) -> Completion:
        """Return a finished row as a completion."""
        assert row.finish_reason is not None, "the row is finished"
        text = self._tokenizer.decode(row.token_ids, skip_special_tokens=True)
        if row.token_ids[-1] not in self._end_ids and (at := self._stop_in(text)) is not None:
            text = text[:at]
        return Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            text=text,
            finish_reason=row.finish_reason,
            weight_version=version,
        )

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True) if self._stop else ""

    def _stop_in(self, text: str) -> int | None:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)
