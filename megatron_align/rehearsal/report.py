"""The result of a rehearsed rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_align.rehearsal.ledger import Ledger, Wait

STEP = "step"  # phases of a training step start with this
HOLDERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """The record of one rank of a run: its memory, waits, faults and work on a GPU.

    Args:
        stage: pipeline stage.
        rank: in the run.
        micro_batches: of the rehearsed step.
        tokens: of each pack.
        planned: bytes of tensors at the peak, as ``plan`` counts them.
        peak: the rehearsed ones, from the building of the model to the end of the step.
        peaks: the same by phase.
        holders: bytes at the peak by the lines of code that allocated most.
        waits: of the step: kind, place and number of each.
        faults: what would fail on a GPU.
        launches: Triton kernels of the rehearsal, by name.
        collectives: of the step, by name.
        product_flops: of the step's matrix products.
        bytes_outside: that the step's other operations read and write, collectives left out.
        largest: the operations that move most of them, by name.
    """

    stage: int
    rank: int
    micro_batches: int
    tokens: int
    planned: int
    peak: int
    peaks: dict[str, int]
    holders: dict[str, int]
    waits: list[tuple[str, str, int]]
    faults: list[str]
    launches: dict[str, int]
    collectives: dict[str, int]
    product_flops: int
    bytes_outside: int
    largest: dict[str, int]

    @classmethod
    def of(cls, ledger: Ledger, **known: int) -> RankReport:
        """Return the report of a ledger; ``known``: stage, rank, micro_batches, tokens and planned."""
        peaks = ledger.peaks()
        work = ledger.work.get(STEP, {})
        outside = {
            name: own.bytes for name, own in work.items() if not own.flops and not name.startswith("c10d::")
        }
        largest = sorted(outside.items(), key=lambda item: -item[1])
        waits: list[tuple[Wait, int]] = list(ledger.waits.get(STEP, {}).items())
        return cls(
            **known,
            peak=max(peaks.values(), default=0),
            peaks=peaks,
            holders=dict(ledger.holders().most_common(HOLDERS)),
            waits=[(wait.kind, wait.place, count) for wait, count in waits],
            faults=[f"{count} times {fault}" for fault, count in ledger.faults.items()],
            launches=dict(ledger.launches),
            collectives=dict(ledger.collectives.get(STEP, {})),
            product_flops=sum(own.flops for own in work.values()),
            bytes_outside=sum(outside.values()),
            largest=dict(largest[:HOLDERS]),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)
