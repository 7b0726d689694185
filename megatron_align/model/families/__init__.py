"""Model families: shapes read from Hugging Face folders, and the table that maps their weights to Megatron's."""

from megatron_align.model.families.mapping import Segment, copy_segments, to_hf, to_megatron, views_of_hf
from megatron_align.model.families.shape import (
    ModelShape,
    read_json,
    read_shape,
)
from megatron_align.model.families.table import (
    TABLES,
    Row,
    local_shape,
    padded_vocab,
    rows,
)

__all__ = [
    "TABLES",
    "ModelShape",
    "Row",
    "Segment",
    "copy_segments",
    "local_shape",
    "padded_vocab",
    "read_json",
    "read_shape",
    "rows",
    "to_hf",
    "to_megatron",
    "views_of_hf",
]
