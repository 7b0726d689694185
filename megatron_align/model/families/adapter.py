"""Low-rank adapters of a model: which modules they change, and the weight-table rows of their A and B.

The names are those of PEFT. In a column-parallel layer (query, key, value, gate, up) every tensor-parallel rank holds
the complete A and its rows of B; in a row-parallel layer (output, down) its columns of A and the complete B. So ranks
exchange activations of ``rank`` columns, and any number of ranks can share an adapter of any rank. The embedding is
sharded over the vocabulary like a row-parallel layer over its inputs, the output head like a column-parallel one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from megatron_align.errors import InputError, nearest
from megatron_align.model.families.shape import ModelShape
from megatron_align.model.families.table import Row, qkv, rows, vocab
from megatron_align.model.tied_embedding import EMBEDDING, HEAD, is_tied

ALL_LINEAR = "all-linear"
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, at the end of PEFT's name
START = ".start_"  # in the names of what A and B started with, in place of .lora_
EMBED_TOKENS, LM_HEAD = "model.embed_tokens", "lm_head"
PEFT = "base_model.model."  # prefix of PEFT's tensor names
_LINEAR = (".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A low-rank adapter: ``W + scale x B A`` in place of the weight W of each module.

    Args:
        rank: rows of A, columns of B.
        alpha: numerator of the scale.
        rslora: divide by sqrt(rank) instead of rank.
        modules: Hugging Face names: of linear layers, the embedding or the output head.
        dropout: probability that an element of A's input is dropped in training.
        dora: each row of the sum is scaled to a trained magnitude.
        init: initial values, ``default`` or those of PiSSA: A and B start with a part of W, which is taken out of W.
        saved: Hugging Face names of modules of which a complete copy is trained (see ``saved_modules.py``).
    """

    rank: int
    alpha: float
    rslora: bool
    modules: frozenset[str]
    dropout: float = 0.0
    dora: bool = False
    init: str = "default"
    saved: frozenset[str] = frozenset()

    @property
    def holds_start(self) -> bool:
        """Whether the base lacks what A and B started with, and the adapter keeps it."""
        return self.init != "default"

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __str__(self) -> str:
        modules = "modules" if EMBED_TOKENS in self.modules else "linear layers"
        kind = "DoRA" if self.dora else "LoRA"
        kind += " from PiSSA" if self.holds_start else ""
        text = f"{kind} of rank {self.rank}, scale {self.scale:g}, on {len(self.modules)} {modules}"
        if self.saved:
            text += f", and all of {', '.join(sorted({name.rpartition('.')[2] for name in self.saved}))}"
        return text


def linear_rows(shape: ModelShape) -> Iterator[Row]:
    """Yield the rows of the weight table that are linear layers of the transformer, layer by layer."""
    return (row for row in rows(shape) if row.megatron.endswith(_LINEAR))


def linear_modules(shape: ModelShape) -> list[str]:
    """Return the Hugging Face names of the linear layers of the transformer, layer by layer."""
    return [module_name(name) for row in linear_rows(shape) for name in row.hf]


def adaptable_rows(shape: ModelShape) -> Iterator[Row]:
    """Yield the rows of the weight table that can have an adapter: linear layers, the embedding and the output head."""
    return (row for row in rows(shape) if row.megatron.endswith(_LINEAR) or row.megatron in (EMBEDDING, HEAD))


def adaptable_modules(shape: ModelShape) -> list[str]:
    """Return the Hugging Face names of all modules that can have an adapter."""
    return [module_name(name) for row in adaptable_rows(shape) for name in row.hf]


def adapter_tensors(module: str) -> tuple[str, str]:
    """Return PEFT's names of A and B of a module."""
    if module == EMBED_TOKENS:
        return f"{PEFT}{module}.lora_embedding_A", f"{PEFT}{module}.lora_embedding_B"
    return f"{PEFT}{module}.lora_A.weight", f"{PEFT}{module}.lora_B.weight"


def is_low_rank(tensor: str) -> bool:
    """Return whether a tensor of an adapter, by PEFT's name, is an A, a B or a magnitude, not a complete module's."""
    return ".lora_" in tensor


def module_of(tensor: str) -> str:
    """Return the Hugging Face module of A or B by PEFT's name of it."""
    return tensor.removeprefix(PEFT).partition(".lora_")[0]


def module_name(tensor: str) -> str:
    """Return the Hugging Face module of a tensor: ``model.norm`` of ``model.norm.weight``."""
    return tensor.rpartition(".")[0]


def layer_of(row: Row) -> int | None:
    """Return the number of the layer that a row's tensor belongs to; None: of no layer."""
    return int(row.megatron.split(".")[2]) if row.megatron.startswith("decoder.layers.") else None


