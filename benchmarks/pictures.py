"""Draw the pictures of ``docs/baichuan_alignment.md`` from the rows in ``benchmarks/results``.

``python -m benchmarks.pictures`` writes ``docs/pictures/NAME.svg``; the same rows give the same bytes.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.rows import read
from megatron_align.tools.report_charts import Scale, tick_texts

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 46, 46  # of the plotting area
COLOURS = ("#2563a8", "#d1722b", "#3c8a5a", "#8a4d9e")
INK, GRID = "#222", "#ddd"
FIELDS = ("sums", "sorting", "strings", "format", "open")  # of the recipe's questions
Row = Mapping[str, str]


class Picture:
    """A chart with a title, a legend and a vertical axis; shapes are added one after the other.

    Args:
        title: above the chart.
        unit: of the vertical axis.
        limits: its ends.
        names: of the series, in the order of the colours.
    """

    def __init__(self, title: str, unit: str, limits: tuple[float, float], names: Sequence[str]):
        self._up = Scale(*limits, HEIGHT - BOTTOM, TOP)
        self._parts = [_text(LEFT, 16, title, weight="bold"), _text(8, TOP - 8, unit)]
        for y, text in zip(self._up.ticks(), tick_texts(self._up.ticks()), strict=True):
            at = self._up(y)
            self._parts.append(_line(LEFT, at, WIDTH - RIGHT, at, GRID))
            self._parts.append(_text(LEFT - 6, at + 4, text, "end"))
        x = LEFT + 45.0
        for i, name in enumerate(names):
            self._parts.append(
                f'<rect x="{x:.1f}" y="{TOP - 17}" width="10" height="10" fill="{COLOURS[i]}"/>'
            )
            self._parts.append(_text(x + 14, TOP - 8, name))
            x += 24 + 6.2 * len(name)

    def across(self, place: float) -> float:
        """Return the horizontal coordinate of a place from 0, left, to 1, right."""
        return LEFT + place * (WIDTH - RIGHT - LEFT)

    def label(self, place: float, text: str, line: int = 0) -> None:
        """Write a label of the horizontal axis."""
        self._parts.append(_text(self.across(place), HEIGHT - BOTTOM + 16 + 14 * line, text, "middle"))

    def bar(self, place: float, width: float, value: float, series: int, text: str) -> None:
        """Draw a bar, with its value as text above it."""
        top, bottom = self._up(value), HEIGHT - BOTTOM
        x, wide = self.across(place - width / 2), width * (WIDTH - RIGHT - LEFT)
        self._parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{bottom - top:.1f}" fill="{COLOURS[series]}"/>'
        )
        self._parts.append(_text(self.across(place), top - 4, text, "middle"))

    def dots(self, place: float, values: Sequence[float], series: int) -> None:
        """Draw a dot of each value at one place, and a short line at the mean of several."""
        x, mean = self.across(place), self._up(statistics.fmean(values))
        if len(values) > 1:
            self._parts.append(_line(x - 13, mean, x + 13, mean, COLOURS[series], 2))
        self._parts += [
            f'<circle cx="{x:.1f}" cy="{self._up(value):.1f}" r="4" fill="{COLOURS[series]}" fill-opacity="0.6"/>'
            for value in values
        ]

    def curve(self, points: Sequence[tuple[float, float]], series: int, dashed: bool = False) -> None:
        """Draw a line through points of place and value."""
        at = " ".join(f"{self.across(x):.1f},{self._up(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{at}" fill="none" stroke="{COLOURS[series]}" stroke-width="2"{dash}/>'
        )

    def svg(self) -> str:
        """Return the picture's file."""
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
        )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    style = ' font-weight="bold"' if weight == "bold" else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}"{style}>{html.escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _newest(rows: Sequence[Row], **wanted: str) -> Row:
    """Return the last row with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())][-1]


def packing() -> str:
    """Draw the share of useful tokens, padded and packed."""
    rows = read("packing")
    widths = ("0.8", "1.0")
    drawn = Picture(
        "Useful tokens of a step of 512 samples, drawn lengths",
        "%",
        (0, 100),
        [f"log width {w}" for w in widths],
    )
    columns = (
        ("padded to the", "step's longest", "padded_to_longest_share", "1"),
        ("padded,", "8 a micro-batch", "padded_by_8_share", "1"),
        ("packed,", "1 rank", "share", "1"),
        ("packed,", "32 ranks", "share", "32"),
    )
    for i, (first, second, column, ranks) in enumerate(columns):
        place = (i + 0.5) / len(columns)
        drawn.label(place, first)
        drawn.label(place, second, 1)
        for series, width in enumerate(widths):
            row = _newest(rows, samples="512", sigma=width, data_parallel=ranks)
            share = 100 * float(row[column])
            drawn.bar(place + (series - 0.5) * 0.09, 0.08, share, series, f"{share:.1f}")
    return drawn.svg()


def recompute() -> str:
    """Draw the peak of activations over merged layers, measured and by the formula."""
    rows = [row for row in read("recompute") if row["precision"] == "fp32" and row["layers"] == "128"]
    day = max(row["date"] for row in rows)
    found = [row for row in rows if row["date"] == day and row["kind"].startswith("layers")]
    found = [row for row in found if int(row["kind"].split()[1]) <= 12]
    title = (
        f"Peak of activations, 128 layers with n = {float(found[0]['n']):.1f}: k merged layers a checkpoint"
    )
    drawn = Picture(title, "boundaries", (0, 320), ("measured", "k n + L / k"))
    merged = [int(row["kind"].split()[1]) for row in found]
    places = {k: (k - 0.5) / (max(merged) + 0.5) for k in merged}
    for k in merged:
        drawn.label(places[k], str(k))
    drawn.label(0.5, "k", 1)
    drawn.curve([(places[k], float(row["formula"])) for k, row in zip(merged, found, strict=True)], 1, True)
    for k, row in zip(merged, found, strict=True):
        drawn.dots(places[k], [float(row["peak"])], 0)
    return drawn.svg()


def policies() -> str:
    """Draw the mean of right answers of each policy over the seeds."""
    rows = [row for row in read("alignment_policies") if "PAS" not in row["policy"]]
    names = list(dict.fromkeys(row["policy"] for row in rows))
    drawn = Picture(
        "Right answers to held-out questions; a dot is a seed", "%", (0, 100), ("mean of the fields", "sums")
    )
    for i, name in enumerate(names):
        place = (i + 0.5) / len(names)
        first, _, second = name.partition(", ")
        drawn.label(place, first)
        drawn.label(place, second, 1)
        own = [row for row in rows if row["policy"] == name]
        for series, column in enumerate(("mean", "sums")):
            values = [100 * float(row[column]) for row in own]
            drawn.dots(place + (series - 0.5) * 0.03, values, series)
    return drawn.svg()


def pas() -> str:
    """Draw the gain of PAS in each field, of every run of the recipe."""
    rows = read("recipe")
    title = "Right answers of the recipe's last model with and without PAS"
    drawn = Picture(title, "%", (0, 100), ("without", "with PAS"))
    for i, field in enumerate(FIELDS):
        place = (i + 0.5) / len(FIELDS)
        drawn.label(place, field)
        for series, model in enumerate(("grpo", "grpo with pas")):
            values = [100 * float(row[field]) for row in rows if row["model"] == model]
            drawn.dots(place + (series - 0.5) * 0.06, values, series)
    return drawn.svg()


def rewards() -> str:
    """Draw accuracy of reward models over the passes, on the pairs that they train on and on held-out ones."""
    rows = read("alignment_passes")
    seeds = len({row["seed"] for row in rows})
    names = [f"{pairs}, alpha {a}" for a in ("0", "0.5") for pairs in ("trained", "held out")]
    title = f"Accuracy of reward models over passes of {rows[0]['trained_pairs']} pairs; seeds: {seeds}"
    drawn = Picture(title, "%", (50, 100), names)
    passes = sorted({int(row["pass"]) for row in rows})
    place = {one: (i + 0.5) / len(passes) for i, one in enumerate(passes)}
    for one in passes:
        drawn.label(place[one], str(one))
    drawn.label(0.5, "pass", 1)
    series = 0
    for alpha in ("0", "0.5"):
        for column in ("trained_accuracy", "held_out_accuracy"):
            own = [row for row in rows if row["alpha"] == alpha]
            means = [
                statistics.fmean(float(row[column]) for row in own if int(row["pass"]) == one)
                for one in passes
            ]
            points = [(place[one], 100 * mean) for one, mean in zip(passes, means, strict=True)]
            drawn.curve(points, series, dashed=column == "trained_accuracy")
            series += 1
    return drawn.svg()


DRAWN: dict[str, Callable[[], str]] = {
    "packing": packing,
    "recompute": recompute,
    "policies": policies,
    "pas": pas,
    "rewards": rewards,
}


def main() -> None:
    """Draw all pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
