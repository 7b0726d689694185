"""The log-prob engine on one GPU, bf16: against bare GEMMs, full logits under torch.compile, and Liger's fused losses.

``python -m benchmarks.gpu_logprobs`` measures, prints and appends to ``benchmarks/results/gpu_logprobs.csv``.
Contestants of one comparison run in turn, A B C A B C, in one process on the same tensors; a figure is the median with
p20 and p80. Nothing is measured if our loss or gradients are further from fp32 than 1.2 times PyTorch's own in bf16.

- ce: supervised loss and both gradients. ``gemms``: the three products alone (6 NHV), the yardstick.
- dpo: pairs, the reference's log-probs computed in the same call (8 NHV). Liger: ``LigerFusedLinearDPOLoss``.
- score: log-probs alone, 2 NHV.
- shards: ce with V / k rows of the vocabulary, no communication: T(V) / (k T(V / k)). Compute scaling, not TP scaling.
- memory: peak above inputs, weight and returned gradients, for 8k to 64k rows.

The weight's gradient goes into an fp32 ``main_grad``, as in training; Liger and PyTorch return theirs in bf16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import device, environment, interleaved, quantiles, require_gpu
from benchmarks.rows import record
from megatron_align.kernels import slab_loss, slab_loss_reference, slab_rows, token_logprobs

BETA = 0.1
Call = Callable[[], object]


class Case:
    """Tensors of one size, and every contestant as a call without arguments."""

    def __init__(self, rows: int, hidden: int, vocab: int, pair_rows: int = 1024):
        torch.manual_seed(0)
        options = {"device": device(), "dtype": torch.bfloat16}
        self.rows, self.hidden_size, self.vocab, self.pair_rows = rows, hidden, vocab, pair_rows
        self.hidden = torch.randn(rows, hidden, **options).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, **options) / hidden**0.5).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), device=device())
        self.reference_weight = self.weight.detach() + 0.01 * torch.randn_like(self.weight)
        self.main_grad = torch.zeros(vocab, hidden, device=device())

    def slabs(self, group: int) -> list[tuple[int, int]]:
        """Cut rows into slabs of complete groups of ``group`` rows."""
        most = max(group, slab_rows(self.weight) // group * group)
        return [(at, min(at + most, self.rows)) for at in range(0, self.rows, most)]

    def tokens(self, i: int, logprobs_n: Tensor, _: dict) -> tuple[Tensor, dict]:
        """Supervised loss."""
        return -logprobs_n.sum() / self.rows, {}

    def pairs(self, reference_N: Tensor) -> Callable[..., tuple[Tensor, dict]]:
        """DPO: pairs of ``pair_rows`` rows, first half chosen."""
        slabs = self.slabs(self.pair_rows)

        def loss(i: int, logprobs_n: Tensor, _: dict) -> tuple[Tensor, dict]:
            ratio_P2 = (logprobs_n - reference_N[slice(*slabs[i])]).view(-1, 2, self.pair_rows // 2).sum(2)
            losses_P = -F.logsigmoid(BETA * (ratio_P2[:, 0] - ratio_P2[:, 1]))
            return losses_P.sum() * self.pair_rows / self.rows, {}

        return loss

    def ce(self) -> list[Tensor]:
        """Ours: loss, both gradients."""
        self.weight.main_grad = self.main_grad
        value, _ = slab_loss(self.hidden, self.weight, self.targets, self.slabs(1), self.tokens)
        value.backward()
        return [value, self.take(self.hidden), self.main_grad]

    def dpo(self) -> list[Tensor]:
        """Ours, with a live reference."""
        self.weight.main_grad = self.main_grad
        with torch.no_grad():
            reference_N = token_logprobs(self.hidden, self.reference_weight, self.targets)
        loss = self.pairs(reference_N)
        value, _ = slab_loss(self.hidden, self.weight, self.targets, self.slabs(self.pair_rows), loss)
        value.backward()
        return [value, self.take(self.hidden), self.main_grad]

    def score(self) -> Tensor:
        """Ours: log-probs alone."""
        with torch.no_grad():
            return token_logprobs(self.hidden, self.weight, self.targets)

    def take(self, tensor: Tensor) -> Tensor:
        """Return a tensor's gradient and reset it (ours leaves a placeholder at the weight)."""
        self.weight.grad, grad = None, tensor.grad
        tensor.grad = None
        return grad

    def gemms(self) -> Call:
        """The three products over all rows."""
        logits = self.hidden.detach() @ self.weight.detach().T
        out = torch.empty_like(self.weight), torch.empty_like(self.hidden)

        def run() -> None:
            torch.mm(self.hidden.detach(), self.weight.detach().T, out=logits)
            torch.mm(logits, self.weight.detach(), out=out[1])
            torch.mm(logits.T, self.hidden.detach(), out=out[0])

        return run

    def naive(self) -> Call:
        """Full logits under torch.compile, the same rows."""

        @torch.compile(dynamic=False)
        def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy((hidden @ weight.T).float(), targets)

        def run() -> list[Tensor]:
            value = loss(self.hidden, self.weight, self.targets)
            return [value, *torch.autograd.grad(value, (self.hidden, self.weight))]

        return run

    def liger_ce(self) -> Call:
        """Liger's fused linear cross-entropy, dW in fp32 where this release can."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        layer = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

        def run() -> list[Tensor]:
            value = layer(self.weight, self.hidden, self.targets)
            return [value, *torch.autograd.grad(value, (self.hidden, self.weight))]

        return run

    def liger_dpo(self) -> Call:
        """Liger's fused linear DPO: chosen sequences first, then rejected ones."""
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        layer = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=True, compute_nll_loss=False)
        length = self.pair_rows // 2

        def chosen_first(tensor: Tensor) -> Tensor:
            pairs = tensor.unflatten(0, (-1, 2, length))
            return torch.cat([pairs[:, 0], pairs[:, 1]])

        hidden, targets = chosen_first(self.hidden.detach()).requires_grad_(), chosen_first(self.targets)

        def run() -> list[Tensor]:
            value, *_ = layer(
                self.weight, hidden, targets, ref_input=hidden.detach(), ref_weight=self.reference_weight
            )
            return [value, *torch.autograd.grad(value, (hidden, self.weight))]

        return run


