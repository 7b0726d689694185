"""The dispatch mode of a rehearsal: watches every operation on tensors without values, and answers for the values.

An operation runs in ``FakeTensorMode``, which computes shapes and devices only and refuses to mix devices as a GPU
does. What would read a value on the host is counted as a wait, and gets 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed._tools.fake_collectives  # registers collectives on tensors without values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_align.rehearsal.ledger import Ledger

Result = TypeVar("Result")
# Operations that move no bytes: views, allocations, bookkeeping.
_FREE = (
    *(
        "view",
        "_reshape_alias",
        "_unsafe_view",
        "detach",
        "alias",
        "lift_fresh",
        "set_",
        "resize_",
        "is_same_size",
    ),
    *("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "unfold", "diagonal", "as_strided"),
    *("transpose", "permute", "expand", "unsqueeze", "squeeze", "t", "_local_scalar_dense"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
_SIZED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
# Collectives without a kernel for tensors without values.
_COALESCED = (
    "c10d::allreduce_coalesced_",
    "c10d::reduce_scatter_tensor_coalesced_",
    "c10d::allgather_into_tensor_coalesced_",
)


class Tracker(TorchDispatchMode):
    """Records waits, blocks, bytes and collectives of all operations in a ledger.

    Args:
        ledger: of the rehearsal.
    """

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger
        self._pinned: set[int] = set()  # storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        name: str = func._schema.name
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            return self.pin(func(*args, **kwargs))
        if name == "aten::is_pinned":
            return self.is_pinned(args[0])
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            return self.pin(args[0])
        if name == "aten::_local_scalar_dense":
            return self._scalar(func, args[0])
        if name.startswith("c10d::"):
            self._note_collective(name, args)
            if name in _COALESCED:
                return torch._C._distributed_c10d.FakeWork().boxed()
        self._note_waits(name, args, kwargs)
        if name == "aten::_to_copy" and not _on_gpu(args[0]) and _is_gpu(kwargs.get("device")):
            # The values of the host go no further: only their shape.
            x, dtype = args[0], kwargs.get("dtype")
            made = torch.empty_strided(x.size(), x.stride(), dtype=dtype or x.dtype, device="cuda")
            self.ledger.operation(name, made.numel() * made.element_size(), 0)
            return self._hold(made)
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self._hold, out)
        self._note_work(name, args, kwargs, out)
        return out

    def is_pinned(self, x: Tensor) -> bool:
        """Return whether a host tensor lies in pinned memory."""
        return x.untyped_storage()._cdata in self._pinned

    def pin(self, x: Tensor) -> Tensor:
        """Mark a host tensor as pinned, and return it."""
        storage = x.untyped_storage()
        key = storage._cdata
        self._pinned.add(key)
        weakref.finalize(storage, self._pinned.discard, key)
        return x

    def _scalar(self, func: Any, x: Tensor) -> Any:
        if not isinstance(x, FakeTensor):
            return func(x)
        if x.constant is not None:
            return x.constant.item()
        if _on_gpu(x):
            self.ledger.wait("item")
        if x.dtype.is_floating_point:
            return 1.0
        return True if x.dtype == torch.bool else 1

    def _note_waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "aten::index":
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            if masks and _on_gpu(args[0]):
                self.ledger.wait("indexing by a mask")
        elif name in _SIZED_BY_VALUES or name == "aten::repeat_interleave":
            sizes = kwargs.get("output_size")
            if _on_gpu(args[0]) and sizes is None:
                self.ledger.wait(f"{name.removeprefix('aten::')}, whose size depends on values")
        elif name == "aten::_to_copy":
            self._note_copy(args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        elif name == "aten::copy_":
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._note_copy(args[1], args[0].device, asynchronous, args[0])

    def _note_copy(
        self, source: Tensor, device: Any, asynchronous: bool, target: Tensor | None = None
    ) -> None:
        target_type = source.device.type if device is None else torch.device(device).type
        if source.device.type == target_type or "meta" in (source.device.type, target_type):
            return
        if target_type == "cpu":
            if not asynchronous:
                self.ledger.wait("blocking copy to the host")
            elif target is None or not self.is_pinned(target):
                self.ledger.wait("copy to host memory that is not pinned")
        elif source.dim() == 0 and target is not None:
            return  # a number, which the launch takes along
        elif not asynchronous:
            self.ledger.wait("blocking copy from the host")
        elif not self.is_pinned(source):
            self.ledger.wait("copy from host memory that is not pinned")

    def _note_collective(self, name: str, args: tuple[Any, ...]) -> None:
        self.ledger.collective(name.removeprefix("c10d::"))
        for x in tree_leaves(args):
            if isinstance(x, Tensor) and not _on_gpu(x):
                self.ledger.fault(f"a tensor on {x.device} in the collective {name.removeprefix('c10d::')}")

    def _note_work(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        short = name.removeprefix("aten::")
        if name.startswith("prim::") or short in _FREE:
            return
        made = None if short.endswith("_") or "out" in kwargs else out
        tensors = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, Tensor) and _on_gpu(x)]
        if not tensors:
            return
        flops = 0
        if short in _PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            flops = 2 * left.numel() * right.shape[-1]
        self.ledger.operation(name, sum(x.numel() * x.element_size() for x in tensors), flops)

    def _hold(self, x: Tensor) -> Tensor:
        if not _on_gpu(x) or not isinstance(x, FakeTensor):
            return x
        storage = x.untyped_storage()
        key = storage._cdata
        is_new = not self.ledger.holds(key)
        self.ledger.hold(key, storage.nbytes())
        if is_new:
            weakref.finalize(storage, self.ledger.free, key)
        return x


def on_host(function: Callable[..., Result], tracker: Tracker | None = None) -> Callable[..., Result]:
    """Wrap a function of the host: the tensors that it makes have values; ``tracker`` notes which are pinned."""

    def run(*args: Any, **options: Any) -> Result:
        with _disable_current_modes(), tracker or nullcontext():
            return function(*args, **options)

    return run


@contextmanager
def tracking(ledger: Ledger) -> Iterator[Tracker]:
    """Make tensors without values inside a with-block, and record what is done with them."""
    tracker = Tracker(ledger)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        yield tracker


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _on_gpu(x: Tensor) -> bool:
    # ``x.device`` of a tensor without values is an operation, which this mode would see.
    return (x.fake_device if isinstance(x, FakeTensor) else x.device).type == "cuda"
