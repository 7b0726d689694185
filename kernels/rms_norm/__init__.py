"""Root-mean-square norm, alone or of a sum that is added in the same pass; backward keeps what was normalised, no more.

``public`` has the functions, ``rms_norm_kernels`` their Triton passes.
"""

from megatron_align.kernels.rms_norm.public import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

__all__ = ["add_rms_norm", "add_rms_norm_reference", "rms_norm", "rms_norm_reference"]
