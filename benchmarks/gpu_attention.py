"""Packed and prefix-shared attention on a GPU against compiled FlexAttention and cuDNN SDPA, in one interleaved run.

``python -m benchmarks.gpu_attention`` prints each figure next to its target and appends rows to
``benchmarks/results/gpu_attention.csv``. bf16; FLOPs are those of visible pairs, backward 2.5 x forward, never tiles.
No figure is printed for a case whose error against float32 passes that of its peer by more than bf16's rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.gpu import device, environment, interleaved, quantiles, require_gpu, yardstick
from benchmarks.rows import record
from megatron_align.data.batching.context_split import attention_work
from megatron_align.errors import InputError
from megatron_align.kernels import PackedLayout, packed_attention, packed_attention_reference
from megatron_align.model.flash import Documents, find_flash

MIXED = [6000, 3500, 2500, 1500, 1000, 700, 500, 360, 200, 124]
PAIR = (4096, [512, 512])


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    Args:
        layout: of the pack.
        floors: peers, and how many times faster than each ours should be, forward and backward together.
        heads: query heads.
        groups: key/value heads.
        head_dim: of each.
    """

    layout: PackedLayout
    floors: dict[str, float] = field(default_factory=dict)
    heads: int = 32
    groups: int = 8
    head_dim: int = 128


_FLEX = {"flex": 1.8, "flex+mask": 2.5}
CASES = {
    "1x16k": Case(layout=PackedLayout.from_lengths([16384]), floors={"cudnn": 0.8}),
    "4x4k": Case(layout=PackedLayout.from_lengths([4096] * 4), floors=_FLEX),
    "mixed 16k": Case(layout=PackedLayout.from_lengths(MIXED), floors=_FLEX),
    "16x1k": Case(layout=PackedLayout.from_lengths([1024] * 16), floors=_FLEX),
    "128x128 (a losing case)": Case(layout=PackedLayout.from_lengths([128] * 128), floors={"flex": 1.8}),
    "3 pairs P4096 2x512": Case(layout=PackedLayout.from_groups([PAIR] * 3), floors={"flex": 1.9}),
}


def useful_pairs(layout: PackedLayout) -> int:
    """Return the visible (query, key) pairs of one head."""
    return int(attention_work(layout.groups, layout.tokens).sum())


