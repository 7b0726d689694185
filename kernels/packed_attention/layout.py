"""Who attends to whom in a pack: two intervals of keys per query, one interval of queries per key.

Shapes: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Token ``t`` attends to ``[prefix_start_t, prefix_end_t)`` and ``[own_start_t, t]``.

    ``seen_end`` says the same from the key's side: the queries that see token ``t`` are ``[t, seen_end_t)``.
    ``groups`` is the same on the host: ``(prompt length, completion lengths)`` in order of position; a
    plain document is ``(0, (length,))``. Tokens after the last group are padding: each sees only itself.
    Make layouts with :meth:`from_lengths` or :meth:`from_groups`, which keep the five in step.
    """

    prefix_start_T: Tensor  # int32, as the next three; none of the first three ever falls from t to t + 1
    prefix_end_T: Tensor
    own_start_T: Tensor
    seen_end_T: Tensor
    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], total: int | None = None) -> PackedLayout:
        """Lay out causal documents one after the other.

        Args:
            lengths: tokens of each document.
            total: T; what the documents leave of it is padding. Default: their sum.

        Raises:
            ValueError: on a negative length, or documents longer than ``total``.
        """
        return cls.from_groups([(0, [length]) for length in lengths], total)

    @classmethod
    def from_groups(
        cls, groups: Sequence[tuple[int, Sequence[int]]], total: int | None = None
    ) -> PackedLayout:
        """Lay out ``prompt | completion | completion ...``, the prompt stored once per group.

        Args:
            groups: ``(prompt length, [completion lengths])`` of each group.
            total: T, as in :meth:`from_lengths`.

        Raises:
            ValueError: as :meth:`from_lengths`.
        """
        kept = tuple((int(prompt), tuple(int(c) for c in completions)) for prompt, completions in groups)
        negative = [length for prompt, completions in kept for length in (prompt, *completions) if length < 0]
        if negative:
            raise ValueError(f"PackedLayout needs lengths >= 0; got {negative[0]}")
        used = sum(prompt + sum(completions) for prompt, completions in kept)
        total = used if total is None else total
        if used > total:
            raise ValueError(f"PackedLayout needs total >= the sum of lengths; got total {total}, sum {used}")
        # One run of tokens shares all four values: length, prefix_start, prefix_end, own_start, seen_end.
        runs: list[tuple[int, int, int, int, int]] = []
        start = 0
        for prompt, completions in kept:
            own = start + prompt
            runs.append((prompt, start, start, start, own + sum(completions)))
            for length in completions:
                runs.append((length, start, start + prompt, own, own + length))
                own += length
            start = own
        lengths, *columns = torch.tensor(runs, dtype=torch.int64).reshape(-1, 5).T
        tail = torch.arange(used, total)
        tails = (tail, tail, tail, tail + 1)
        return cls(
            *(
                torch.cat([torch.repeat_interleave(column, lengths), padding]).to(torch.int32)
                for column, padding in zip(columns, tails, strict=True)
            ),
            groups=kept,
        )

    @property
    def tokens(self) -> int:
        """T: tokens the layout covers, padding included."""
        return self.own_start_T.shape[0]

    @property
    def intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors ``[T]``, in the order of the fields."""
        return self.prefix_start_T, self.prefix_end_T, self.own_start_T, self.seen_end_T

    def to(self, device: torch.device | str) -> PackedLayout:
        """Return the layout with its intervals on ``device``."""
        return PackedLayout(*(x.to(device, non_blocking=True) for x in self.intervals), groups=self.groups)

    def mask_TT(self) -> Tensor:
        """Return the dense boolean mask ``[T query, T key]``: for references and pictures only."""
        key = torch.arange(self.tokens, device=self.own_start_T.device)
        query = key[:, None]
        prefix = (self.prefix_start_T[:, None] <= key) & (key < self.prefix_end_T[:, None])
        own = (self.own_start_T[:, None] <= key) & (key <= query)
        return prefix | own
