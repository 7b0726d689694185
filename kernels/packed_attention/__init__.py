"""Attention over packed documents and shared prompts: each token sees two intervals of keys, there is no mask tensor.

Token ``t`` attends to ``[prefix_start_t, prefix_end_t)`` and ``[own_start_t, t]``: packed documents (empty prefix),
preference pairs and groups of completions of one prompt. A layout can also be for some of the queries only, over the
keys of the entire pack: what a context-parallel rank computes.

Shapes, in all files here: T tokens of a pack, Q queries (T of them, or a rank's share), H query heads, G key/value
heads, D head dim.
Precision: scores and softmax in fp32 at least, result in the input dtype. fp32 is exact fp32, never TF32.

Files: ``public`` validates and picks the implementation, ``layout`` holds the intervals, ``forward_kernel`` and
``backward_kernels`` are the Triton kernels for GPUs, ``tile_ranges`` the key and query tiles that they visit, ``tiles``
and ``tuned_tiles`` the tile sizes, ``autograd`` the launches, ``cpu_per_document`` the CPU implementation and
``reference`` plain PyTorch with a dense mask. ``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.public import packed_attention
from megatron_align.kernels.packed_attention.reference import packed_attention_reference

__all__ = ["PackedLayout", "packed_attention", "packed_attention_reference"]
