"""Model families: what a Hugging Face folder describes, and where each of its tensors lives in ours."""

from megatron_align.model.families.shape import (
    ModelShape,
    RopeScaling,
    inv_freq,
    read_json,
    read_shape,
)
from megatron_align.model.families.table import (
    TABLES,
    Row,
    Slice,
    local_shape,
    padded_vocab,
    rows,
    segments,
)

__all__ = [
    "TABLES",
    "ModelShape",
    "RopeScaling",
    "Row",
    "Slice",
    "inv_freq",
    "local_shape",
    "padded_vocab",
    "read_json",
    "read_shape",
    "rows",
    "segments",
]
