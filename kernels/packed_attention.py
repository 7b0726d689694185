"""Attention over packed documents and shared prompts: each token sees two intervals, no mask exists.

Token ``t`` attends to ``[prefix_start_t, prefix_end_t)`` and ``[own_start_t, t]``. Three int32 per token
describe packed documents (empty prefix), preference pairs and groups of completions of one prompt.

Shapes: T tokens of a pack, H query heads, G key/value heads, D head dim, S tokens of one document,
P prompt tokens, C tokens of one completion.
Precision: scores and softmax in fp32 at least, result in the input dtype.
The Triton kernel is not written yet: every device runs the per-document PyTorch path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Who attends to whom in one pack of T tokens.

    ``groups`` is the same on the host: ``(prompt length, completion lengths)`` in order of position; a
    plain document is ``(0, (length,))``. Tokens after the last group are padding: each sees only itself.
    """

    prefix_start_T: Tensor  # int32
    prefix_end_T: Tensor  # int32
    own_start_T: Tensor  # int32
    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], total: int | None = None) -> PackedLayout:
        """Lay out causal documents one after the other.

        Args:
            lengths: tokens of each document.
            total: T; what the documents leave of it is padding. Default: their sum.

        Raises:
            ValueError: on a negative length, or documents longer than ``total``.
        """
        return cls.from_groups([(0, [length]) for length in lengths], total)

    @classmethod
    def from_groups(
        cls, groups: Sequence[tuple[int, Sequence[int]]], total: int | None = None
    ) -> PackedLayout:
        """Lay out ``prompt | completion | completion ...``, the prompt stored once per group.

        Args:
            groups: ``(prompt length, [completion lengths])`` of each group.
            total: T, as in :meth:`from_lengths`.

        Raises:
            ValueError: as :meth:`from_lengths`.
        """
        kept = tuple((int(prompt), tuple(int(c) for c in completions)) for prompt, completions in groups)
        negative = [length for prompt, completions in kept for length in (prompt, *completions) if length < 0]
        if negative:
            raise ValueError(f"PackedLayout needs lengths >= 0; got {negative[0]}")
        used = sum(prompt + sum(completions) for prompt, completions in kept)
        total = used if total is None else total
        if used > total:
            raise ValueError(f"PackedLayout needs total >= the sum of lengths; got total {total}, sum {used}")
        # One run of tokens shares (prefix_start, prefix_end, own_start): lengths and values per run.
        runs: list[tuple[int, int, int, int]] = []
        start = 0
        for prompt, completions in kept:
            runs.append((prompt, start, start, start))
            own = start + prompt
            for length in completions:
                runs.append((length, start, start + prompt, own))
                own += length
            start = own
        lengths, *columns = torch.tensor(runs, dtype=torch.int64).reshape(-1, 4).T
        tail = torch.arange(used, total)
        intervals = [torch.cat([torch.repeat_interleave(c, lengths), tail]).to(torch.int32) for c in columns]
        return cls(*intervals, groups=kept)

    @property
    def tokens(self) -> int:
        """T: tokens the layout covers, padding included."""
        return self.own_start_T.shape[0]

    def to(self, device: torch.device | str) -> PackedLayout:
        """Return the layout with its intervals on ``device``."""
        moved = (
            t.to(device, non_blocking=True)
            for t in (self.prefix_start_T, self.prefix_end_T, self.own_start_T)
        )
        return PackedLayout(*moved, groups=self.groups)

    def mask_TT(self) -> Tensor:
        """Return the dense boolean mask ``[T query, T key]``: for references and pictures only."""
        key = torch.arange(self.tokens, device=self.own_start_T.device)
        query = key[:, None]
        prefix = (self.prefix_start_T[:, None] <= key) & (key < self.prefix_end_T[:, None])
        own = (self.own_start_T[:, None] <= key) & (key <= query)
        return prefix | own


