"""Split data by the values of a field, with the weights that give each value its share of an epoch."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_align.curation.records import BadRecords, read_records
from megatron_align.errors import InputError, listed, nearest, require
from megatron_align.storage.atomic_write import commit_folder, partial_folder, require_new

MIXTURE = "mixture.json"
NONE = "none"  # value of records without the field
MOST_VALUES = 200  # files that are open at once


@dataclass(frozen=True, slots=True)
class Part:
    """The records with one value: their file, number, passes per epoch, and share of an epoch's samples."""

    value: str
    file: str
    records: int
    weight: float
    share: float


def split(
    data: str, by: str, out: str, shares: Mapping[str, float], weights: Mapping[str, float]
) -> list[Part]:
    """Write the records of each value of a field to a file of its own, and ``mixture.json`` for ``data.train``.

    Args:
        data: file, folder or glob pattern.
        by: name of the field.
        out: folder to write.
        shares: of an epoch's samples, by value; values without one keep their weight.
        weights: passes over a value's records per epoch; 1 where neither is given.

    Raises:
        InputError: bad data, values or output; nothing is written then.
    """
    target = require_new(out)
    _require_shares(shares, weights)
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)  # a killed split starts again
    try:
        parts = _split(data, by, partial, shares, weights)
        sources = [{"path": str(target / part.file), "weight": part.weight} for part in parts]
        text = json.dumps(sources, ensure_ascii=False, indent=2)
        (partial / MIXTURE).write_text(f"{text}\n", encoding="utf-8")
        commit_folder(partial, target)
    except InputError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return parts


def _split(
    data: str, by: str, folder: Path, shares: Mapping[str, float], weights: Mapping[str, float]
) -> list[Part]:
    """Write the files of the values into a new folder."""
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    files: dict[str, str] = {}
    with ExitStack() as opened:
        outputs: dict[str, IO[str]] = {}
        for record in read_records(data, BadRecords()):
            raw, where = record.raw, record.where
            value = _value(raw.get(by), where, by)
            if value not in outputs:
                line = f"{where}: field '{by}' must have at most {MOST_VALUES} values, got more"
                require(len(outputs) < MOST_VALUES, line)
                files[value] = _file_of(value, set(files.values()))
                outputs[value] = opened.enter_context(open(folder / files[value], "w", encoding="utf-8"))
            counts[value] += 1
            outputs[value].write(json.dumps(raw, ensure_ascii=False) + "\n")
    for name in (*shares, *weights):
        known = f"its values are {listed(sorted(counts))}{nearest(name, counts)}"
        require(name in counts, f"no record has '{name}' in the field '{by}', {known}")
    passes = passes_of(counts, shares, weights)
    total = sum(passes[value] * count for value, count in counts.items())
    return [
        Part(value, files[value], count, passes[value], passes[value] * count / total)
        for value, count in sorted(counts.items())
    ]


def passes_of(
    counts: Mapping[str, int], shares: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, float]:
    """Return the passes over each value's records per epoch that give the shares.

    With ``R`` samples of the values without a share an epoch has ``R / (1 - sum of shares)`` samples; if every value
    has a share, as many as there are records.
    """
    passes = {value: weights.get(value, 1.0) for value in counts if value not in shares}
    rest = sum(passes[value] * counts[value] for value in passes)
    left = 1 - sum(shares.values())
    if passes:
        require(left > 1e-9, f"shares must leave some to {listed(sorted(passes))}, got a sum of {1 - left:g}")
    else:
        require(abs(left) < 1e-6, f"shares of every value must sum to 1, got {1 - left:g}")
    total = rest / left if passes else float(sum(counts.values()))
    passes |= {value: round(share * total / counts[value], 9) for value, share in shares.items()}
    for value, weight in passes.items():
        require(
            weight >= 1e-9, f"the share of '{value}' gives less than a pass in 1e9 epochs, got {weight:g}"
        )
    return passes


def _require_shares(shares: Mapping[str, float], weights: Mapping[str, float]) -> None:
    both = sorted(shares.keys() & weights.keys())
    require(not both, f"a value has a share or a weight, got both for {listed(both)}")
    for name, share in shares.items():
        require(0 < share <= 1, f"the share of '{name}' must be in (0, 1], got {share:g}")
    for name, weight in weights.items():
        require(1e-9 <= weight <= 1e6, f"the weight of '{name}' must be within 1e-9 and 1e6, got {weight:g}")
    total = sum(shares.values())
    require(total <= 1 + 1e-9, f"shares must sum to at most 1, got {total:g}")


def _value(value: object, where: str, by: str) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, (str, int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise InputError(f"{where}: field '{by}' must be a text, a number, true or false, to split data by it")


def _file_of(value: str, taken: set[str]) -> str:
    name = re.sub(r"[^\w.-]+", "_", value)[:80].strip("._") or "value"
    number, file = 1, f"{name}.jsonl"
    while file in taken:
        number, file = number + 1, f"{name}_{number + 1}.jsonl"
    return file
