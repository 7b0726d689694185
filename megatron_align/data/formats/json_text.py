"""Decode JSON text and notice keys that an object repeats, which Python's decoder would drop without a word."""

from __future__ import annotations

import json
from typing import Any


class JsonDecoder:
    """Decodes JSON, like ``json.loads``, and remembers the first repeated key of an object."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._repeated: str | None = None

    def decode(self, text: str) -> Any:
        """Return the value of a text. Raises ValueError or RecursionError as ``json.loads`` does."""
        self._repeated = None
        return self._decoder.decode(text)

    def decode_at(self, text: str, position: int) -> tuple[Any, int]:
        """Return the value that starts at ``position`` (no white space), and where it ends."""
        self._repeated = None
        return self._decoder.raw_decode(text, position)

    def repeated_key(self) -> str | None:
        """Return the first key that an object of the last decoded text repeats; None: no key was repeated."""
        return self._repeated

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and self._repeated is None:
            keys = [key for key, _ in pairs]
            self._repeated = next(key for key in made if keys.count(key) > 1)
        return made