# 1. Reference: what the operation means. Runs anywhere; every test compares against it.
def packed_attention_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Dense-mask attention, differentiable, T x T memory. Arguments as :func:`packed_attention`."""
    heads_per_group = q_THD.shape[1] // k_TGD.shape[1]
    exact = torch.promote_types(q_THD.dtype, torch.float32)
    q_HTD, k_HTD, v_HTD = (
        x.to(exact).repeat_interleave(repeats, dim=1).transpose(0, 1)
        for x, repeats in ((q_THD, 1), (k_TGD, heads_per_group), (v_TGD, heads_per_group))
    )
    scores_HTT = q_HTD @ k_HTD.transpose(1, 2) * (q_THD.shape[-1] ** -0.5 if scale is None else scale)
    weights_HTT = scores_HTT.masked_fill(~layout.mask_TT(), float("-inf")).softmax(-1)
    return (weights_HTT @ v_HTD).transpose(0, 1).to(q_THD.dtype)


# 2. Per-document path: PyTorch's own attention on each causal document; prefixes concatenated.
def _attend(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, scale: float, mask_SS: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHD, k_SHD, v_SHD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, is_causal=mask_SS is None, scale=scale)
    return out[0].transpose(0, 1)


def _per_document(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    outputs = []
    start = 0
    for prompt, completions in layout.groups:
        # The prompt and its first completion are one causal document.
        trunk = slice(start, start + prompt + sum(completions[:1]))
        if trunk.stop > trunk.start:
            outputs.append(_attend(q_THD[trunk], k_THD[trunk], v_THD[trunk], scale, None))
        own_start = trunk.stop
        for length in completions[1:]:
            own = slice(own_start, own_start + length)
            if length:
                see_CS = torch.ones(length, prompt + length, dtype=torch.bool, device=q_THD.device).tril(
                    prompt
                )
                k_SHD, v_SHD = (torch.cat([x[start : start + prompt], x[own]]) for x in (k_THD, v_THD))
                outputs.append(_attend(q_THD[own], k_SHD, v_SHD, scale, see_CS))
            own_start += length
        start = own_start
    outputs.append(v_THD[start:])  # padding: softmax over the token alone is 1
    return torch.cat(outputs)


# 3. Public: the only names other modules import. Checks once, says what it needs.
def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Attend within each packed document, and from completions to their shared prompt.

    Args:
        q_THD: ``[T, H, D]`` queries, last dimension contiguous.
        k_TGD: ``[T, G, D]`` keys; query head h reads key head ``h // (H // G)``.
        v_TGD: ``[T, G, D]`` values.
        layout: who attends to whom; covers exactly T tokens.
        scale: factor on the scores. Default: ``D ** -0.5``.

    Returns:
        ``[T, H, D]`` in the input dtype. Differentiable in q, k and v.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit each other or the layout.
    """
    _check(q_THD, k_TGD, v_TGD, layout)
    heads_per_group = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_TGD, v_TGD))
    return _per_document(q_THD, k_THD, v_THD, layout, q_THD.shape[-1] ** -0.5 if scale is None else scale)


def _check(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout) -> None:
    shapes = [tuple(x.shape) for x in (q_THD, k_TGD, v_TGD)]
    if [len(s) for s in shapes] != [3, 3, 3] or shapes[1] != shapes[2] or shapes[0][::2] != shapes[1][::2]:
        raise ValueError(f"packed_attention needs q [T, H, D] and k, v [T, G, D]; got q, k, v {shapes}")
    if shapes[1][1] == 0 or shapes[0][1] % shapes[1][1]:
        raise ValueError(f"packed_attention needs H a multiple of G; got H {shapes[0][1]}, G {shapes[1][1]}")
    kinds = {(x.dtype, x.device) for x in (q_THD, k_TGD, v_TGD)}
    if len(kinds) > 1:
        raise ValueError(
            f"packed_attention needs q, k, v of one dtype on one device; got {sorted(map(str, kinds))}"
        )
    if layout.tokens != shapes[0][0]:
        raise ValueError(
            f"packed_attention needs a layout of T = {shapes[0][0]} tokens; it covers {layout.tokens}"
        )
    if any(x.stride(-1) != 1 for x in (q_THD, k_TGD, v_TGD) if x.numel() > 1):
        strides = list(chain(x.stride() for x in (q_THD, k_TGD, v_TGD)))
        raise ValueError(f"packed_attention needs the last dimension contiguous; got strides {strides}")
