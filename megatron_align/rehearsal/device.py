"""torch as it is where a GPU is visible, in a process that has none: ``torch.cuda`` answers, launches are checked.

Installed once per process by :func:`install`, never removed. What it answers about values, times and generators is made
up; what it says about memory comes from the ledger of the rehearsal that runs.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import JITFunction

from megatron_align.rehearsal.ledger import Ledger

GPUS_OF_A_NODE = 8
CAPABILITY, NAME = (9, 0), "NVIDIA H100 80GB HBM3"
GRID_LIMITS = (2**31 - 1, 65535, 65535)
GPU = torch.device("cuda", 0)


class Current:
    """The ledger of the rehearsal that runs."""

    ledger = Ledger()


class _Event:
    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Current.ledger.wait("waiting for an event")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream:
    device, device_index, cuda_stream, stream_id = GPU, 0, 0, 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        Current.ledger.wait("waiting for a stream")

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class _DeviceGuard:
    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def install() -> None:
    """Make torch believe in a GPU: in ``torch.cuda``, in storages and host copies, in Triton's launches."""
    stream, generator_state = _Stream(), torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=80 * 2**30,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
        warp_size=32,
    )
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats"), None),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state"), None),
        "device_count": GPUS_OF_A_NODE,
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
        "get_device_capability": CAPABILITY,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "current_stream": stream,
        "default_stream": stream,
        "stream": nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda device=None: Current.ledger.live)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: generator_state.clone()
    torch.cuda.synchronize = lambda device=None: Current.ledger.wait("synchronize")
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.device = _Event, _Stream, _DeviceGuard  # type: ignore[misc, assignment]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = torch.cuda.get_rng_state
    random._set_cuda_rng_state = random._lazy_init = _always(None)
    _install_storages()
    _install_host_reads()
    JITFunction.run = _check_launch


def _always(answer: Any) -> Any:
    return lambda *args, **options: answer


def _install_storages() -> None:
    """Record storages that are resized; copy nothing between storages without bytes."""
    resize, copy = torch.UntypedStorage.resize_, torch.UntypedStorage.copy_

    def resized(self: torch.UntypedStorage, size: int) -> Any:
        out = resize(self, size)
        if Current.ledger.holds(self._cdata):
            Current.ledger.hold(self._cdata, size)
        return out

    def copied(self: torch.UntypedStorage, source: Any, non_blocking: bool | None = None) -> Any:
        return self if self.device.type == "meta" else copy(self, source, non_blocking)

    torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
    torch.UntypedStorage.copy_ = copied  # type: ignore[assignment, method-assign]


def _install_host_reads() -> None:
    """Answer ``numpy``, ``tolist`` and ``torch.tensor(values, device=...)``, which dispatch modes do not see."""
    numpy, to_list, tensor = Tensor.numpy, Tensor.tolist, torch.tensor

    def to_numpy(self: Tensor, **options: Any) -> np.ndarray:
        with _disable_current_modes():
            if not isinstance(self, FakeTensor):
                return numpy(self, **options)
            if self.device.type != "cpu":
                raise TypeError(f"can't convert {self.device} device type tensor to numpy")
            return numpy(torch.ones(self.shape, dtype=self.dtype))

    def listed(self: Tensor) -> Any:
        if isinstance(self, FakeTensor) and self.device.type == "cuda":
            Current.ledger.wait("tolist")
        with _disable_current_modes():
            known = self.constant if isinstance(self, FakeTensor) else self
            return to_list(torch.ones(self.shape, dtype=self.dtype) if known is None else known)

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return tensor(data, device=device, **options)
        Current.ledger.wait("torch.tensor(values) on the GPU, a blocking copy")
        requires_grad = options.pop("requires_grad", False)
        of_host = tensor(data, **options)
        return torch.empty(of_host.shape, dtype=of_host.dtype, device=device, requires_grad=requires_grad)

    Tensor.record_stream = _always(None)  # type: ignore[method-assign]
    Tensor.numpy = to_numpy  # type: ignore[assignment, method-assign]
    Tensor.tolist = FakeTensor.tolist = listed  # type: ignore[assignment, method-assign]
    torch.tensor = made  # type: ignore[assignment]


def _check_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Check a Triton launch instead of making it: the grid's limits, tensors on the GPU and numbers of 64 bits."""
    ledger, name = Current.ledger, self.fn.__name__
    given = {**dict(zip(self.arg_names, args, strict=False)), **options}
    sizes = (*(grid(given) if callable(grid) else grid), 1, 1)[:3]
    for axis, (size, most) in enumerate(zip(sizes, GRID_LIMITS, strict=True)):
        if not 0 < size <= most:
            ledger.fault(f"{name} must have 1 to {most} blocks on axis {axis} of its grid, it has {size}")
    for argument, value in given.items():
        if isinstance(value, Tensor) and value.device.type != "cuda":
            ledger.fault(f"{name} needs {argument} on the GPU, it is on {value.device}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            ledger.fault(f"{name}: {argument} = {value} has more than 64 bits")
    ledger.launches[name] += 1
    moved = sum(x.numel() * x.element_size() for x in given.values() if isinstance(x, Tensor))
    ledger.operation(f"triton::{name}", moved, 0)
