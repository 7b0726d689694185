"""Put small faults into the code, one at a time, and see whether the tests of its room notice.

    python -m tests.mutants losses --minutes 60      # begin, or go on where an earlier call ended
    python -m tests.mutants losses --again           # those that no test noticed, after tests were added
    python -m tests.mutants --table > tests/mutants.md

cosmic-ray finds the faults and keeps the results (``runs/mutants/ROOM.sqlite``). They are made in a copy of the tree,
and each is tested in a process forked from one that has imported the libraries, so that a fault costs its tests and not
ten seconds of imports. ``make mutants ROOM=losses`` installs cosmic-ray and runs this.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs" / "mutants"
COPIED = ("megatron_align", "kernels", "tools", "tests", "examples", "benchmarks", "docs", "pyproject.toml")
# A room: its source files, and the tests that belong to it, quick ones first.
ROOMS = {
    "losses": (
        ["megatron_align/losses"],
        [
            "tests/losses",
            *(f"tests/objectives/test_{name}.py" for name in ("options_used", "policy_gradient_objective")),
        ],
    ),
    "objectives": (
        ["megatron_align/objectives"],
        ["tests/objectives", "tests/losses", "tests/training/test_slabs.py"],
    ),
    "data": (["megatron_align/data"], ["tests/data"]),
    "batching": (["megatron_align/data/batching"], ["tests/data/batching", "tests/training/test_mixture.py"]),
    "training": (["megatron_align/training"], ["tests/training", "tests/monitoring"]),
    "checkpoint": (
        ["megatron_align/checkpoint"],
        ["tests/checkpoint", "tests/convert", "tests/training/test_resume.py"],
    ),
    "kernels": (
        [f"kernels/{op}" for op in ("packed_attention", "token_logprobs")],
        ["tests/ops/test_slab_loss.py", "tests/ops"],
    ),
}
GOALS = {"losses": 95, "objectives": 95, "batching": 95}  # per cent killed; of the others 90
# Triton reads these: what a fault does there is seen by tests in its interpreter, minutes each.
LEFT_OUT = (
    "forward_kernel.py",
    "backward_kernels.py",
    "softmax_kernels.py",
    "tile_ranges.py",
    "tuned_tiles.py",
)
# One fault of each kind a developer makes: an operator or a bound that is the next to the right one, a condition turned
# round, a loop that does nothing, a number off by one.
OPERATORS = [
    *(
        f"core/ReplaceBinaryOperator_{pair}"
        for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul")
    ),
    *(
        f"core/ReplaceComparisonOperator_{pair}"
        for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")
    ),
    "core/ReplaceUnaryOperator_Delete_USub",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/AddNot",
    *(f"core/Replace{pair}" for pair in ("TrueWithFalse", "FalseWithTrue", "AndWithOr", "OrWithAnd")),
    *(f"core/Replace{pair}" for pair in ("BreakWithContinue", "ContinueWithBreak")),
    "core/NumberReplacer",
    "core/ZeroIterationForLoop",
]
# (file, line without the fault, line with it) -> why no test could see it.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "megatron_align/losses/segments.py",
        "ends_C = values_N.cumsum(0)[length_C.cumsum(0).clamp(min=1) - 1] if len(values_N) else values_N",
        "ends_C = values_N.cumsum(0)[length_C.cumsum(0).clamp(min= 0) - 1] if len(values_N) else values_N",
    ): "of an empty completion, whose end no token reads",
    (
        "megatron_align/losses/advantages.py",
        'f"{int(self.size_G[alone[0]]) if len(alone) else 0} for prompt {int(alone[0]) if len(alone) else 0} of the "',
        'f"{int(self.size_G[alone[0]]) if len(alone) else -1} for prompt {int(alone[0]) if len(alone) else 0} of the "',
    ): "a number of a message that is not shown then",
    **{
        (
            "megatron_align/losses/ranked.py",
            "reward_NK = torch.where(score_NK.isnan(), 0.0, reward_NK)",
            f"reward_NK = torch.where(score_NK.isnan(), {other}, reward_NK)",
        ): "of completions that are not there: no pair has them"
        for other in ("1.0", "-1.0")
    },
}
LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "hypothesis",
    "megatron.core",
    "trl",
    "pyarrow.parquet",
    "scipy.stats",
)
LOG = "tests.log"  # in the copy: what the tests printed last
SLOWEST = 10.0  # times that the tests take without a fault, after which a fault counts as found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("room", nargs="?", choices=ROOMS)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="end after this time; a later call goes on"
    )
    parser.add_argument("--again", action="store_true", help="test those again that survived")
    parser.add_argument("--table", action="store_true", help="print the table of all rooms that were run")
    options = parser.parse_args()
    if options.table:
        print(table(), end="")
        return 0
    if options.room is None:
        parser.error("name a room, or --table")
    run(options.room, time.monotonic() + 60 * options.minutes, options.again)
    return 0


def run(room: str, until: float, again: bool) -> None:
    """Test the faults of a room that are not tested yet, or again those that survived, until a time."""
    from cosmic_ray.commands.init import _all_work_items
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    KEPT.mkdir(parents=True, exist_ok=True)
    file = KEPT / f"{room}.sqlite"
    sources, tests = ROOMS[room]
    with use_db(file, WorkDB.Mode.create) as kept, tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        tree = _copy(Path(folder))
        os.chdir(tree)
        if not kept.num_work_items:
            files = [path for source in sources for path in sorted(Path(source).rglob("*.py"))]
            items = _all_work_items([path for path in files if path.name not in LEFT_OUT], {})
            kept.add_work_items(item for item in items if item.mutations[0].operator_name in OPERATORS)
        for library in LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(library)
        began = time.monotonic()
        if _fails(tests, 3600.0, tree):
            raise SystemExit(
                f"the tests of {room} must pass without a fault:\n{(tree / LOG).read_text()[-3000:]}"
            )
        limit = 10.0 + SLOWEST * (time.monotonic() - began)
        survived = {job for job, result in kept.results if not result.is_killed}
        items = (
            [item for item in kept.work_items if item.job_id in survived]
            if again
            else kept.pending_work_items
        )
        for item in items:
            if time.monotonic() > until:
                break
            mutation = item.mutations[0]
            with _mutated(mutation) as diff:
                outcome = TestOutcome.KILLED if _fails(tests, limit, tree) else TestOutcome.SURVIVED
            kept.set_result(item.job_id, WorkResult(WorkerOutcome.NORMAL, test_outcome=outcome, diff=diff))
            print(f"{outcome.value:9} {mutation.module_path}:{mutation.start_pos[0]}", flush=True)
        print(f"{kept.num_results} of {kept.num_work_items} faults of {room} are tested")
    os.chdir(ROOT)


def _copy(folder: Path) -> Path:
    """Copy the tree; links inside it stay links."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            leave_out = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, folder / name, symlinks=True, ignore=leave_out)
        else:
            shutil.copy(source, folder / name)
    return folder


