"""The types of generation: prompts in, sampling options, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_align.errors import InputError, require

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn; the same names and meaning for every engine.

    Args:
        completions: number of completions of each prompt
        max_tokens: longest completion, in tokens
        temperature: divides the logits; 0: greedy, always the likeliest token
        top_p: draw from the smallest set of tokens whose probability reaches this; 1: all tokens
        top_k: draw from this number of likeliest tokens; 0: all tokens
        stop: texts that end a completion; they are not part of its text
        seed: with the prompt's key, the sample's index and the position, it decides every draw
    """

    completions: int = 1
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 1234

    def __post_init__(self) -> None:
        require(self.completions >= 1, f"completions must be at least 1, got {self.completions}")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be 0 (greedy) or a positive number, got {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 (all tokens) or a positive number, got {self.top_k}")
        require(0 <= self.seed < 2**64, f"seed must be in [0, 2^64), got {self.seed}")
        require(all(self.stop), "a stop text must not be empty")
        if not self.temperature:
            ignored = {
                "top_p": self.top_p != 1.0,
                "top_k": self.top_k != 0,
                "completions": self.completions > 1,
            }
            for name, given in ignored.items():
                require(
                    not given,
                    f"{name} has no effect with temperature 0, which always takes the likeliest token; "
                    f"got {getattr(self, name)}: leave it out, or set a positive temperature",
                )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt.

    Args:
        token_ids: at least one.
        key: selects the prompt's random numbers: its index among all prompts, whichever rank or batch it is in.
        where: ``file:line``, for messages.
    """

    token_ids: Sequence[int]
    key: int = 0
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completion of a prompt.

    Args:
        token_ids: what was generated, with the token that ended it.
        logprobs: log-prob of each token under the full vocabulary at the sampling temperature (greedy: 1), before
            top-p and top-k: what a trainer computes from logits / temperature.
        text: without special tokens, and without the stop text.
        finish_reason: ``stop``: an end token or a stop text; ``length``: max_tokens or the context is reached.
        weight_version: of the weights that it was generated with.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    weight_version: int


def require_fitting(prompts: Sequence[Prompt], context: int, name: str = "prompts") -> None:
    """Check that every prompt leaves room for a token within the model's context.

    Raises:
        InputError: naming the number of prompts that do not fit, and the first.
    """
    long = [prompt for prompt in prompts if len(prompt.token_ids) >= context]
    if long:
        first = long[0]
        raise InputError(
            f"{first.where or f'prompt {first.key}'}: a prompt must be shorter than the model's context of {context} "
            f"tokens, got {len(first.token_ids)}; {len(long)} of {len(prompts)} {name} are too long"
        )
    if empty := next((prompt for prompt in prompts if not len(prompt.token_ids)), None):
        raise InputError(f"{empty.where or f'prompt {empty.key}'}: a prompt must have a token, got none")
