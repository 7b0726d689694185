"""Rotary position embedding of queries and keys in one pass, by the rotary tables of a pack.

``public`` has the function, ``rope_kernels`` its Triton pass. Liger-Kernel rotates contiguous
tensors in place, into which the columns of a projection would have to be copied.
"""

from megatron_align.kernels.rope.public import rope, rope_reference

__all__ = ["rope", "rope_reference"]
