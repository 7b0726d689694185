"""Rows of ``benchmarks/results/NAME.csv``: each has the date and the machine that it was measured on."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

_CONDITIONS = ("date", "machine", "cores", "load", "python", "numpy", "torch", "triton", "sm_clock_and_power")
RESULTS = Path(__file__).parent / "results"
CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return the processor's model name, or where the system does not name it, its architecture."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stamp(machine: str | None = None) -> dict[str, str]:
    """Return the first columns of a row.

    Args:
        machine: what was measured, for example a GPU's name. Default: the processor.
    """
    return {"date": datetime.date.today().isoformat(), "machine": machine or processor()}


def append(name: str, rows: Sequence[dict[str, object]]) -> None:
    """Append rows to ``results/NAME.csv``.

    Raises:
        ValueError: the rows do not begin with a stamp, or the file has other columns.
    """
    columns = list(rows[0])
    if columns[:2] != ["date", "machine"]:
        raise ValueError(f"rows of {name} must begin with date and machine, got {columns[:2]}")
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "a+", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is None:
            writer.writeheader()
        elif header != columns:
            raise ValueError(f"results/{name}.csv has the columns {header}, the rows have {columns}")
        writer.writerows(rows)


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of ``results/NAME.csv``, the oldest first."""
    with open(RESULTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record(name: str, rows: Sequence[dict[str, object]]) -> None:
    """Append rows to ``results/NAME.csv`` and print what was measured."""
    append(name, rows)
    for row in rows:
        print("  ".join(f"{column}={value}" for column, value in row.items() if column not in _CONDITIONS))
