"""FP8 in the transformer's linear layers (``train.fp8``), by Transformer Engine's recipes that keep no state.

Operands are rounded to FP8 within a scale that comes from their own values: one for a tensor (tensorwise), for 128
values of an activation or 128 x 128 of a weight (blockwise, as DeepSeek-V3, arXiv:2412.19437), or for 32 values (mxfp8,
OCP Microscaling). Products are summed and stored in higher precision; weights, their gradients and the optimizer's
state stay as they are, and so do checkpoints. A tensor's scale depends on all samples of a pack: the layout and the
packing change numbers by rounding errors of FP8.

Semantics follow ``transformer_engine/pytorch/quantization.py`` and ``common/recipe`` of 2.20.2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError, require
from megatron_align.model.families import ModelShape
from megatron_align.model.optional_packages import (
    chip_name,
    import_or_reason,
    require_gpu,
    require_version,
    version_of,
)

OPTION = "train.fp8"
LEAST = "2.9"  # the first with ``autocast`` and public functions that say what a chip supports


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as Transformer Engine has it.

    Args:
        name: class in ``transformer_engine.common.recipe``.
        multiple: tokens of each rank, and both dimensions of each weight on a rank, are multiples of this.
        available: function that says whether the chip has it.
    """

    name: str
    multiple: int
    available: str


RECIPES = {
    "tensorwise": Recipe("Float8CurrentScaling", 16, "is_fp8_available"),
    "blockwise": Recipe("Float8BlockScaling", 16, "is_fp8_block_scaling_available"),
    "mxfp8": Recipe("MXFP8BlockScaling", 32, "is_mxfp8_available"),
}


def token_multiple(parallel: ParallelConfig, fp8: str | None) -> int:
    """Return what the padded length of a pack is a multiple of: ranks that share its tokens, times the recipe's own.

    Args:
        parallel: the layout.
        fp8: a key of ``RECIPES``; None: FP8 is off.
    """
    sequence_ranks = parallel.tensor if parallel.sequence else 1
    return parallel.context * sequence_ranks * (1 if fp8 is None else RECIPES[fp8].multiple)


def require_widths(shape: ModelShape, parallel: ParallelConfig, fp8: str | None) -> None:
    """Check that the weights of a rank have dimensions that the recipe can compute with.

    Args:
        shape: of the model.
        parallel: the layout.
        fp8: a key of ``RECIPES``; None: FP8 is off.

    Raises:
        InputError: naming the first dimension that is no multiple.
    """
    if fp8 is None:
        return
    multiple, tensor = RECIPES[fp8].multiple, parallel.tensor
    queries = shape.num_heads * shape.head_dim // tensor
    keys = max(shape.num_query_groups // tensor, 1) * shape.head_dim
    widths = {
        "hidden size": shape.hidden_size,
        "queries of a rank": queries,
        "queries, keys and values of a rank": queries + 2 * keys,
        "feed-forward columns of a rank": shape.ffn_size // tensor,
    }
    for name, width in widths.items():
        require(
            width % multiple == 0,
            f"{OPTION}.recipe: {fp8} needs dimensions of linear layers that are multiples of {multiple}, got {width} "
            f"({name}) with parallel.tensor: {tensor}; use a smaller parallel.tensor, or leave train.fp8 out",
        )


def require_fp8(te: Any, fp8: str) -> None:
    """Check that this process's GPU and Transformer Engine have a recipe.

    Args:
        te: ``transformer_engine.pytorch``, of a version that the linear layers can use.
        fp8: a key of ``RECIPES``.

    Raises:
        InputError: the package is too old, or the chip lacks FP8 or the recipe.
    """
    package = import_or_reason("transformer_engine")
    if isinstance(package, str):
        raise InputError(f"{OPTION} needs transformer-engine {LEAST} or newer: {package}")
    require_version(OPTION, "transformer-engine", version_of(package, "transformer-engine"), LEAST)
    chip = require_gpu(OPTION)
    require(
        chip >= (8, 9),
        f"{OPTION} needs a GPU of sm_89 or newer, got {chip_name(chip)}, which has no FP8: leave train.fp8 out",
    )
    available, reason = getattr(te, RECIPES[fp8].available)(return_reason=True)
    require(
        available,
        f"{OPTION}.recipe: {fp8} cannot run on {chip_name(chip)}: {reason.rstrip('.')} (as transformer-engine says): "
        f"{'use tensorwise' if fp8 != 'tensorwise' else 'leave train.fp8 out'}",
    )


def fp8_context(te: Any, fp8: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context in which Transformer Engine's layers compute with a recipe.

    Args:
        te: ``transformer_engine.pytorch``.
        fp8: a key of ``RECIPES``.

    Raises:
        InputError: as :func:`require_fp8`.
    """
    require_fp8(te, fp8)
    recipes = import_or_reason("transformer_engine.common.recipe")
    if isinstance(recipes, str):
        raise InputError(f"{OPTION} needs transformer_engine.common.recipe: {recipes}")
    recipe = getattr(recipes, RECIPES[fp8].name)()
    return lambda: te.autocast(enabled=True, recipe=recipe)
