"""Swap samples between groups until the heaviest group is light enough: evens out what a greedy assignment leaves.

Integers only, ties to the lower index: every rank makes the same swaps.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# samples of a group that are tried, evenly over its weights: bounds the time where groups are large
CANDIDATES = 64
MAX_PAIRS = 100  # pairs of groups that are tried; some milliseconds
GOOD_ENOUGH = 8  # a swap that takes off this fraction (1/8) of the difference of two groups ends the search


class Groups:
    """Groups of samples, each with a weight to be levelled, and a size that stays within a limit.

    Args:
        members: of every group, indices into the samples; changed in place.
        weights_B: of each sample.
        sizes_B: of each sample.
        limit: size that no group exceeds.
    """

    def __init__(
        self, members: list[list[int]], weights_B: np.ndarray, sizes_B: np.ndarray, limit: int
    ) -> None:
        self.members, self.limit = members, limit
        self._weights, self._sizes = (np.append(x, 0) for x in (weights_B, sizes_B))
        self._nothing = len(weights_B)  # in exchange for a sample: it is moved
        self.weight = [int(self._weights[group].sum()) for group in members]
        self.size = [int(self._sizes[group].sum()) for group in members]

    def lighten(self, goal: int) -> bool:
        """Swap a sample of the heaviest group for one of a lighter group, or for nothing, while that helps.

        Returns:
            Whether no group weighs more than ``goal``.
        """
        pairs = MAX_PAIRS
        while max(self.weight) > goal:
            heavy = self.weight.index(max(self.weight))
            best = (0, heavy, 0, 0)
            for swap in self._swaps(heavy):
                pairs -= 1
                best = max(best, swap, key=lambda swap: swap[0])
                if pairs == 0 or best[0] * GOOD_ENOUGH >= self.weight[heavy] - self.weight[swap[1]]:
                    break
            if pairs == 0 or best[0] == 0:
                return False
            self._swap(heavy, *best[1:])
        return True

    def _swaps(self, heavy: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield ``(gain, lighter group, sample out, sample in)``: the best swap with each, the lightest first."""
        out = self._candidates(heavy)
        for light in sorted(range(len(self.members)), key=lambda g: (self.weight[g], g)):
            gap = self.weight[heavy] - self.weight[light]
            if gap <= 0:
                return
            back = [*self._candidates(light), self._nothing]
            moved = self._sizes[out][:, None] - self._sizes[back]
            fits = (self.size[light] + moved <= self.limit) & (self.size[heavy] - moved <= self.limit)
            # the heavier of both is the lightest where their difference is the least
            left = np.abs(gap - 2 * (self._weights[out][:, None] - self._weights[back]))
            left = np.where(fits, left, gap)
            at = int(left.argmin())
            a, b = out[at // len(back)], back[at % len(back)]
            yield (gap - int(left.flat[at])) // 2, light, a, b

    def _candidates(self, group: int) -> list[int]:
        members = sorted(self.members[group], key=lambda i: (-self._weights[i], i))
        return members[:: -(-len(members) // CANDIDATES) or 1]

    def _swap(self, heavy: int, light: int, out: int, back: int) -> None:
        for group, leaving, entering in ((heavy, out, back), (light, back, out)):
            self.members[group] = [i for i in self.members[group] if i != leaving]
            self.members[group] += [entering] if entering != self._nothing else []
            self.weight[group] += int(self._weights[entering] - self._weights[leaving])
            self.size[group] += int(self._sizes[entering] - self._sizes[leaving])
