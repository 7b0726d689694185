"""Merging formulas: from the blocks of one tensor, of a base and N models, to the merged blocks.

Shapes: E elements of a block, N models. A tensor is an iterable of blocks that can be iterated several times, as some
formulas first need a sum over the entire tensor. A block may be changed in place, and a merged block may share its
memory: each iteration reads the block again, and the next block reuses the memory.

``base_E`` is None for a formula without a base. A task vector is a model minus the base.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_align.errors import InputError

LARGEST = torch.finfo(torch.float32).max  # formulas are computed in fp32


class Block(NamedTuple):
    """A range of elements of one tensor, in the dtype of the computation."""

    base_E: Tensor | None
    models_NE: Tensor

    def tasks(self) -> tuple[Tensor, Tensor]:
        """Return ``base_E`` and the task vectors ``[N, E]``, in the memory of ``models_NE``."""
        assert self.base_E is not None, "this method needs a base"
        return self.base_E, self.models_NE.sub_(self.base_E)


Blocks = Iterable[Block]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A formula and its options.

    ``needs_base``: the formula uses the base. Otherwise a base is only checked to be compatible or, with
    ``starts_at_base``, used in place of a missing first model.
    """

    needs_base: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = False
    passes: ClassVar[int] = 1  # iterations over every tensor

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        """Yield the merged blocks of the tensor ``name``."""
        raise NotImplementedError

    def task_weights(self, gram_NN: Tensor) -> Tensor | None:
        """Return ``weights_N`` where the merged tensor is ``base + sum(w_i task_i)``; None: it is no such sum.

        ``gram_NN`` are the inner products of the tensor's task vectors.
        """
        return None

    def check(self, models: int) -> None:
        """Check the options against the number of models.

        Raises:
            InputError: they do not fit.
        """
        for option, value in asdict(self).items():
            many = isinstance(value, tuple)
            if value is None or option == "seed":
                continue
            if not all(map(math.isfinite, value if many else (value,))):
                expected = "finite numbers" if many else "a finite number"
                raise InputError(f"--{option} must be {expected}, got {value}")
            if sum(map(abs, value if many else (value,))) > LARGEST:
                raise InputError(
                    f"--{option} must be at most {LARGEST:.3g} in magnitude, in all, got {value}"
                )


@dataclass(frozen=True, kw_only=True)
class Weighted(Method):
    """A formula with a weight for each model.

    Args:
        weights: one per model; None: 1 / N each.
    """

    weights: tuple[float, ...] | None = None

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        if self.weights is not None and len(self.weights) != models:
            raise InputError(
                f"--weights must have one number for each of {models} models, got {len(self.weights)}"
            )

    def _weights(self, models_NE: Tensor) -> Tensor:
        """Return weights ``[N]``."""
        models = len(models_NE)
        return models_NE.new_tensor(self.weights if self.weights is not None else [1 / models] * models)


@dataclass(frozen=True, kw_only=True)
class Linear(Weighted):
    """``sum(w_i x_i) / sum(w_i)``, the model soup. Wortsman et al. 2022."""

    needs_base: ClassVar[bool] = False

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        if self.weights is not None and math.isclose(sum(self.weights), 0, abs_tol=1e-9):
            raise InputError(f"--weights must not sum to 0, as linear divides by the sum; got {self.weights}")

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        for _, models_NE in blocks:
            weights_N = self._weights(models_NE)
            yield _weighted_sum(weights_N / weights_N.sum(), models_NE)

    def task_weights(self, gram_NN: Tensor) -> Tensor:
        """Return the weights, which sum to 1."""
        weights_N = self._weights(gram_NN)
        return weights_N / weights_N.sum()


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Weighted):
    """``base + scale * sum(w_i task_i)``. Ilharco et al. 2023.

    Args:
        scale: of the sum; the paper's lambda.
    """

    scale: float = 1.0

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        for block in blocks:
            base_E, task_NE = block.tasks()
            yield _add_tasks(base_E, task_NE, self._weights(task_NE), self.scale)

    def task_weights(self, gram_NN: Tensor) -> Tensor:
        """Return the weights with the scale."""
        return self.scale * self._weights(gram_NN)


