"""Rehearsal of training steps without a GPU: tensors that claim to be on CUDA, and nothing computes.

Run it as a process of its own, ``python -m megatron_align.rehearsal``: it changes torch for good.
"""
