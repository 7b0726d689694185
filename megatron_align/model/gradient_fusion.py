"""Weight gradients of linear layers added to the fp32 buffer by the matrix product that makes them.

``train.gradient_accumulation_fusion``: megatron-core's layers then call Apex's ``fused_weight_gradient_mlp_cuda``,
which it looks for when it is imported; Transformer Engine's do it by themselves. Without it a gradient is a tensor of
its own, in the precision of the weights, that is added to the buffer.
"""

from __future__ import annotations

from megatron_align.errors import InputError
from megatron_align.model.optional_packages import import_or_reason, require_gpu

OPTION = "train.gradient_accumulation_fusion"
EXTENSION = "fused_weight_gradient_mlp_cuda"


def require_gradient_fusion(linear: str) -> None:
    """Check that the linear layers can add their gradients to the buffer.

    Args:
        linear: as ``model.linear``.

    Raises:
        InputError: no GPU, or Apex's extension is absent or does not load.
    """
    require_gpu(OPTION)
    if linear == "te":
        return
    found = import_or_reason(EXTENSION)
    if isinstance(found, str):
        raise InputError(
            f"{OPTION} needs Apex with its CUDA extensions ({EXTENSION}): {found} (docs/optional_packages.md says how "
            "to install it), or model.linear: te, whose layers need no Apex; or leave it out"
        )