@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    """``t mean(x_i) + (1 - t) base``, ``t = N c / (1 + (N - 1) c)``. Jang et al. 2024.

    ``c`` is the cosine between two task vectors of the tensor: the mean over all pairs where N > 2. It is
    clamped to [0, 1]: below 0 the formula would move away from the mean, beyond the base. A model that left the
    tensor unchanged has no angle and counts as perpendicular.
    """

    passes: ClassVar[int] = 2

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        if models < 2:
            raise InputError(f"model_stock needs two models or more, got {models}")

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        ratio = _stock_ratio(_gram(block.tasks()[1] for block in blocks))
        for block in blocks:
            base_E, task_NE = block.tasks()
            mean_N = task_NE.new_full((len(task_NE),), 1 / len(task_NE))
            yield _add_tasks(base_E, task_NE, mean_N, ratio)

    def task_weights(self, gram_NN: Tensor) -> Tensor:
        """Return the tensor's ``t / N`` for each model."""
        return gram_NN.new_full((len(gram_NN),), _stock_ratio(gram_NN) / len(gram_NN))


@dataclass(frozen=True, kw_only=True)
class Slerp(Method):
    """Spherical interpolation from the first of two models to the second; straight where they are parallel.

    With one model it goes from the base to that model. Shoemake 1985.

    Args:
        t: 0 is the start, 1 the end.
    """

    needs_base: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = True
    passes: ClassVar[int] = 2
    PARALLEL: ClassVar[float] = 0.9995  # cosine

    t: float = 0.5

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        if models != 2:
            raise InputError(f"slerp needs two models, or a base and one model; got {models} in all")

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        gram_NN = _gram(models_NE for _, models_NE in blocks)
        lengths = math.sqrt(gram_NN[0, 0] * gram_NN[1, 1])
        cosine = gram_NN[0, 1].item() / lengths if lengths else 1.0
        shares = [1 - self.t, self.t]
        if abs(cosine) <= self.PARALLEL:
            angle = math.acos(cosine)
            shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
        for _, models_NE in blocks:
            yield _weighted_sum(models_NE.new_tensor(shares), models_NE)


@dataclass(frozen=True, kw_only=True)
class Ties(Weighted):
    """Trim, elect a sign, merge the elements that agree with it. Yadav et al. 2023.

    Of each task vector the ``density`` largest magnitudes are kept (including ties with the smallest of them); an
    element's sign is that of the weighted sum; the weighted mean is over the models that have this sign.

    Args:
        density: share of elements that are kept, over 0 and at most 1.
        scale: of the merged task vector.
    """

    passes: ClassVar[int] = 3

    density: float = 0.2
    scale: float = 1.0

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        _require_density(self.density)
        if self.weights is not None and min(self.weights) <= 0:
            raise InputError(f"--weights must be positive, as ties divides by their sum; got {self.weights}")

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        least_N = kept_magnitudes(blocks, self.density)
        for block in blocks:
            base_E, task_NE = block.tasks()
            task_NE.masked_fill_(task_NE.abs().float() < least_N[:, None], 0)
            weights_N1 = self._weights(task_NE)[:, None]
            weighted_NE = task_NE * weights_N1
            agrees_NE = (task_NE.sign() == weighted_NE.sum(0).sign()) & (task_NE != 0)
            share_E = (agrees_NE * weights_N1).sum(0)
            merged_E = (weighted_NE * agrees_NE).sum(0) / share_E.masked_fill_(share_E == 0, 1)
            yield base_E.add_(merged_E, alpha=self.scale)