def flops(case: Case, part: str) -> float:
    """Return useful FLOPs: two products forward, backward 2.5 times that."""
    of_forward = 4 * useful_pairs(case.layout) * case.heads * case.head_dim
    return of_forward * {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[part]


def flex(layout: PackedLayout) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return compiled FlexAttention over the layout: with the mask built once, and built in each call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    build = torch.compile(create_block_mask, dynamic=False)
    prefix_start, prefix_end, own_start, _ = layout.by_query

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((prefix_start[q] <= k) & (k < prefix_end[q])) | ((own_start[q] <= k) & (k <= q))

    def make():
        return build(mask_mod, None, None, layout.tokens, layout.tokens, device=device())

    made = make()

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
        out = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return (lambda q, k, v: attend(q, k, v, made)), (lambda q, k, v: attend(q, k, v, make()))


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return cuDNN's dense causal attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
    return out[0].transpose(0, 1)


def flash(case: Case) -> Callable[..., Tensor] | None:
    """Return flash-attn's attention over the layout; None: it is not installed or does not support it."""
    if any(len(completions) > 1 for _, completions in case.layout.groups):
        return None
    try:
        kernels = find_flash(case.head_dim)
    except InputError as reason:
        print(f"flash-attn is left out: {reason}")
        return None
    documents = Documents.of_layout(case.layout.to(device()))
    return lambda q, k, v: kernels(q, k, v, documents, None)


def inputs(case: Case) -> list[Tensor]:
    """Return q, k and v with a fixed seed."""
    generator = torch.Generator(device()).manual_seed(0)
    return [
        torch.randn(
            case.layout.tokens,
            heads,
            case.head_dim,
            device=device(),
            dtype=torch.bfloat16,
            generator=generator,
        ).requires_grad_()
        for heads in (case.heads, case.groups, case.groups)
    ]


def passes(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> dict[str, Callable]:
    """Return forward alone, backward alone, and both."""
    out = function(*tensors)
    return {
        "fwd": lambda: function(*tensors),
        "bwd": lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True),
        "fwd+bwd": lambda: torch.autograd.grad(function(*tensors), tensors, grad),
    }


def require_correct(head_dim: int) -> None:
    """Exit unless forward and backward are right on a small pack: figures of a wrong kernel are worthless."""
    layout = PackedLayout.from_groups([(300, [200, 77]), (0, [500])], total=1100).to(device())
    tensors = inputs(Case(layout=layout, head_dim=head_dim))
    grad = torch.randn_like(tensors[0])
    exact = [x.detach().float().requires_grad_() for x in tensors]
    got, truth = (
        [out := f(*x, layout), *torch.autograd.grad(out, x, grad.to(out.dtype))]
        for f, x in ((packed_attention, tensors), (packed_attention_reference, exact))
    )
    for name, got_t, truth_t in zip(("out", "dq", "dk", "dv"), got, truth, strict=True):
        error = ((got_t - truth_t).abs().max() / truth_t.abs().max()).item()
        if not error < 2 * torch.finfo(torch.bfloat16).eps:
            raise SystemExit(
                f"{name} at D {head_dim} is wrong by {error:.1e} of its largest value: no figures"
            )


def measure(name: str, case: Case, rounds: int, gemm: float, where: dict[str, str]) -> list[dict]:
    """Return one row per contestant and pass of the case of this name."""
    layout = case.layout.to(device())
    tensors = inputs(case)
    grad = torch.randn_like(tensors[0])
    peers: dict[str, Callable[..., Tensor]] = {"ours": lambda q, k, v: packed_attention(q, k, v, layout)}
    if "flex" in case.floors:
        peers["flex"], peers["flex+mask"] = flex(layout)
    if "cudnn" in case.floors:
        peers["cudnn"] = cudnn
    if (known := flash(case)) is not None:
        peers["flash"] = known
    made = {who: passes(function, tensors, grad) for who, function in peers.items()}
    rows = []
    for part in ("fwd", "bwd", "fwd+bwd"):
        times = interleaved({who: runs[part] for who, runs in made.items()}, rounds)
        ours = quantiles(times["ours"])[1]
        for who, each in times.items():
            p20, p50, p80 = quantiles(each)
            rate = flops(case, part) / p50 / 1e9
            rows.append(
                {
                    **where,
                    "case": name,
                    "heads": f"{case.heads}:{case.groups}",
                    "head_dim": case.head_dim,
                    "pass": part,
                    "who": who,
                    "ms_p20": f"{p20:.4f}",
                    "ms_p50": f"{p50:.4f}",
                    "ms_p80": f"{p80:.4f}",
                    "useful_tflops": f"{rate:.1f}",
                    "of_gemm": f"{rate / gemm:.3f}",
                    "ours_is_faster_by": f"{p50 / ours:.3f}",
                    "target": target(name, case, part, who),
                }
            )
    return rows


def target(name: str, case: Case, part: str, who: str) -> str:
    """Return the target of a figure in words, empty where none is set."""
    if who == "ours" and name == "4x4k" and case.head_dim == 128 and part != "fwd+bwd":
        return f"useful_tflops >= {420 if part == 'fwd' else 280}"
    wanted = case.floors.get(who)
    return f"ours_is_faster_by >= {wanted}" if wanted and part == "fwd+bwd" else ""


def shared_against_copies(rounds: int, where: dict[str, str]) -> list[dict]:
    """Return the share of the FLOPs ratio of copied to shared prompts that is gained in time (target 0.9)."""
    prompt, completions = PAIR
    layouts = {
        "shared": PackedLayout.from_groups([PAIR] * 3).to(device()),
        "copies": PackedLayout.from_lengths([prompt + c for c in completions] * 3).to(device()),
    }
    runs = {}
    for name, layout in layouts.items():
        tensors = inputs(Case(layout=layout))
        grad = torch.randn_like(tensors[0])
        runs[name] = passes(lambda q, k, v, layout=layout: packed_attention(q, k, v, layout), tensors, grad)[
            "fwd+bwd"
        ]
    times = {name: quantiles(each)[1] for name, each in interleaved(runs, rounds).items()}
    bound = useful_pairs(layouts["copies"]) / useful_pairs(layouts["shared"])
    won = times["copies"] / times["shared"]
    figures = {
        "ms_shared": times["shared"],
        "ms_copies": times["copies"],
        "speedup": won,
        "flop_ratio": bound,
    }
    figures["share_of_flop_ratio"] = won / bound
    return [{**where, **{k: f"{v:.4f}" for k, v in figures.items()}, "target": "share_of_flop_ratio >= 0.9"}]


def metadata(rounds: int, where: dict[str, str]) -> list[dict]:
    """Return the cost of a layout per batch: built on the host, then copied; block ranges need no extra kernel."""
    import time

    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        PackedLayout.from_lengths(MIXED)
        times.append((time.perf_counter() - started) * 1e6)
    layout = PackedLayout.from_lengths(MIXED)
    [copies] = interleaved({"to": lambda: layout.to(device())}, rounds).values()
    p20, p50, p80 = quantiles(times)
    return [
        {
            **where,
            "tokens": layout.tokens,
            "host_us_p20": f"{p20:.1f}",
            "host_us_p50": f"{p50:.1f}",
            "host_us_p80": f"{p80:.1f}",
            "copy_us_p50": f"{quantiles(copies)[1] * 1e3:.1f}",
            "target": "copy_us_p50 < 50",
        }
    ]


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(
        prog="gpu_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[128], help="head dimensions; run 64 separately"
    )
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    require_gpu(parser)
    where, gemm = environment(), yardstick()
    where["gemm_tflops"] = f"{gemm:.0f}"
    print(f"{where['machine']}, cuBLAS bf16 {gemm:.0f} TFLOP/s")
    for head_dim in args.head_dim:
        require_correct(head_dim)
        for case in args.case:
            chosen = replace(CASES[case], head_dim=head_dim)
            record("gpu_attention", measure(case, chosen, args.rounds, gemm, where))
    record("gpu_attention_sharing", shared_against_copies(args.rounds, where))
    record("gpu_attention_metadata", metadata(args.rounds, where))


if __name__ == "__main__":
    main()
