"""Data: file -> record -> tokens -> store -> step plan -> PackedBatch."""
