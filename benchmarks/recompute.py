"""Count the bytes of activations under each type of recompute against ``k * n + L / k``, on CPU.

``python -m benchmarks.recompute`` runs a deep, narrow model forward and backward over one pack, prints a table and
appends it to ``benchmarks/results/recompute.csv``. Bytes are those that autograd keeps for backward (``saved_bytes``),
of the transformer layers alone: no embedding, no final norm, no head.

The unit is a boundary: the hidden states passed from one layer to the next, T x H elements. ``n`` is what a layer keeps
without recompute, in boundaries: (bytes of L layers - bytes of L / 2 layers) / (L / 2). With a checkpoint
per k merged layers L / k boundaries are kept, and k layers' activations live while they run again:
``k * n + L / k`` (arXiv:2410.14940), least at ``k = sqrt(L / n)``.

- held: kept between forward and backward. peak: the maximum kept at any time. Both in boundaries.
- formula: ``k * n + ceil(L / k)``; without recompute ``L * n``. The parts of a layer have none.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform

import torch

from benchmarks.rows import append, stamp
from benchmarks.saved_bytes import SavedBytes
from megatron_align.config import ParallelConfig
from megatron_align.kernels import PackedLayout
from megatron_align.model import parallel
from megatron_align.model.attention import PackParams
from megatron_align.model.families import ModelShape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.model.rope import rope_tables

DOCUMENTS = [37, 91, 64, 64]  # tokens of each
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=64,
    ffn_size=172,  # 8 / 3 of the hidden size, as Llama's
    num_heads=8,
    num_query_groups=2,
    head_dim=8,
    vocab_size=128,
    tied_embeddings=False,
    qkv_bias=False,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=1024,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MERGED = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
PARTS = ("attention", "mlp", "norms")


def measure(
    layers: int, dtype: torch.dtype, merged: int = 0, parts: tuple[str, ...] = ()
) -> tuple[float, float]:
    """Return the peak of saved activations, and those held between forward and backward, in boundaries."""
    shape = dataclasses.replace(SHAPE, num_layers=layers)
    config = transformer_config(shape, ParallelConfig(), dtype, merged, parts)
    [policy] = build_policy(config, shape, parallel.groups())
    decoder = policy.decoder
    decoder.final_layernorm = None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.02)
    layout = PackedLayout.from_lengths(DOCUMENTS)
    positions_T = torch.cat([torch.arange(length) for length in DOCUMENTS])
    cos_QD, sin_QD = rope_tables(positions_T, shape.rope_frequencies())
    pack = PackParams(layout=layout, cos_QD=cos_QD, sin_QD=sin_QD)
    hidden = torch.randn(layout.tokens, 1, shape.hidden_size, dtype=dtype, requires_grad=True)
    # The rotary tables and the layout are shared by all layers and are no activations.
    excluded = [*decoder.parameters(), cos_QD, sin_QD, *layout.intervals]
    counter = SavedBytes(excluded)
    with counter.watching():
        out = decoder(hidden, attention_mask=None, packed_seq_params=pack)
        held = counter.held
        out.backward(torch.ones_like(out))
    boundary = hidden.untyped_storage().nbytes()
    return counter.peak / boundary, held / boundary


def rows(layers: int, precision: str) -> list[dict[str, object]]:
    """Measure every type of recompute on a model of ``layers``."""
    dtype = DTYPES[precision]
    peak, held = measure(layers, dtype)
    n = (held - measure(layers // 2, dtype)[1]) / (layers - layers // 2)
    environment = {
        **stamp(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": precision,
        "layers": layers,
        "n": round(n, 2),
        "best_k_by_formula": round(math.sqrt(layers / n), 2),
    }
    found = [("none", peak, held, layers * n)]
    for k in MERGED:
        if k <= layers:
            found.append((f"layers {k}", *measure(layers, dtype, merged=k), k * n + math.ceil(layers / k)))
    for parts in (*((part,) for part in PARTS), PARTS):
        found.append((" + ".join(parts), *measure(layers, dtype, parts=parts), None))
    return [
        {
            **environment,
            "kind": kind,
            "peak": round(most, 1),
            "held": round(between, 1),
            "formula": "" if formula is None else round(formula, 1),
        }
        for kind, most, between, formula in found
    ]


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES))
    arguments = parser.parse_args()
    parallel.join(parallel.RankInfo(0, 0, 1), ParallelConfig())
    for precision in arguments.precision:
        for layers in arguments.layers:
            found = rows(layers, precision)
            show(found)
            append("recompute", found)
    parallel.leave()


def show(found: list[dict[str, object]]) -> None:
    """Print the figures of one model and the best k."""
    first = found[0]
    print(f"{first['layers']} layers, {first['precision']}: n = {first['n']}")
    for row in found:
        print(
            f"  {row['kind']:>24}  peak {row['peak']:>8}  held {row['held']:>8}  formula {row['formula']:>8}"
        )
    merged = [row for row in found if str(row["kind"]).startswith("layers")]
    best = min(merged, key=lambda row: row["peak"])
    print(f"  least: {best['kind']}; sqrt(L / n) = {first['best_k_by_formula']}")


if __name__ == "__main__":
    main()
