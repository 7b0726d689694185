"""The report of ``megatron-align prepare``: report.json, lengths.png, report.html, and a sample on the terminal."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_align.data.report import SampleSection

Shown = tuple[int, list["SampleSection"]]  # index and sections of a sample
FILES = ("report.json", "lengths.png", "report.html")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}
td:first-child{white-space:nowrap}
td+td{font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:1rem;border-radius:6px}
mark{background:#b9e6c0;border-radius:2px}h3{margin-bottom:.3rem}img{max-width:100%}.note{color:#666}"""


def write_report(folder: Path, numbers: dict[str, Any], samples: list[Shown]) -> None:
    """Write the report's files, with these samples, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    draw_lengths(numbers, folder / "lengths.png")
    page = to_html(numbers, samples, (folder / "lengths.png").read_bytes())
    (folder / "report.html").write_text(page, encoding="utf-8")


def draw_lengths(numbers: dict[str, Any], file: Path) -> None:
    """Draw the histogram of sample lengths, all and trained tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, colour in (
        ("lengths", "all tokens", "#4c78a8"),
        ("trained_per_sample", "trained tokens", "#54a24b"),
    ):
        column = numbers[name]
        counts, edges = column["histogram"]["counts"], column["histogram"]["edges"]
        axes.stairs(counts, edges, fill=True, alpha=0.45, color=colour, label=label)
        axes.axvline(column["mean"], color=colour, linewidth=1, label=f"mean {column['mean']:,.0f}")
    if numbers["lengths"]["max"] > 0.5 * numbers["sequence_length"]:
        axes.axvline(
            numbers["sequence_length"],
            color="#333",
            linestyle="--",
            linewidth=1,
            label=f"sequence_length {numbers['sequence_length']:,}",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("samples")
    axes.set_title(f"{numbers['samples']:,} samples, {numbers['tokens']:,} tokens", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)


def rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers that people look at, as (name, text)."""
    lengths, packing = numbers["lengths"], numbers["packing"]
    tokens, attention = packing["tokens_imbalance"], packing["attention_imbalance"]
    shown = [
        ("data", f"{numbers['kind']}, shape {', '.join(numbers['shapes'])}"),
        ("samples", f"{numbers['samples']:,}"),
        ("tokens", f"{numbers['tokens']:,}"),
        ("trained tokens", f"{numbers['scored_tokens']:,} ({numbers['trained_share']:.1%})"),
        (
            "length",
            f"mean {lengths['mean']:,.0f}, median {lengths['p50']:,.0f}, 99% within {lengths['p99']:,.0f}, "
            f"longest {lengths['max']:,}",
        ),
        (
            "left out",
            f"{numbers['dropped']:,} dropped as too long, {numbers['skipped']:,} skipped as malformed",
        ),
        *dropped_lengths(numbers["dropped_lengths"]),
        ("truncated", f"{numbers['truncated']:,}"),
        (
            "layout",
            f"{packing['ranks']} data-parallel ranks, packs of {packing['pack_length']:,} tokens, "
            f"{packing['global_batch_size']:,} samples a step",
        ),
        (
            "fill",
            f"{packing['fill']:.2%} of the computed tokens are samples', {packing['padding']:.2%} padding "
            f"({packing['fill_without_packing']:.1%} with one padded row per sample)",
        ),
        ("imbalance of tokens", f"max/mean over ranks {tokens['mean']:.3f} (worst step {tokens['max']:.3f})"),
        (
            "imbalance of attention",
            f"max/mean over ranks {attention['mean']:.3f} (worst step {attention['max']:.3f})",
        ),
    ]
    if numbers["duplicated_tokens"] != numbers["tokens"]:
        saved = 1 - numbers["tokens"] / numbers["duplicated_tokens"]
        shown.insert(4, ("prompts shared", f"{saved:.1%} fewer tokens than with a prompt per completion"))
    if len(numbers["sources"]) > 1:
        shown += [
            (f"source {source['path']}", f"{source['samples']:,} samples, {source['tokens']:,} tokens")
            for source in numbers["sources"]
        ]
    return shown


def dropped_lengths(samples_of_length: dict[str, int]) -> list[tuple[str, str]]:
    """Return the lengths of the dropped samples: how long ``data.sequence_length`` must be to keep half, 90%, all."""
    lengths = sorted((int(length), samples) for length, samples in samples_of_length.items())
    total, shares = sum(samples for _, samples in lengths), []
    for share in (0.5, 0.9, 1.0):
        kept = 0
        for length, samples in lengths:
            kept += samples
            if kept >= share * total:
                shares.append(f"{share:.0%} within {length:,}")
                break
    return [("lengths of the dropped", f"{', '.join(shares)} tokens")] if lengths else []


def to_html(numbers: dict[str, Any], samples: list[Shown], picture: bytes) -> str:
    """Return the report as one self-contained page."""
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in rows(numbers)
    )
    image = base64.b64encode(picture).decode()
    shown = "".join(
        f"<h2>Sample {index}</h2>"
        + "".join(
            f"<h3>{html.escape(section.title)}</h3><pre>{_marked(section)}</pre>" for section in sections
        )
        for index, sections in samples
    )
    examples = "".join(
        f"<h3>{html.escape(what)}</h3><pre>{html.escape(chr(10).join(lines))}</pre>"
        for what, lines in numbers["examples"].items()
        if lines
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data report</title><style>{_STYLE}</style>'
        f"<h1>Data report</h1><table>{table}</table>"
        f'<p><img alt="histogram of sample lengths" src="data:image/png;base64,{image}"></p>'
        f'<p class="note">Tokens on <mark>green</mark> are trained on.</p>{shown}'
        + (f"<h2>Left out or cut (the first of each)</h2>{examples}" if examples else "")
        + "</html>\n"
    )


def _marked(section: SampleSection) -> str:
    return "".join(
        f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)
        for text, trained in section.runs
    )


def to_terminal(sections: list[SampleSection], colours: bool) -> str:
    """Return a sample with its trained tokens in colour, or between ⟦ and ⟧."""
    before, after = ("\x1b[30;42m", "\x1b[0m") if colours else ("⟦", "⟧")
    lines = []
    for section in sections:
        lines.append(f"--- {section.title} ---")
        lines.append(
            "".join(
                f"{before}{_plain(text)}{after}" if trained else _plain(text)
                for text, trained in section.runs
            )
        )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return the text with control characters escaped, which a terminal would interpret."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
