"""The pictures of the docs are those of the rows in ``benchmarks/results``, byte for byte, and a page shows each."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import pictures, rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", pictures.DRAWN)
def test_a_picture_is_that_of_the_rows(name):
    text = (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert text == pictures.DRAWN[name]()
    assert len(text) < 20_000
    ElementTree.fromstring(text)


def test_every_picture_is_shown():
    page = (ROOT / "docs" / "baichuan_alignment.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(pictures/(\w+)\.svg\)", page)
    assert sorted(shown) == sorted(pictures.DRAWN)
    assert sorted(path.stem for path in pictures.PICTURES.iterdir()) == sorted(pictures.DRAWN)


def test_a_dot_is_where_its_value_is():
    """Of an axis from 0 to 100 the middle is half-way, and higher values are further up."""
    drawn = pictures.Picture("title", "%", (0, 100), ["one"])
    drawn.dots(0.5, [0, 50, 100], 0)
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn.svg())]
    assert heights[0] == pictures.HEIGHT - pictures.BOTTOM
    assert heights[2] == pictures.TOP
    assert heights[1] == (heights[0] + heights[2]) / 2


def test_rows_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.append("some", [{**rows.stamp("a, b"), "x": 1}])
    [row] = rows.read("some")
    assert (row["machine"], row["x"]) == ("a, b", "1")
