"""The protocol of generation engines: few functions, the same for a model in this process and for servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_align.rollout.types import Completion, Prompt, Sampling

UNKNOWN_VERSION = -1
OnToken = Callable[[int, int, int], None]  # index of the prompt in the call, index of the sample, token id


class Engine(Protocol):
    """Generates completions with a copy of the model's weights.

    Attributes:
        weight_version: of the weights that it holds; 0: those that it was started with; ``UNKNOWN_VERSION``: an update
            failed.
        shared: the engines of all ranks use the same servers, whose weights one rank updates.
        context: most tokens of a prompt with its completion.
        tokenizer: of the model.
    """

    weight_version: int
    shared: bool
    context: int
    tokenizer: PreTrainedTokenizerBase

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[Completion]]:
        """Return ``sampling.completions`` completions of each prompt, in order.

        Args:
            prompts: tokenised, each with the key of its random numbers.
            sampling: how tokens are drawn.
            on_token: called with every token as it is drawn, where the engine can.

        Raises:
            InputError: a prompt does not fit into the model's context.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by the tensors of a Hugging Face model, given by name one after the other.

        Raises:
            InputError: a tensor is missing, unknown or of another shape.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
