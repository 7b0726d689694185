"""Every row of a benchmark names the date and the machine it was measured on, and all scripts write rows one way."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks import rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted((BENCHMARKS / "results").glob("*.csv"))
SCRIPTS = [path for path in sorted(BENCHMARKS.rglob("*.py")) if path.name != "rows.py"]
OF_OLD_SCRIPTS = {"dpo"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_names_its_machine(file):
    with open(file, newline="", encoding="utf-8") as lines:
        header, *body = csv.reader(lines)
    assert header[:2] == ["date", "machine"]
    assert body
    assert all(
        len(row) == len(header) and re.fullmatch(r"\d{4}-\d\d-\d\d", row[0]) and row[1] for row in body
    )


def test_scripts_write_rows_through_the_shared_helper():
    """A script that opens a CSV of its own could leave the machine out."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS}
    assert [
        name for name, source in sources.items() if "csv.DictWriter" in source or "import csv" in source
    ] == []
    recorded = {
        name for source in sources.values() for name in re.findall(r'(?:append|record)\(\s*"(\w+)"', source)
    }
    assert recorded >= {file.stem for file in FILES} - OF_OLD_SCRIPTS


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "some.csv"


def test_the_processor_is_named_by_its_model(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654: 96-Core\nmodel name\t: another\n")
    monkeypatch.setattr(rows, "CPUINFO", file)
    assert rows.processor() == "AMD EPYC 9654: 96-Core"
    assert rows.stamp()["machine"] == "AMD EPYC 9654: 96-Core"
    assert rows.stamp("NVIDIA H200")["machine"] == "NVIDIA H200"
    monkeypatch.setattr(rows, "CPUINFO", tmp_path / "absent")
    assert rows.processor()


def test_rows_are_appended_under_one_header(results):
    rows.append("some", [{**rows.stamp("a"), "x": 1}, {**rows.stamp("b"), "x": 2}])
    rows.append("some", [{**rows.stamp("c, d"), "x": 3}])
    with open(results, newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    assert [(row["machine"], row["x"]) for row in found] == [("a", "1"), ("b", "2"), ("c, d", "3")]


def test_rows_without_a_machine_or_with_other_columns_are_refused(results):
    rows.append("some", [{**rows.stamp("a"), "x": 1}])
    before = results.read_bytes()
    with pytest.raises(ValueError, match="must begin with date and machine"):
        rows.append("some", [{"date": "2026-01-01", "x": 1}])
    with pytest.raises(ValueError, match="has the columns"):
        rows.append("some", [{**rows.stamp("a"), "y": 1}])
    assert results.read_bytes() == before