def matches(name: str, pattern: str) -> bool:
    """Return whether a name, or the end of one after a dot, matches a pattern: ``q_proj``, ``layers.1.mlp.*``."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select_modules(shape: ModelShape, targets: str | Sequence[str]) -> frozenset[str]:
    """Return the modules that ``model.adapter.targets`` names; all-linear: the linear layers of the transformer.

    Raises:
        InputError: a name matches nothing, or something that cannot be a target.
    """
    if targets == ALL_LINEAR:
        return frozenset(linear_modules(shape))
    modules = adaptable_modules(shape)
    others = {module_name(name) for row in rows(shape) for name in row.hf} | {LM_HEAD}
    selected: set[str] = set()
    for pattern in targets:
        found = {name for name in modules if matches(name, pattern)}
        refused = sorted(name for name in others - set(modules) if matches(name, pattern))
        if refused == [LM_HEAD]:
            reason = (
                "is tied to embed_tokens: PEFT would adapt the head alone, and merging that would change both"
            )
            if shape.is_reward:
                reason = "a reward model does not have"
            raise InputError(
                f"model.adapter.targets must not name lm_head, which {reason} ('{pattern}' matches it)"
            )
        if refused:
            raise InputError(
                f"model.adapter.targets must be linear layers, embed_tokens or lm_head, '{pattern}' matches "
                f"{refused[0]}: adapters of others are not built; model.adapter.modules_to_save trains norms completely"
            )
        if not found:
            known = sorted({name.rpartition(".")[2] for name in modules})
            raise InputError(
                f"model.adapter.targets: '{pattern}' matches no linear layer of {shape.architecture}, which has "
                f"{', '.join(known)}{nearest(pattern, known)}"
            )
        selected |= found
    _require_no_tied(shape, selected)
    return frozenset(selected)


def _require_no_tied(shape: ModelShape, selected: set[str]) -> None:
    """Refuse an embedding that is tied to the output head, and a head whose rows the model normalises."""
    if EMBED_TOKENS in selected and is_tied(shape):
        raise InputError(
            "model.adapter.targets must not name embed_tokens where it is tied to lm_head, as in this model: PEFT "
            "would adapt the embedding alone, and merging that would change both"
        )
    if LM_HEAD in selected and shape.norm_head:
        raise InputError(
            f"model.adapter.targets must not name lm_head of {shape.architecture}, which normalises its rows"
        )


def adapter_rows(row: Row, shape: ModelShape, adapter: Adapter, tensor_ranks: int) -> list[tuple[Row, ...]]:
    """Return the rows of A and B, and of DoRA's magnitude, of each adapted Hugging Face module of a layer.

    Args:
        row: of the layer's weight.
        shape: of the model.
        adapter: its modules are looked up.
        tensor_ranks: that share the layer.
    """
    if row.megatron == EMBEDDING:
        return _embedding_rows(row, adapter)
    found: list[tuple[Row, ...]] = []
    base = row.megatron.removesuffix("weight")
    for name, (out, into) in zip(row.hf, row.dims, strict=True):
        module = module_name(name)
        if module not in adapter.modules:
            continue
        short, (name_a, name_b) = module.rpartition(".")[2], adapter_tensors(module)
        column = row.split == 0
        split_b: int | None = 0 if column else None
        if row.layout is qkv and tensor_ranks > shape.num_query_groups:
            split_b = None  # ranks share a key/value head: their rows of B differ in number, so each holds all of them
        a = Row(
            f"{base}adapter.{short}.lora_A",
            (name_a,),
            ((adapter.rank, into),),
            None if column else 1,
        )
        layout = row.layout if len(row.hf) == 1 else a.layout
        b = Row(
            f"{base}adapter.{short}.lora_B",
            (name_b,),
            ((out, adapter.rank),),
            split_b,
            layout,
        )
        name_m = f"{PEFT}{module}{MAGNITUDE}"
        magnitude = Row(f"{base}adapter.{short}.magnitude", (name_m,), ((out,),), split_b, layout)
        found.append((a, b, magnitude) if adapter.dora else (a, b))
    return found


def start_row(row: Row) -> Row:
    """Return the row of what A or B started with, by that of A or B."""
    return replace(
        row,
        megatron=row.megatron.replace(".lora_", START),
        hf=tuple(name.replace(".lora_", START) for name in row.hf),
    )


def start_rows(shape: ModelShape, adapter: Adapter, tensor_ranks: int) -> Iterator[Row]:
    """Yield the rows of what every A and B started with, where the base lacks it."""
    for row in adaptable_rows(shape) if adapter.holds_start else ():
        for a, b, *_ in adapter_rows(row, shape, adapter, tensor_ranks):
            yield from (start_row(a), start_row(b))


def _embedding_rows(row: Row, adapter: Adapter) -> list[tuple[Row, ...]]:
    if EMBED_TOKENS not in adapter.modules:
        return []
    names = adapter_tensors(EMBED_TOKENS)
    base = f"{row.megatron.removesuffix('weight')}adapter.embed_tokens."
    a = Row(f"{base}lora_A", (names[0],), ((adapter.rank, "vocab"),), 1, vocab)
    return [(a, Row(f"{base}lora_B", (names[1],), (("hidden", adapter.rank),)))]


def all_adapter_rows(shape: ModelShape, adapter: Adapter, tensor_ranks: int) -> Iterator[Row]:
    """Yield the rows of every A and B of an adapter, in the order of the model."""
    for row in adaptable_rows(shape):
        for pair in adapter_rows(row, shape, adapter, tensor_ranks):
            yield from pair
