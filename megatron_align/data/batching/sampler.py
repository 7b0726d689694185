"""Sampler: which samples make step s, a pure function of (seed, epoch, index), the same on every rank and layout.

An epoch is the union of the contributions of each source of the mixture. Epochs follow each other without a gap, and a
step is the next piece of that stream: a fixed number of samples, or as many as fit into a fixed number of tokens.

Shapes: S samples of the data set, N samples of one epoch, B samples of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Protocol

import numpy as np

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.sample_table import SampleTable


class StepOrder(Protocol):
    """Which samples make each step of a run.

    Attributes:
        steps: number of steps of the run.
    """

    @property
    def steps(self) -> int: ...

    def samples(self, step: int) -> np.ndarray:
        """Return the indices (int64) of the samples of a 0-based step, in order."""
        ...

    def size(self, step: int) -> int:
        """Return the number of samples of a 0-based step."""
        ...


Sources = str | Sequence[str | DataSource]


def passes_per_epoch(sources: Sources) -> tuple[float, ...]:
    """Return the weight of each source of ``data.train`` or ``data.validation``, in order."""
    listed = [sources] if isinstance(sources, str) else sources
    return tuple(source.weight if isinstance(source, DataSource) else 1.0 for source in listed)


def step_order(
    table: SampleTable, data: DataConfig, train: TrainConfig, sources: Sources
) -> SampleSteps | TokenSteps:
    """Return which samples of a table make each step of a run; the same on any layout.

    Args:
        table: tokenised samples.
        data: shuffle is read.
        train: global_batch_size or global_batch_tokens, seed, steps and epochs are read.
        sources: the sources of the table, with the weights of the mixture: ``data.train`` or
            ``data.validation``.
    """
    order = EpochOrder(table.sources, passes_per_epoch(sources), train.seed, data.shuffle)
    if train.global_batch_tokens is not None:
        return TokenSteps(order, table.lengths, train.global_batch_tokens, train.epochs, train.steps)
    assert train.global_batch_size is not None, "a run has one of the two"
    return SampleSteps(order, train.global_batch_size, train.epochs, train.steps)


class EpochOrder:
    """The samples of every epoch, in order.

    A source of n samples and weight w repeats its samples in one fixed order, and epoch e
    takes the range from ceil(e w n) to ceil((e + 1) w n): each sample floor(w) or ceil(w) times, and after
    any number E of epochs each sample floor(E w) or ceil(E w) times. With ``shuffle`` that fixed order and then
    the whole epoch are permuted; without, they are the order of the files, source after source.

    Args:
        sources_S: index of each sample's source.
        passes: weight of each source, as :func:`passes_per_epoch` returns it.
        seed: of the permutations.
        shuffle: False: file order.

    Raises:
        ValueError: if there are no samples, a weight is not positive, or a source has no weight.
    """

    def __init__(self, sources_S: np.ndarray, passes: Sequence[float], seed: int = 0, shuffle: bool = True):
        self.total, self.seed, self.shuffle = len(sources_S), seed, shuffle
        if not self.total or min(passes, default=0) <= 0 or int(np.max(sources_S)) >= len(passes):
            raise ValueError(
                f"EpochOrder needs samples and a positive weight for each source; got {self.total} samples of "
                f"sources up to {np.max(sources_S, initial=-1)}, weights {list(passes)}"
            )
        # A weight means what was written: 0.1 is one tenth, not the binary number next to it.
        self._passes = [Fraction(str(float(weight))) for weight in passes]
        counts = np.bincount(sources_S, minlength=len(passes))
        self._shares = [weight * int(n) for weight, n in zip(self._passes, counts, strict=True)]
        self._members: list[np.ndarray] = []
        if not self._once_each:
            self._members = [self._rotation(np.asarray(sources_S), k) for k in range(len(passes))]
        self._cached: tuple[int, np.ndarray] | None = None

    def start(self, epoch: int) -> int:
        """Return how many samples come before an epoch."""
        return sum(ceil(epoch * share) for share in self._shares)

    def samples(self, epoch: int) -> np.ndarray:
        """Return the indices (int64) of an epoch's samples, in order; a sample may come several times."""
        cached = self._cached
        if cached is None or cached[0] != epoch:
            cached = self._cached = (epoch, self._order(epoch))
        return cached[1]

    def between(self, begin: int, end: int) -> np.ndarray:
        """Return the samples (int64) from index ``begin`` up to ``end`` of the endless stream of epochs."""
        pieces = []
        while begin < end:
            # Not simply the next one: with a small weight most epochs have no sample.
            epoch = self.epoch_of(begin)
            start = self.start(epoch)
            pieces.append(self.samples(epoch)[begin - start : end - start])
            begin = start + len(self.samples(epoch))
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def epoch_of(self, index: int) -> int:
        """Return the epoch that has sample ``index`` of the endless stream."""
        total = sum(self._shares)
        # start(first) <= index < start(after), as e total <= start(e) < e total + number of sources
        first, after = max(0, int((index - len(self._shares)) / total)), int(index / total) + 1
        while after - first > 1:
            middle = (first + after) // 2
            first, after = (middle, after) if self.start(middle) <= index else (first, middle)
        return first

    @property
    def _once_each(self) -> bool:
        return all(weight == 1 for weight in self._passes)

    def _order(self, epoch: int) -> np.ndarray:
        if self._once_each:
            members_N = np.arange(self.total, dtype=np.int64)
        else:
            members_N = np.concatenate(
                [
                    np.take(rotation, np.arange(ceil(epoch * share), ceil((epoch + 1) * share)), mode="wrap")
                    for rotation, share in zip(self._members, self._shares, strict=True)
                    if len(rotation)
                ]
            )
        if not self.shuffle:
            return members_N
        return np.sort(members_N)[_permutation((self.seed, epoch), len(members_N))]

    def _rotation(self, sources_S: np.ndarray, source: int) -> np.ndarray:
        members = np.flatnonzero(sources_S == source).astype(np.int64)
        # Three seed words: never the same stream as an epoch's two.
        return members[_permutation((self.seed, source, 1), len(members))] if self.shuffle else members


