"""Count the bytes that autograd saves for backward, exactly, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage


class SavedBytes:
    """Counts the storages of saved tensors, each once regardless of the number of saved views.

    ``peak`` is the maximum held at once inside ``watching``, including what a checkpointed part saves while it is
    recomputed in backward. Each saved tensor costs a pass over all that are held.

    Args:
        parameters: tensors that are not counted, as they exist anyway.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        self._known = {_identity(parameter.untyped_storage()) for parameter in parameters}
        self._held: dict[int, tuple[UntypedStorage, int]] = {}  # by identity: a storage and its saved views
        self.peak = 0

    @property
    def held(self) -> int:
        """Bytes held now; an emptied storage counts 0."""
        return sum(storage.nbytes() for storage, _ in self._held.values())

    @contextmanager
    def watching(self) -> Iterator[SavedBytes]:
        """Count tensors saved inside the context, in forward and backward."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, self), _Saved.unpack):
            yield self

    def take(self, storage: UntypedStorage) -> None:
        """Count one saved view of a storage."""
        key = _identity(storage)
        if key not in self._known:
            views = self._held[key][1] if key in self._held else 0
            self._held[key] = (storage, views + 1)
            self.peak = max(self.peak, self.held)

    def release(self, storage: UntypedStorage) -> None:
        """Stop counting a saved view."""
        key = _identity(storage)
        if key not in self._known:
            _, views = self._held.pop(key)
            if views > 1:
                self._held[key] = (storage, views - 1)


class _Saved:
    """A saved tensor; autograd deletes this object when it releases the tensor."""

    def __init__(self, tensor: Tensor, counter: SavedBytes):
        self._tensor, self._counter = tensor, counter
        counter.take(tensor.untyped_storage())

    def unpack(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._counter.release(self._tensor.untyped_storage())


def _identity(storage: UntypedStorage) -> int:
    return storage._cdata  # not its data address, which an emptied storage loses
