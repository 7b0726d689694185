"""Estimated cost of a run: bytes and FLOPs as pure functions of model, layout and batch."""
