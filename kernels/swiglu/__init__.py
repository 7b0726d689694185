"""SwiGLU of a joined projection: ``silu(gate) * up`` in one pass, of which backward needs the projection alone.

``public`` has the function, ``swiglu_kernels`` its Triton passes. Liger-Kernel's op takes gate and up as two contiguous
tensors, into which a joined projection would have to be copied.
"""

from megatron_align.kernels.swiglu.public import swiglu, swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
