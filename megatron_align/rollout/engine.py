"""The protocol of generation engines: few functions, the same for a model in this process and for servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import Adapter
from megatron_align.rollout.types import Completion, Prompt, Sampling

UNKNOWN_VERSION = -1
OnToken = Callable[[int, int, int], None]  # index of the prompt in the call, index of the sample, token id


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """The adapter of the live policy, gathered.

    Args:
        adapter: rank, scale and modules.
        tensors: by PEFT's names.
        shape: of the model.
    """

    adapter: Adapter
    tensors: Mapping[str, Tensor]
    shape: ModelShape


class Engine(Protocol):
    """Generates completions with a copy of the model's weights.

    Attributes:
        weight_version: of the weights that it holds; 0: those that it was started with; ``UNKNOWN_VERSION``: an update
            failed.
        shared: the engines of all ranks use the same servers, whose weights one rank updates.
        served: name that requests give to shared servers: of the model, or of the adapter that they have loaded.
        has_own_base: the engine started with the base of an adapter; others receive the base that is trained on.
        context: most tokens of a prompt with its completion.
        tokenizer: of the model.
    """

    weight_version: int
    shared: bool
    served: str
    has_own_base: bool
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

    def refuses_adapter(self, adapter: Adapter) -> str | None:
        """Return why the engine needs merged weights for an adapter; None: it loads the adapter alone."""
        ...

    def holds_base(self, base: object) -> bool:
        """Return whether the engine has the base that this object stands for; see :meth:`update_base`."""
        ...

    def update_base(self, tensors: Iterable[tuple[str, Tensor]], base: object) -> None:
        """Replace the weights by those of an adapter's base; raises as :meth:`update_weights`.

        Args:
            tensors: as of :meth:`update_weights`.
            base: stands for these weights.
        """
        ...

    def update_adapter(self, live: LiveAdapter, version: int) -> None:
        """Replace the adapter, and generate with it and the base from now on.

        Raises:
            InputError: the engine could not load it.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
