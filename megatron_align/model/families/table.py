"""The weight table HF <-> Megatron: one row per Megatron tensor, and how tensor-parallel ranks shard it.

Only this table relates the two names of a tensor. A layout function gives the order of the parts of the HF tensors in
the Megatron tensor; reading, sharding and exporting walk it through ``mapping.copy_segments``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_align.errors import InputError
from megatron_align.model.families.shape import ModelShape
from megatron_align.model.tied_embedding import EMBEDDING, HEAD, has_row


class Slice(NamedTuple):
    """``[start, stop)`` of HF part ``part`` along the row's split dimension; ``part`` None: zero padding."""

    part: int | None
    start: int
    stop: int


# (sizes of the parts along the split dimension, shape, tensor ranks) -> blocks. Each block is a list of
# concatenated slices, cut equally over the tensor ranks; a rank's tensor is its share of every block.
Layout = Callable[[Sequence[int], ModelShape, int], list[list[Slice]]]


def each(sizes: Sequence[int], shape: ModelShape, tensor_ranks: int) -> list[list[Slice]]:
    """Cut every part separately: a single tensor, or ``[gate shard | up shard]``."""
    return [[Slice(part, 0, size)] for part, size in enumerate(sizes)]


def qkv(sizes: Sequence[int], shape: ModelShape, tensor_ranks: int) -> list[list[Slice]]:
    """Interleave query groups, each ``q..q k v``; with fewer groups than ranks a group is cut."""
    groups = shape.num_query_groups
    q, k, v = (size // groups for size in sizes)
    return [
        [
            Slice(part, g * width, (g + 1) * width)
            for g in range(groups)
            for part, width in enumerate((q, k, v))
        ]
    ]


def packed_qkv(sizes: Sequence[int], shape: ModelShape, tensor_ranks: int) -> list[list[Slice]]:
    """Interleave as :func:`qkv`, from one HF tensor of all queries, then all keys, then all values."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    start = (0, q, q + kv)
    [block] = qkv((q, kv, kv), shape, tensor_ranks)
    return [
        [Slice(0, start[part] + first, start[part] + last) for part, first, last in block if part is not None]
    ]


def vocab(sizes: Sequence[int], shape: ModelShape, tensor_ranks: int) -> list[list[Slice]]:
    """Pad the vocabulary's rows with zero rows up to :func:`padded_vocab`."""
    return [[Slice(0, 0, sizes[0]), Slice(None, 0, padded_vocab(sizes[0], tensor_ranks) - sizes[0])]]


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron tensor and the HF tensors that it consists of. ``{i}`` is the (global) index of the layer.

    ``dims`` names the dimensions of each HF tensor (see :meth:`hf_shapes`), or gives their size; ``split`` is the
    dimension that parts are concatenated and sharded along; None for a tensor that every rank holds in full.
    """

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[tuple[str | int, ...], ...]
    split: int | None = None
    layout: Layout = each

    def at(self, i: int) -> Row:
        """Return the row of layer ``i``."""
        return replace(
            self, megatron=self.megatron.format(i=i), hf=tuple(name.format(i=i) for name in self.hf)
        )

    def hf_shapes(self, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each HF tensor."""
        sizes: dict[str | int, int] = {
            "hidden": shape.hidden_size,
            "ffn": shape.ffn_size,
            "q": shape.num_heads * shape.head_dim,
            "kv": shape.num_query_groups * shape.head_dim,
            "qkv": (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim,
            "head": shape.head_dim,
            "vocab": shape.vocab_size,
            "labels": 1,
        }
        return tuple(tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims) for dims in self.dims)


_L, _H = "decoder.layers.{i}.", "model.layers.{i}."
_QKV = tuple(_H + f"self_attn.{x}_proj." for x in "qkv")
_GATE_UP = tuple(_H + f"mlp.{x}_proj.weight" for x in ("gate", "up"))

LLAMA: tuple[Row, ...] = (
    Row(EMBEDDING, ("model.embed_tokens.weight",), (("vocab", "hidden"),), 0, vocab),
    Row(_L + "input_layernorm.weight", (_H + "input_layernorm.weight",), (("hidden",),)),
    Row(
        _L + "self_attention.linear_qkv.weight",
        tuple(name + "weight" for name in _QKV),
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
        0,
        qkv,
    ),
    Row(_L + "self_attention.linear_proj.weight", (_H + "self_attn.o_proj.weight",), (("hidden", "q"),), 1),
    Row(_L + "pre_mlp_layernorm.weight", (_H + "post_attention_layernorm.weight",), (("hidden",),)),
    Row(_L + "mlp.linear_fc1.weight", _GATE_UP, (("ffn", "hidden"), ("ffn", "hidden")), 0),
    Row(_L + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), (("hidden", "ffn"),), 1),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),)),
    Row(HEAD, ("lm_head.weight",), (("vocab", "hidden"),), 0, vocab),
)
_QKV_BIAS = Row(
    _L + "self_attention.linear_qkv.bias",
    tuple(name + "bias" for name in _QKV),
    (("q",), ("kv",), ("kv",)),
    0,
    qkv,
)
_QWEN2 = (*LLAMA[:3], _QKV_BIAS, *LLAMA[3:])
_QK_NORM = tuple(
    Row(_L + f"self_attention.{x}_layernorm.weight", (_H + f"self_attn.{x}_norm.weight",), (("head",),))
    for x in "qk"
)
_W_PACK = replace(
    LLAMA[2], hf=(_H + "self_attn.W_pack.weight",), dims=(("qkv", "hidden"),), layout=packed_qkv
)
_REWARD_HEAD = Row("reward_head.weight", ("score.weight",), (("labels", "hidden"),))
TABLES: dict[str, tuple[Row, ...]] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": (*LLAMA[:3], *_QK_NORM, *LLAMA[3:]),
    "BaichuanForCausalLM": (*LLAMA[:2], _W_PACK, *LLAMA[3:]),
    "LlamaForSequenceClassification": (*LLAMA[:-1], _REWARD_HEAD),
    "Qwen2ForSequenceClassification": (*_QWEN2[:-1], _REWARD_HEAD),
}


