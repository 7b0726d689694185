"""Near duplicates among prompts, by their shingles or by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_align.curation.clusters import LayeredClusters
from megatron_align.curation.embeddings import Embed, open_embeddings
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.data.near_duplicates import NearDuplicates

EMBEDDED_TOKENS = 512  # of a prompt that a model embeds


class Duplicates(Protocol):
    """Finds near duplicates among prompts that are given in their order, some at a time."""

    def of(self, prompts: Sequence[RawPrompt]) -> list[str | None]:
        """Return for each prompt the place of an earlier, distinct one that it duplicates; None: it is distinct."""
        ...


class ShingleDuplicates:
    """Near duplicates by the Jaccard similarity of shingles, see :class:`.NearDuplicates`.

    Args:
        threshold: similarity from which two prompts are near duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self._near = NearDuplicates(threshold)

    def of(self, prompts: Sequence[RawPrompt]) -> list[str | None]:
        """See :meth:`.Duplicates.of`."""
        return [self._near.add(prompt.where, prompt.text) for prompt in prompts]


class EmbeddedDuplicates:
    """Near duplicates by the cosine of embeddings: exact, compared with every distinct prompt.

    Args:
        embed: of prompts.
        threshold: cosine from which two prompts are near duplicates.
    """

    def __init__(self, embed: Embed, threshold: float) -> None:
        self._embed, self._clusters = embed, LayeredClusters((threshold,))
        self._leaders: list[str] = []

    def of(self, prompts: Sequence[RawPrompt]) -> list[str | None]:
        """See :meth:`.Duplicates.of`."""
        found: list[str | None] = []
        for prompt, vector_D in zip(prompts, self._embed(prompts), strict=True):
            (number,) = self._clusters.add(vector_D)
            is_new = number == len(self._leaders)
            if is_new:
                self._leaders.append(prompt.where)
            found.append(None if is_new else self._leaders[number])
        return found


def open_duplicates(embeddings: str | None, threshold: float) -> Duplicates:
    """Return what finds near duplicates.

    Args:
        embeddings: as of :func:`.open_embeddings`; None: shingles are compared.
        threshold: of the cosine, or of the shingles' Jaccard similarity.

    Raises:
        InputError: there is no such function or model, datasketch is not installed, or a threshold is not in (0, 1].
    """
    if embeddings is None:
        return ShingleDuplicates(threshold)
    return EmbeddedDuplicates(open_embeddings(embeddings, EMBEDDED_TOKENS), threshold)
