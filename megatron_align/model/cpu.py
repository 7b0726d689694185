"""The CPU seam: where no GPU is visible, megatron-core's CUDA calls are redirected to the CPU.

megatron-core uses CUDA devices, streams and generators directly. All patches that it needs to run over gloo are in
this file. They are installed once per process, and never where a GPU is visible, so that every law is tested through
the real megatron-core code on any machine.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "tensor",
    "arange",
    "as_tensor",
    "empty_strided",
)
_installed = False


def device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU where none is visible."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def install() -> bool:
    """Install the seam if no GPU is visible; return whether this process runs on the CPU."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _redirect_devices()
        _redirect_random_state()
        _redirect_tensor_methods()
        _installed = True
        logger.info("no GPU visible: megatron-core runs on the CPU (gloo)")
    return True


def _redirect_devices() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]  # from 0.19 on
    # torch collects the factories that `with torch.device(...)` redirects at its first use. It must collect the
    # original ones: transformers builds models under `torch.device("meta")`, and would leave buffers uninitialised.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _redirect_random_state() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Apex and Transformer Engine are absent and not needed
        from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = get_state
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _redirect_tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        # The distributed optimizer sorts parameters by names such as 'torch.cuda.FloatTensor'.
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_type  # type: ignore[assignment, method-assign]