def gate(rows: int = 256, hidden: int = 512, vocab: int = 8192) -> None:
    """Check ours against fp32 before anything is timed.

    Raises:
        SystemExit: if an error is over 1.2 times that of PyTorch in bf16.
    """
    case = Case(rows, hidden, vocab, pair_rows=64)
    wide = [t.detach().float().requires_grad_() for t in (case.hidden, case.weight)]
    slabs = case.slabs(64)
    for loss in (case.tokens, case.pairs(torch.zeros(rows, device=device()))):
        case.main_grad.zero_()
        case.weight.main_grad = case.main_grad
        value, _ = slab_loss(case.hidden, case.weight, case.targets, slabs, loss)
        value.backward()
        ours = [value, case.take(case.hidden), case.main_grad]
        truth, same = (
            [value, *torch.autograd.grad(value, tensors)]
            for tensors in (wide, [case.hidden, case.weight])
            for value in [slab_loss_reference(*tensors, case.targets, slabs, loss)[0]]
        )
        for name, got, near, exact in zip(("loss", "dX", "dW"), ours, same, truth, strict=True):
            error, allowed = ((t.float() - exact).abs().max().item() for t in (got, near))
            if error > 1.2 * allowed + 1e-6:
                raise SystemExit(f"no figures: error of {name} {error:.3e}, PyTorch in bf16 {allowed:.3e}")


