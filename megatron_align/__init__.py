"""Alignment training on megatron-core: HF checkpoint in, HF checkpoint out."""

__version__ = "0.1.0"
