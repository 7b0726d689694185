"""The attention layout of a pack: two intervals of keys per query, and one interval of queries per key.

Shapes: T tokens of a pack; Q queries: all T, or those of one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Intervals of a pack: query ``q`` attends to ``[prefix_start_q, prefix_end_q)`` and ``[own_start_q, own_end_q)``.

    The own interval ends with the query's token, so its position is ``own_end_q - 1``. The same from the keys' side:
    token ``t`` is seen by query rows ``[seen_start_t, seen_end_t)``. All are int32. ``groups`` describes it on the
    host: ``(prompt length, completion lengths)`` in order of position; a plain document is ``(0, (length,))``. Tokens
    after the last group are padding: each sees only itself.

    Create layouts by :meth:`from_lengths` or :meth:`from_groups`, a rank's share of one by :meth:`for_queries`. They
    keep the seven fields consistent.
    """

    prefix_start_Q: Tensor  # the first four never decrease from one query to the next
    prefix_end_Q: Tensor
    own_start_Q: Tensor
    own_end_Q: Tensor
    seen_start_T: Tensor
    seen_end_T: Tensor
    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], total: int | None = None) -> PackedLayout:
        """Lay out causal documents one after the other.

        Args:
            lengths: tokens of each document.
            total: T; tokens after the documents are padding. Default: the sum of lengths.

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
        lengths_by_group = tuple(
            (int(prompt), tuple(map(int, completions))) for prompt, completions in groups
        )
        negative = [
            length
            for prompt, completions in lengths_by_group
            for length in (prompt, *completions)
            if length < 0
        ]
        if negative:
            raise ValueError(f"PackedLayout needs lengths >= 0; got {negative[0]}")
        used = sum(prompt + sum(completions) for prompt, completions in lengths_by_group)
        total = used if total is None else total
        if used > total:
            raise ValueError(f"PackedLayout needs total >= the sum of lengths; got total {total}, sum {used}")
        # Runs of tokens with equal intervals: length, prefix_start, prefix_end, own_start, seen_end.
        runs: list[tuple[int, int, int, int, int]] = []
        start = 0
        for prompt, completions in lengths_by_group:
            own = start + prompt
            runs.append((prompt, start, start, start, own + sum(completions)))
            for length in completions:
                runs.append((length, start, start + prompt, own, own + length))
                own += length
            start = own
        lengths, *columns = torch.tensor(runs, dtype=torch.int64).reshape(-1, 5).T
        tail = torch.arange(used, total)
        tails = (tail, tail, tail, tail + 1)
        prefix_start, prefix_end, own_start, seen_end = (
            torch.cat([torch.repeat_interleave(column, lengths), padding]).to(torch.int32)
            for column, padding in zip(columns, tails, strict=True)
        )
        token = torch.arange(total, dtype=torch.int32)
        return cls(prefix_start, prefix_end, own_start, token + 1, token, seen_end, lengths_by_group)

    def for_queries(self, positions_Q: Tensor) -> PackedLayout:
        """Return the layout of some of the queries over the keys of all T tokens: a context-parallel rank's share.

        Args:
            positions_Q: positions of the queries in the pack, ascending; row ``q`` of the new layout is the query at
                ``positions_Q[q]``. On the layout's device.

        Raises:
            ValueError: if positions do not ascend within ``[0, T)``, or the layout is a share already.
        """
        if not self.covers_all_queries:
            raise ValueError(
                f"for_queries needs the layout of an entire pack; got one for {self.queries} of {self.tokens} queries"
            )
        before, after = (positions_Q.new_tensor([x]) for x in (-1, self.tokens))
        wrong = torch.cat([before, positions_Q, after]).diff().le(0).nonzero()
        if len(wrong):
            row = min(int(wrong[0]), len(positions_Q) - 1)
            raise ValueError(
                f"for_queries needs positions that ascend within [0, {self.tokens}); "
                f"got {positions_Q[row]} in row {row}"
            )
        rows = [x[positions_Q] for x in self.by_query]
        # Queries that see a key are neighbours in the pack, and remain neighbours among ascending positions.
        seen = [torch.searchsorted(positions_Q, x.to(positions_Q.dtype)).to(torch.int32) for x in self.by_key]
        return self._with_intervals(rows + seen)

    @property
    def tokens(self) -> int:
        """T: tokens of the pack, padding included: the keys."""
        return self.seen_end_T.shape[0]

    @property
    def queries(self) -> int:
        """Q: number of queries; T unless the layout comes from :meth:`for_queries`."""
        return self.own_end_Q.shape[0]

    @property
    def covers_all_queries(self) -> bool:
        """Whether every token is a query; then a query's row is its position."""
        return self.queries == self.tokens

    @property
    def by_query(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The intervals of keys that each query sees: four tensors ``[Q]`` in the order of the fields."""
        return self.prefix_start_Q, self.prefix_end_Q, self.own_start_Q, self.own_end_Q

    @property
    def by_key(self) -> tuple[Tensor, Tensor]:
        """The interval of queries that see each key: two tensors ``[T]`` in the order of the fields."""
        return self.seen_start_T, self.seen_end_T

    @property
    def intervals(self) -> tuple[Tensor, ...]:
        """All six tensors, in the order of the fields."""
        return *self.by_query, *self.by_key

    def to(self, device: torch.device | str) -> PackedLayout:
        """Return the layout with its intervals on ``device``."""
        return self.changed(lambda x: x.to(device, non_blocking=True))

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedLayout:
        """Return the layout with each of its intervals changed, in the order of the fields."""
        return self._with_intervals(map(change, self.intervals))

    def _with_intervals(self, intervals: Iterable[Tensor]) -> PackedLayout:
        """Return a layout of the same groups with six other tensors, in the order of the fields."""
        prefix_start, prefix_end, own_start, own_end, seen_start, seen_end = intervals
        return PackedLayout(prefix_start, prefix_end, own_start, own_end, seen_start, seen_end, self.groups)

    def mask_QT(self) -> Tensor:
        """Return the dense boolean mask ``[Q query, T key]``, for references and pictures only."""
        key = torch.arange(self.tokens, device=self.seen_end_T.device)
        prefix = (self.prefix_start_Q[:, None] <= key) & (key < self.prefix_end_Q[:, None])
        own = (self.own_start_Q[:, None] <= key) & (key < self.own_end_Q[:, None])
        return prefix | own
