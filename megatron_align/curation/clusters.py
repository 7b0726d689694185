"""Cluster embeddings in layers of increasing similarity, as they come: coarse clusters hold finer ones.

A vector joins the most similar leader of a layer if their cosine reaches the layer's threshold, or becomes a leader;
the next layer divides the cluster that it is in. One pass, in the order of the data; memory is the leaders' vectors.
The report (section 3) clusters coarsely, then finely, with increasing thresholds; it does not name the algorithm.

Shapes: K leaders, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_align.errors import require


class LayeredClusters:
    """Assigns vectors to clusters within clusters.

    Args:
        thresholds: cosine of each layer, increasing, in (0, 1].

    Raises:
        InputError: the thresholds do not increase, or one is not in (0, 1].
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        require(bool(thresholds), "layers must name at least one threshold, got none")
        ordered = all(one < other for one, other in zip(thresholds, thresholds[1:], strict=False))
        require(
            ordered and thresholds[0] > 0 and thresholds[-1] <= 1,
            f"layers must be increasing cosines in (0, 1], got {', '.join(f'{t:g}' for t in thresholds)}",
        )
        self._thresholds = tuple(thresholds)
        self._root = _Cluster()
        self.counts = [0] * len(thresholds)  # clusters of each layer

    def add(self, vector_D: np.ndarray) -> tuple[int, ...]:
        """Return the cluster of a vector: its number in each layer, within the cluster of the layer before.

        Raises:
            InputError: it has no direction (its norm is 0 or not finite).
        """
        norm = float(np.linalg.norm(vector_D.astype(np.float64)))
        require(0 < norm < float("inf"), f"an embedding must have a direction, got one of norm {norm:g}")
        unit_D = (vector_D / norm).astype(np.float32)
        cluster, path = self._root, []
        for layer, threshold in enumerate(self._thresholds):
            place = cluster.nearest(unit_D, threshold)
            if place is None:
                place = cluster.lead(unit_D)
                self.counts[layer] += 1
            path.append(place)
            cluster = cluster.children[place]
        return tuple(path)


class _Cluster:
    """The leaders within a cluster, and the clusters that they lead."""

    def __init__(self) -> None:
        self._leaders_KD = np.empty((0, 0), np.float32)
        self.children: list[_Cluster] = []

    def nearest(self, unit_D: np.ndarray, threshold: float) -> int | None:
        """Return the number of the most similar leader; None: none reaches the threshold (up to fp32 rounding)."""
        if not self.children:
            return None
        cosines_K = self._leaders_KD[: len(self.children)] @ unit_D
        best = int(cosines_K.argmax())
        return best if cosines_K[best] >= threshold - 1e-6 else None

    def lead(self, unit_D: np.ndarray) -> int:
        """Make a vector a leader, and return its number."""
        count = len(self.children)
        if count == len(self._leaders_KD):  # twice the room
            grown_KD = np.empty((max(1, 2 * count), len(unit_D)), np.float32)
            grown_KD[:count] = self._leaders_KD[:count] if count else 0
            self._leaders_KD = grown_KD
        self._leaders_KD[count] = unit_D
        self.children.append(_Cluster())
        return count