@lru_cache(maxsize=4)
def _permutation(words: tuple[int, ...], total: int) -> np.ndarray:
    """Sort raw random words: unlike a library's shuffle, they never change, as the generator's name defines them."""
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(total)
    order = np.argsort(raw, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


class SampleSteps:
    """Steps of ``batch`` samples each; the last one of a run over ``epochs`` takes the rest.

    Args:
        order: the stream of samples.
        batch: samples of a step.
        epochs: of the run; None: the stream has no end.
        steps: of the run; None: as many as the epochs have.
    """

    def __init__(self, order: EpochOrder, batch: int, epochs: int | None = None, steps: int | None = None):
        self.order, self.batch = order, batch
        self._end = None if epochs is None else order.start(epochs)
        self._last = None if self._end is None else -(-self._end // batch)
        self._steps = steps or self._last

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        assert self._steps is not None, "neither steps nor epochs were given"
        return self._steps

    def samples(self, step: int) -> np.ndarray:
        """Return the indices (int64) of the samples of a 0-based step, in order.

        Raises:
            ValueError: if the step is outside of the run.
        """
        return self.order.between(*self._bounds(step))

    def size(self, step: int) -> int:
        """Return the number of samples of a 0-based step."""
        begin, end = self._bounds(step)
        return end - begin

    def _bounds(self, step: int) -> tuple[int, int]:
        """Return where a step begins and ends in the stream."""
        _require_step(step, self._last)
        end = (step + 1) * self.batch
        return step * self.batch, end if self._end is None else min(end, self._end)


class TokenSteps:
    """Steps of as many samples, in order, as fit into ``tokens``; at least one.

    A sample counts with its stored tokens, a shared prompt once: neither the layout nor ``data.share_prefix``
    nor packing can move the boundaries. They are computed epoch by epoch, when needed, from the lengths alone.

    Args:
        order: the stream of samples.
        lengths_S: stored tokens of each sample.
        tokens: of a step.
        epochs: of the run; None: the stream has no end.
        steps: of the run; None: as many as the epochs have.
    """

    def __init__(
        self,
        order: EpochOrder,
        lengths_S: np.ndarray,
        tokens: int,
        epochs: int | None = None,
        steps: int | None = None,
    ):
        self.order, self.lengths_S, self.tokens = order, lengths_S, tokens
        self._epochs = epochs
        self._starts: list[int] = [0]  # index in the stream where each step computed so far begins
        self._read = 0  # epochs whose boundaries are computed
        self._open = 0  # tokens of the last step up to the end of those epochs
        while epochs is not None and self._read < epochs:
            self._read_epoch()
        self._last = None if epochs is None else len(self._starts)
        self._steps = steps or self._last

    @property
    def steps(self) -> int:
        """As :attr:`SampleSteps.steps`."""
        assert self._steps is not None, "neither steps nor epochs were given"
        return self._steps

    def samples(self, step: int) -> np.ndarray:
        """As :meth:`SampleSteps.samples`."""
        return self.order.between(*self._bounds(step))

    def size(self, step: int) -> int:
        """As :meth:`SampleSteps.size`."""
        begin, end = self._bounds(step)
        return end - begin

    def _bounds(self, step: int) -> tuple[int, int]:
        _require_step(step, self._last)
        while self._last is None and len(self._starts) <= step + 1:
            self._read_epoch()
        is_last = self._last is not None and step == self._last - 1
        end = self.order.start(self._epochs or 0) if is_last else self._starts[step + 1]
        return self._starts[step], end

    def _read_epoch(self) -> None:
        """Find the steps that begin in the next epoch; the last step stays open for the epoch after it."""
        first = self.order.start(self._read)
        # The epochs before this one have no sample, as all weights are small.
        self._read = self.order.epoch_of(first)
        if self._epochs is not None and self._read >= self._epochs:
            return
        lengths_N = self.lengths_S[self.order.samples(self._read)]
        samples = len(lengths_N)
        # before[j]: tokens before the epoch's sample j, counted from the start of the open step.
        before = self._open + np.concatenate([[0], np.cumsum(lengths_N, dtype=np.int64)])
        fits = np.searchsorted(before, before + self.tokens, side="right") - 1
        after = np.maximum(fits, np.arange(samples + 1) + 1).tolist()  # [j]: where a step from j ends
        begin, origin = int(np.searchsorted(before, self.tokens, side="right")) - 1, 0
        begin = max(begin, 0 if self._open else 1)  # the open step has a sample, or takes this one
        while begin < samples:
            self._starts.append(first + begin)
            begin, origin = after[begin], int(before[begin])
        self._open = int(before[-1]) - origin
        self._read += 1


def _require_step(step: int, steps: int | None) -> None:
    if step < 0 or (steps is not None and step >= steps):
        raise ValueError(f"a step must be within the run, 0 to {steps} (not included), got {step}")
