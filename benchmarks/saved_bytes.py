"""Bytes that autograd keeps for backward, counted where it keeps them: exactly, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage


class SavedBytes:
    """Counts the storages of saved tensors, each once however many views of it are kept.

    ``peak`` is the most that was held at once inside ``watching``, with what a checkpointed part saves while it runs
    again in backward. Each tensor that is saved costs a pass over all that are held.

    Args:
        parameters: tensors that do not count, as they are there anyway.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        self._known = {_identity(parameter.untyped_storage()) for parameter in parameters}
        self._held: dict[int, tuple[UntypedStorage, int]] = {}  # by identity: a storage and its saved views
        self.peak = 0

    @property
    def held(self) -> int:
        """Bytes held now; a storage that its owner emptied counts for nothing."""
        return sum(storage.nbytes() for storage, _ in self._held.values())

    @contextmanager
    def watching(self) -> Iterator[SavedBytes]:
        """Count what is saved inside: forward and backward."""
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
        """Count it no more."""
        key = _identity(storage)
        if key not in self._known:
            _, views = self._held.pop(key)
            if views > 1:
                self._held[key] = (storage, views - 1)


class _Saved:
    """A tensor that autograd keeps; autograd drops this when it lets go of it."""

    def __init__(self, tensor: Tensor, counter: SavedBytes):
        self._tensor, self._counter = tensor, counter
        counter.take(tensor.untyped_storage())

    def unpack(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._counter.release(self._tensor.untyped_storage())


def _identity(storage: UntypedStorage) -> int:
    return storage._cdata  # not its address, which an emptied storage gives up
