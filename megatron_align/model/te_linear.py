"""Transformer Engine's linear layers in the place of megatron-core's (``model.linear: te``).

Same parameters under the same names, sharded the same way: weights, checkpoints and exports are the same with either.
The layers communicate by themselves, as megatron-core's do. They compute in the run's precision, or in FP8
(``fp8.py``): each call enters the recipe itself, so that a layer which is computed again in backward does too.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.model import cpu
from megatron_align.model.fp8 import fp8_context
from megatron_align.model.optional_packages import (
    chip_name,
    import_or_reason,
    require_gpu,
    require_version,
    version_of,
)

OPTION = "model.linear: te"
LEAST = "2.8"


def require_te(option: str = OPTION, instead: str = "model.linear: torch") -> ModuleType:
    """Return ``transformer_engine.pytorch``.

    Args:
        option: that needs it.
        instead: the option that does not, for errors.

    Raises:
        InputError: no GPU of sm_80 or newer, or the package is absent, too old, or built for another torch or CUDA.
    """
    chip = require_gpu(option)
    require(
        chip >= (8, 0),
        f"{option} needs a GPU of sm_80 or newer, got {chip_name(chip)}: use {instead}",
    )
    package = import_or_reason("transformer_engine")
    module = import_or_reason("transformer_engine.pytorch")
    if isinstance(package, str) or isinstance(module, str):
        raise InputError(
            f"{option} needs transformer-engine {LEAST} or newer with its PyTorch part: "
            f"{package if isinstance(package, str) else module} (pip install 'transformer-engine[pytorch]' "
            f"--no-build-isolation, or use {instead})"
        )
    require_version(option, "transformer-engine", version_of(package, "transformer-engine"), LEAST)
    return module


def te_linears(fp8: str | None = None) -> tuple[type, type]:
    """Return the column- and the row-parallel layer, built as megatron-core's are.

    Args:
        fp8: recipe; None: they compute in the precision of their weights.

    Raises:
        InputError: as :func:`require_te` and :func:`.fp8.require_fp8`.
    """
    return _classes(require_te(), fp8)


@cache
def _classes(te: Any, fp8: str | None) -> tuple[type, type]:
    context = nullcontext if fp8 is None else fp8_context(te, fp8)

    class Linear(te.Linear):
        """Takes megatron-core's arguments and returns what its layers return."""

        mode: str

        def __init__(self, input_size: int, output_size: int, **options: Any):
            # Not passed on: gather_output and input_is_parallel, which the model leaves at what the layers do; names of
            # layers and buffers; is_expert, as there are no experts.
            config = options["config"]
            # megatron-core gives no group to a feed-forward network that is not its own.
            group = get_tensor_model_parallel_group_if_none(options.get("tp_group"))
            super().__init__(
                input_size,
                output_size,
                sequence_parallel=config.sequence_parallel,
                fuse_wgrad_accumulation=config.gradient_accumulation_fusion,
                tp_group=group,
                tp_size=group.size(),
                init_method=options["init_method"],
                bias=options["bias"],
                return_bias=options["bias"] and options["skip_bias_add"],
                params_dtype=config.params_dtype,
                parallel_mode=self.mode,
                device=cpu.device(),
            )
            self.weight.partition_stride = options.get("stride", 1)
            self.register_module("adapter", None)

        def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
            """Return the output, and the bias if it is left to the caller."""
            with context():
                output = super().forward(input_)
            return output if isinstance(output, tuple) else (output, None)

        def get_extra_state(self) -> None:
            """Return nothing, as megatron-core's layers do: the recipes that are offered have no state."""

        def set_extra_state(self, state: Any) -> None:
            """Ignore what other layers have saved."""

    class Column(Linear):
        """The column-parallel layer."""

        mode = "column"
        sharded_state_dict = ColumnParallelLinear.sharded_state_dict

    class Row(Linear):
        """The row-parallel layer."""

        mode = "row"
        sharded_state_dict = RowParallelLinear.sharded_state_dict

    return Column, Row