def rows(shape: ModelShape) -> Iterator[Row]:
    """Yield every row of the model, layer rows once per layer; tied embeddings have no output layer."""
    for row in TABLES[shape.architecture]:
        if not has_row(row.megatron, shape):
            continue
        if "{i}" in row.megatron:
            yield from (row.at(i) for i in range(shape.num_layers))
        else:
            yield row


def padded_vocab(vocab_size: int, tensor_ranks: int) -> int:
    """Return the vocabulary size rounded up to a multiple of 128 and of the tensor ranks."""
    multiple = math.lcm(128, tensor_ranks)
    return -(-vocab_size // multiple) * multiple


def rank_slices(row: Row, shape: ModelShape, tensor_rank: int, tensor_ranks: int) -> list[Slice]:
    """Return the slices whose concatenation along ``row.split`` is this rank's tensor.

    Raises:
        InputError: if the tensor ranks do not divide a dimension that they share.
    """
    sizes = [part[row.split or 0] for part in row.hf_shapes(shape)]
    rank, ranks = (0, 1) if row.split is None else (tensor_rank, tensor_ranks)
    slices: list[Slice] = []
    for block in row.layout(sizes, shape, ranks):
        total = sum(s.stop - s.start for s in block)
        if total % ranks:
            raise InputError(f"parallel.tensor must divide the {total} of {row.megatron}, got {ranks} ranks")
        slices += _cut(block, total // ranks * rank, total // ranks * (rank + 1))
    return slices


def local_shape(row: Row, shape: ModelShape, tensor_ranks: int) -> tuple[int, ...]:
    """Return the shape of one rank's tensor."""
    full = list(row.hf_shapes(shape)[0])
    full[row.split or 0] = sum(s.stop - s.start for s in rank_slices(row, shape, 0, tensor_ranks))
    return tuple(full)


def _cut(block: Sequence[Slice], start: int, stop: int) -> Iterator[Slice]:
    """Yield the parts of the concatenated slices that lie in ``[start, stop)``."""
    offset = 0
    for part, first, last in block:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            yield Slice(part, first + low - offset, first + high - offset)
        offset += last - first
