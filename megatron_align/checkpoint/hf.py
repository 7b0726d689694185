"""Hugging Face folders: reading weights into a sharded model, and writing them back."""

from megatron_align.checkpoint.hf_files import DTYPES, HFWeights
from megatron_align.checkpoint.hf_read import (
    check_weights,
    load_weights,
    need_tied_head,
    open_hf,
    untied_head,
)
from megatron_align.checkpoint.hf_write import (
    ShardWriter,
    TensorSpec,
    copy_assets,
    hf_specs,
    to_hf,
    to_megatron,
    write_config_dtype,
)

__all__ = [
    "DTYPES",
    "HFWeights",
    "ShardWriter",
    "TensorSpec",
    "check_weights",
    "copy_assets",
    "hf_specs",
    "load_weights",
    "need_tied_head",
    "open_hf",
    "to_hf",
    "to_megatron",
    "untied_head",
    "write_config_dtype",
]