class _mutated:
    """Within the block a file of the copy has one fault; ``as`` its two lines."""

    def __init__(self, mutation: Any):
        self._mutation, self._file = mutation, Path(mutation.module_path)

    def __enter__(self) -> str:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        self._before = self._file.read_text(encoding="utf-8")
        operator = get_operator(self._mutation.operator_name)(**self._mutation.operator_args)
        after = mutate_code(self._before, operator, self._mutation.occurrence)
        assert after is not None, "cosmic-ray listed it"
        self._file.write_text(after, encoding="utf-8")
        lines = difflib.unified_diff(self._before.splitlines(), after.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if line[:3] not in ("---", "+++"))

    def __exit__(self, *_: object) -> None:
        self._file.write_text(self._before, encoding="utf-8")


def _fails(tests: list[str], limit: float, tree: Path) -> bool:
    """Return whether tests fail, in a forked process and those it starts; a time over the limit is a failure."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _test(tests, tree)
    deadline = time.monotonic() + limit
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # ranks that it left
    return os.waitstatus_to_exitcode(ended[1]) != 0


def _test(tests: list[str], tree: Path) -> None:
    """In the forked process: run the tests, and end it."""
    import pytest

    os.setpgid(0, 0)
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "megatron_align", "tools")]:
        del sys.modules[name]  # this one, as it lies in the tree without a fault
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    quiet = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not triton"]
    os._exit(pytest.main([*quiet, *tests]))


def results(room: str) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield of each tested fault: file, line number, line without it, line with it, and whether a test noticed."""
    from cosmic_ray.work_db import WorkDB, use_db

    with use_db(KEPT / f"{room}.sqlite", WorkDB.Mode.open) as kept:
        items = {item.job_id: item.mutations[0] for item in kept.work_items}
        for job, result in kept.results:
            lines = result.diff.splitlines()
            before, after = (
                " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in ("-", "+")
            )
            mutation = items[job]
            yield str(mutation.module_path), str(mutation.start_pos[0]), before, after, result.is_killed


def table() -> str:
    """Return what was run, as Markdown: counts of each room, and every fault that no test noticed."""
    from cosmic_ray.work_db import WorkDB, use_db

    rows, survivors = [], []
    for room in ROOMS:
        if not (KEPT / f"{room}.sqlite").exists():
            continue
        with use_db(KEPT / f"{room}.sqlite", WorkDB.Mode.open) as kept:
            of_room = kept.num_work_items
        counts: Counter[str] = Counter()
        for file, line, before, after, killed in results(room):
            reason = EQUIVALENT.get((file, before, after))
            if before.startswith("@dataclass("):
                reason = "a guard against mistakes in code: no number depends on it"
            kind = "killed" if killed else "equivalent" if reason else "survived"
            counts[kind] += 1
            if not killed:
                survivors.append(f"| {file}:{line} | `{before}` | `{after}` | {reason or '**survived**'} |")
        tested = counts["killed"] + counts["survived"]
        share = f"{counts['killed'] / tested:.1%}" if tested else "-"
        numbers = (of_room, counts.total(), counts["killed"], counts["survived"], counts["equivalent"])
        rows.append(f"| {room} | {' | '.join(map(str, numbers))} | {share} | {GOALS.get(room, 90)}% |")
    return "\n".join(
        (
            "# What the tests notice",
            "",
            "Small faults put into the code one at a time, as `make mutants` does (`tests/mutants.py`).",
            "",
            "| room | faults | tested | killed | survived | equivalent | share killed | goal |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Not killed, with the reason where no test can tell it from the right code:",
            "",
            "| place | right | fault | |",
            "|---|---|---|---|",
            *survivors,
            "",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