def peak(call: Call, returned: int) -> float:
    """Return the peak GiB above the memory allocated before and the ``returned`` bytes of the call's result."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**30


def compare(name: str, case: Case, calls: dict[str, Call], products: float, samples: int) -> list[dict]:
    """Return a row per contestant."""
    flops = products * case.rows * case.hidden_size * case.vocab
    rows = []
    for who, ms in interleaved(calls, samples).items():
        p20, p50, p80 = quantiles(ms)
        figures = {"ms_p20": f"{p20:.3f}", "ms_p50": f"{p50:.3f}", "ms_p80": f"{p80:.3f}"}
        rows.append(_row(name, who, case, **figures, tflops=f"{flops / p50 / 1e9:.0f}"))
    return rows


def _row(name: str, who: str, case: Case, **figures: object) -> dict[str, object]:
    return {
        "what": name,
        "who": who,
        "rows": case.rows,
        "hidden": case.hidden_size,
        "vocab": case.vocab,
        **figures,
    }


def _liger() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Args:
        rows: scored rows, a multiple of ``pair_rows``.
        hidden: of the model.
        vocab: rows of the output layer.
        samples: of each figure.
        pair_rows: of a pair.
        lengths: numbers of rows whose peak memory is measured too; none on a CPU, which counts no tensors' bytes.
        compiled: whether full logits under torch.compile are a contestant.
    """

    rows: int = 16384
    hidden: int = 4096
    vocab: int = 128256
    samples: int = 30
    pair_rows: int = 1024
    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536)
    compiled: bool = True


def measure(sizes: Sizes) -> list[dict]:
    """Return all rows."""
    case = Case(sizes.rows, sizes.hidden, sizes.vocab, sizes.pair_rows)
    ce: dict[str, Call] = {"gemms": case.gemms(), "ours": case.ce}
    dpo: dict[str, Call] = {"ours": case.dpo}
    if sizes.compiled:
        ce["compiled_full_logits"] = case.naive()
    if _liger() and device() == "cuda":
        ce[f"liger {_liger()} LigerFusedLinearCrossEntropyLoss"] = case.liger_ce()
        dpo[f"liger {_liger()} LigerFusedLinearDPOLoss"] = case.liger_dpo()
    else:
        print("liger-kernel is not installed: its rows are missing")
    rows = compare("ce", case, ce, 6, sizes.samples)
    rows += compare("dpo", case, dpo, 8, sizes.samples)
    rows += compare("score", case, {"ours": case.score}, 2, sizes.samples)
    gradients = case.hidden.nbytes + case.weight.nbytes
    for name, calls in (("ce", ce), ("dpo", dpo)) if sizes.lengths else ():
        for who, call in calls.items():
            if who != "gemms":
                returned = case.hidden.nbytes if who == "ours" else gradients
                rows.append(_row(f"memory {name}", who, case, peak_gib=f"{peak(call, returned):.3f}"))
    del case, ce, dpo
    for count in sizes.lengths:
        long = Case(count, sizes.hidden, sizes.vocab)
        rows.append(_row("memory ce", "ours", long, peak_gib=f"{peak(long.ce, long.hidden.nbytes):.3f}"))
        del long
    return rows + shards(sizes)


def shards(sizes: Sizes) -> list[dict]:
    """Return the rows of a half, a quarter and an eighth of the vocabulary."""
    cases = {k: Case(sizes.rows, sizes.hidden, sizes.vocab // k, sizes.pair_rows) for k in (1, 2, 4, 8)}
    found = interleaved({str(k): shard.ce for k, shard in cases.items()}, sizes.samples)
    median = {k: quantiles(found[str(k)])[1] for k in cases}
    rows = []
    for k, shard in cases.items():
        share = median[1] / (k * median[k])
        rows.append(_row("shards", f"1/{k}", shard, ms_p50=f"{median[k]:.3f}", efficiency=f"{share:.3f}"))
    return rows


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(
        prog="gpu_logprobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16384, help="a multiple of 1,024, the rows of a pair")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=30)
    options = parser.parse_args()
    require_gpu(parser)
    gate()
    sizes = Sizes(rows=options.rows, hidden=options.hidden, vocab=options.vocab, samples=options.samples)
    rows = measure(sizes)
    columns = dict.fromkeys(name for row in rows for name in row)  # rows have different figures
    environment_columns = {**environment(), "liger": _liger() or ""}
    record(
        "gpu_logprobs",
        [{**environment_columns, **{name: row.get(name, "") for name in columns}} for row in rows],
    )


if __name__ == "__main__":
    main()
