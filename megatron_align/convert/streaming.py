"""The block size that import and export share."""

from __future__ import annotations

BLOCK_BYTES = 64 << 20  # of a tensor that is streamed
