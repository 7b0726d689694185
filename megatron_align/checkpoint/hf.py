"""Hugging Face folders: reading weights into a sharded model, and writing them back."""

from megatron_align.checkpoint.hf_read import DTYPES, HFWeights, check_weights, load_weights
from megatron_align.checkpoint.hf_write import ShardWriter, copy_assets, to_hf, write_config_dtype

__all__ = [
    "DTYPES",
    "HFWeights",
    "ShardWriter",
    "check_weights",
    "copy_assets",
    "load_weights",
    "to_hf",
    "write_config_dtype",
]
