"""AdamW whose update of all shards is one or a few launches of Apex's kernel (``optimizer.implementation: apex``).

It is torch's AdamW with the same state, in which only the update differs: checkpoints are the same, and megatron-core,
which would itself choose Transformer Engine's, Apex's or torch's class by what is installed, sees torch's. Apex's
kernel reads the step, the rate and whether to do anything at all on the device, as torch's fused update does; it
computes ``1 - beta ^ step`` in fp32, so early updates differ from torch's by some 1e-5.

Read in NVIDIA/apex: ``csrc/multi_tensor_adam.cu``, ``apex/optimizers/fused_adam.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.model.optional_packages import import_or_reason, require_gpu

OPTION = "optimizer.implementation: apex"
UPDATE = "multi_tensor_adam_capturable"
_ADAMW, _CORRECTED = 1, 1  # decoupled weight decay; moments divided by 1 - beta ^ step


def require_apex() -> tuple[Any, Any]:
    """Return Apex's function that applies a kernel to lists of tensors, and the kernel of the update.

    Raises:
        InputError: no GPU, or Apex is absent, was built without CUDA extensions, or is too old.
    """
    require_gpu(OPTION)
    remedy = "docs/optional_packages.md says how to install it; or use optimizer.implementation: torch"
    found = {name: import_or_reason(name) for name in ("apex.multi_tensor_apply", "amp_C")}
    for name, module in found.items():
        if isinstance(module, str):
            raise InputError(f"{OPTION} needs Apex with its CUDA extensions ({name}): {module}; {remedy}")
    kernel = getattr(found["amp_C"], UPDATE, None)
    require(
        kernel is not None, f"{OPTION} needs an Apex whose amp_C has {UPDATE}, got an older one; {remedy}"
    )
    return found["apex.multi_tensor_apply"].multi_tensor_applier, kernel  # type: ignore[union-attr]


class ApexAdamW(torch.optim.AdamW):
    """Torch's AdamW, updated by Apex's kernel.

    As torch's fused update it divides gradients by ``grad_scale`` where that is set, and leaves all as it is where
    ``found_inf`` is 1.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]]):
        self._apply, self._kernel = require_apex()
        super().__init__(groups)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient."""
        for group in self.param_groups:
            shards = [shard for shard in group["params"] if shard.grad is not None]
            if shards:
                self._update(group, shards)

    def _update(self, group: dict[str, Any], shards: list[Tensor]) -> None:
        states, device = [self.state[shard] for shard in shards], shards[0].device
        ones = torch.ones((), dtype=torch.float32, device=device)
        skip = ones.new_zeros(()) if self.found_inf is None else self.found_inf
        steps = [state["step"] for state in states]
        self._apply(
            self._kernel,
            skip.to(torch.int32).view(1),
            [
                [shard.grad for shard in shards],
                list(shards),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            ],
            ones * group["lr"],
            *group["betas"],
            group["eps"],
            (steps[0] + 1).to(torch.int32),
            _ADAMW,
            _CORRECTED,
            group["weight_decay"],
            ones if self.grad_scale is None else self.grad_scale.reciprocal(),
        )
        torch._foreach_add_(steps, (1 - skip).to(steps[0].device))
