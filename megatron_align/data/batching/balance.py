"""Samples change places between groups until the heaviest group is light enough: what a greedy deal leaves over.

Whole numbers only, ties to the lower index: every rank finds the same swaps.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CANDIDATES = 64  # of a group, evenly over its weights: bounds the time where groups are large
LOOKS = 100  # at pairs of groups; some milliseconds
ENOUGH = 8  # a swap that takes off this part of the difference of two groups is good enough to stop looking


class Groups:
    """Groups of samples, each with a weight to be levelled, and a size that stays within a limit.

    Args:
        members: of every group, positions into the samples; changed in place.
        weights_B: of each sample.
        sizes_B: of each sample.
        most: size that no group goes above.
    """

    def __init__(
        self, members: list[list[int]], weights_B: np.ndarray, sizes_B: np.ndarray, most: int
    ) -> None:
        self.members, self.most = members, most
        self._weights, self._sizes = (np.append(x, 0) for x in (weights_B, sizes_B))
        self._nothing = len(weights_B)  # in exchange for a sample: it is moved
        self.weight = [int(self._weights[group].sum()) for group in members]
        self.size = [int(self._sizes[group].sum()) for group in members]

    def lighten(self, goal: int) -> bool:
        """Swap a sample of the heaviest group for one of a lighter group, or for nothing, while that helps.

        Returns:
            Whether no group weighs more than ``goal``.
        """
        looks = LOOKS
        while max(self.weight) > goal:
            heavy = self.weight.index(max(self.weight))
            best = (0, heavy, 0, 0)
            for swap in self._swaps(heavy):
                looks -= 1
                best = max(best, swap, key=lambda swap: swap[0])
                if looks == 0 or best[0] * ENOUGH >= self.weight[heavy] - self.weight[swap[1]]:
                    break
            if looks == 0 or best[0] == 0:
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
            fits = (self.size[light] + moved <= self.most) & (self.size[heavy] - moved <= self.most)
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
        for group, gone, come in ((heavy, out, back), (light, back, out)):
            self.members[group] = [i for i in self.members[group] if i != gone]
            self.members[group] += [come] if come != self._nothing else []
            self.weight[group] += int(self._weights[come] - self._weights[gone])
            self.size[group] += int(self._sizes[come] - self._sizes[gone])