@dataclass(frozen=True, kw_only=True)
class Dare(Weighted):
    """Drop elements of the task vectors at random, rescale the rest, and add them up. Yu et al. 2024.

    ``base + scale * sum(w_i keep_i task_i / density)``. Which elements are kept depends only on the seed, the tensor's
    name and the model's number.

    Args:
        density: probability that an element is kept, over 0 and at most 1; the paper's 1 - p.
        scale: of the sum.
        seed: of the random generator.
    """

    density: float = 0.1
    scale: float = 1.0
    seed: int = 0

    def check(self, models: int) -> None:
        """Check the options."""
        super().check(models)
        _require_density(self.density)
        if abs(self.scale) > LARGEST * self.density:
            raise InputError(
                f"--scale divided by --density must be at most {LARGEST:.3g} in magnitude, "
                f"got {self.scale} / {self.density}"
            )

    def merge(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        draws: list[torch.Generator] = []
        for block in blocks:
            base_E, task_NE = block.tasks()
            draws = draws or [self._draw(name, number) for number in range(len(task_NE))]
            for task_E, draw in zip(task_NE, draws, strict=True):
                task_E.mul_(torch.rand(task_E.shape, generator=draw) < self.density)
            yield _add_tasks(base_E, task_NE, self._weights(task_NE), self.scale / self.density)

    def _draw(self, name: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


METHODS: dict[str, type[Method]] = {
    "linear": Linear,
    "task_arithmetic": TaskArithmetic,
    "model_stock": ModelStock,
    "slerp": Slerp,
    "ties": Ties,
    "dare": Dare,
}


def kept_magnitudes(blocks: Blocks, density: float) -> Tensor:
    """Return the smallest magnitude ``[N]`` of each task vector's ``density`` largest ones, at least one.

    Exact, in two passes and constant memory: magnitudes are counted by their upper 16 bits, then those with the upper
    bits of the result by their lower 16. Floats of one sign are ordered like their bits.
    """
    counts_NB, elements = _count_bits(blocks, None)
    wanted = max(1, int(density * elements))
    upper_N, above_N = _find_largest(counts_NB, torch.full((len(counts_NB),), wanted))
    counts_NB, _ = _count_bits(blocks, upper_N)
    lower_N, _ = _find_largest(counts_NB, wanted - above_N)
    return ((upper_N << 16) + lower_N).int().view(torch.float32)


def _count_bits(blocks: Blocks, upper_N: Tensor | None) -> tuple[Tensor, int]:
    """Count magnitudes by their upper bits, or by the lower of those with ``upper_N``; ``[N, 65536]``."""
    total: Tensor | None = None
    elements = 0
    for block in blocks:
        _, task_NE = block.tasks()
        bits_NE = task_NE.abs_().float().view(torch.int32)
        counts = []
        for number, bits_E in enumerate(bits_NE):
            bins = (
                bits_E >> 16
                if upper_N is None
                else bits_E[bits_E >> 16 == upper_N[number]].bitwise_and(0xFFFF)
            )
            counts.append(torch.bincount(bins, minlength=1 << 16))
        total = torch.stack(counts) if total is None else total.add_(torch.stack(counts))
        elements += bits_NE.shape[1]
    assert total is not None, "a tensor has at least one block"
    return total, elements


def _find_largest(counts_NB: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin ``[N]`` that contains the ``wanted``-th largest, and the number of elements in bins above it."""
    from_top_NB = counts_NB.flip(1).cumsum(1)
    index_N = (from_top_NB < wanted_N[:, None]).sum(1)
    above_N = (from_top_NB - counts_NB.flip(1)).gather(1, index_N[:, None])[:, 0]
    return counts_NB.shape[1] - 1 - index_N, above_N


def _add_tasks(base_E: Tensor, task_NE: Tensor, weights_N: Tensor, scale: float) -> Tensor:
    """Return ``base + scale * sum(w_i task_i)`` in the base's memory: allocating would cost more than the sum."""
    return base_E.addmv_(task_NE.T, weights_N, alpha=scale)


def _weighted_sum(weights_N: Tensor, models_NE: Tensor) -> Tensor:
    """Return ``sum(w_i x_i)`` in the first model's memory."""
    return models_NE[0].mul_(weights_N[0]).addmv_(models_NE[1:].T, weights_N[1:])


def _gram(blocks: Iterable[Tensor]) -> Tensor:
    """Return all inner products ``[N, N]`` over the entire tensor, summed in float64 over blocks."""
    return functools.reduce(torch.add, ((x_NE @ x_NE.T).double() for x_NE in blocks))


def _stock_ratio(gram_NN: Tensor) -> float:
    models = len(gram_NN)
    lengths_N = gram_NN.diagonal().clamp(min=0).sqrt()
    cosines_NN = gram_NN / (lengths_N[:, None] * lengths_N).masked_fill_(gram_NN == 0, 1)
    pairs = torch.triu_indices(models, models, offset=1)
    cosine = cosines_NN[pairs[0], pairs[1]].mean().clamp(0, 1).item()
    return models * cosine / (1 + (models - 1) * cosine)


def _require_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"--density must be over 0 and at most 1, got {density}")
