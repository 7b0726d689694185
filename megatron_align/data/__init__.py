"""Data: file -> record (formats) -> store (tokenize) -> step plan -> PackedBatch (batching)."""
