"""``megatron-align data dedup|label|select|mix``: work on data files before training. Also ``python tools/data.py``.

Exit code: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align data"
ABOUT = "Work on data files of any shape before training, record by record: JSONL out, in the same order."
COMMANDS = {
    "dedup": "remove near duplicates",
    "label": "add columns: quality, category",
    "select": "select by difficulty and diversity: bounds of a column, the best of each cluster of embeddings",
    "mix": "split by a column's values, with weights that give each value its share",
}
_MORE = "See docs/data.md."
_EMBEDDER = (
    "column:NAME (lists of numbers), FILE.py:FUNCTION, or a Hugging Face folder (mean of last hidden states)"
)


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``data``; return the exit code."""
    from megatron_align.tools.command import Parser, choose

    name, rest = choose(PROGRAM, ABOUT, COMMANDS, arguments)
    parser = Parser(f"{PROGRAM} {name}", f"{COMMANDS[name].capitalize()}.\n\n{_DETAILS[name]}\n{_MORE}")
    parser.add_argument("--data", required=True, metavar="PATH", help="file, folder or glob pattern")
    folder = name == "mix"
    about = "folder to write: new or empty" if folder else "JSONL file to write; must not exist"
    parser.add_argument("--out", required=True, metavar="DIR" if folder else "FILE", help=about)
    _ADD[name](parser)
    options = parser.parse(rest)
    from megatron_align.storage.atomic_write import require_one_process

    require_one_process()
    print(_RUN[name](options))
    return 0


_DETAILS = {
    "dedup": """A record whose text is nearly that of an earlier one is left out: MinHash-LSH proposes pairs, the exact
Jaccard similarity of their 5-character shingles decides. Needs the extra pas (datasketch).""",
    "label": """A killed run continues when the same command is run again; no request to an endpoint is sent twice.
A model is named as URL#NAME, FILE.py:FUNCTION, or a folder.""",
    "select": """Clusters are layered: a record joins the most similar leader of a layer whose cosine reaches the
layer's threshold, or leads a new cluster, and the next layer divides it. The best records of each cluster of the last
layer are kept, with the field cluster.""",
    "mix": """DIR has a file for each value, and mixture.json: sources with weights, for data.train of a run, whose
config.yaml then records them. A share is of an epoch's samples, a weight is passes over a value's records per epoch
(default: 1).""",
}


def _add_text(parser: Parser) -> None:
    about = "text that is judged: the prompt (of a conversation the user's first turn), or all texts (default: prompt)"
    parser.add_argument("--of", choices=("prompt", "record"), default="prompt", help=about)
    about = "malformed records, and those without this text: refuse, or leave out and count (default: error)"
    parser.add_argument("--on-bad-record", choices=("error", "skip"), default="error", help=about)


def _bad(count: int) -> str:
    return f", {count:,} bad records left out" if count else ""


def _add_dedup(parser: Parser) -> None:
    about = "similarity from which a record duplicates an earlier one: Jaccard's of shingles (default: 0.7)"
    parser.add_argument("--duplicates", type=float, default=0.7, metavar="J", help=about)
    parser.add_argument(
        "--embeddings", metavar="EMBEDDER", help=f"compare cosines of embeddings: {_EMBEDDER}"
    )
    _add_text(parser)


def _dedup(options: argparse.Namespace) -> str:
    from megatron_align.curation.dedup import dedup

    skip_bad = options.on_bad_record == "skip"
    more = {"embeddings": options.embeddings, "skip_bad": skip_bad}
    counts = dedup(options.data, options.out, options.duplicates, options.of, **more)
    left_out = f"{counts.records - counts.kept:,} near duplicates left out"
    return f"{counts.kept:,} of {counts.records:,} records kept, {left_out}{_bad(counts.bad)}: {options.out}"


def _add_label(parser: Parser) -> None:
    from megatron_align.tools.pas import add_chat

    add = parser.add_argument
    about = "column quality, by: FILE.py:FUNCTION, a reward model, URL#NAME or a language model"
    add("--quality", metavar="SCORER", help=about)
    about = "column category, by: FILE.py:FUNCTION, a classifier, URL#NAME or a language model"
    add("--labels", metavar="LABELLER", help=about)
    about = "categories among which an endpoint or a language model chooses"
    add("--categories", nargs="+", default=[], metavar="NAME", help=about)
    _add_text(parser)
    about = "replies that are requested until one can be read (default: 3)"
    add("--tries", type=int, default=3, metavar="N", help=about)
    add(
        "--failures",
        type=int,
        default=10,
        metavar="N",
        help="requests that may fail after all tries (default: 10)",
    )
    add_chat(parser)


def _label(options: argparse.Namespace) -> str:
    from megatron_align.curation.label import LabelOptions, label
    from megatron_align.tools.pas import chat_of

    names = ("data", "out", "quality", "labels", "of", "tries", "failures")
    given = {name: getattr(options, name) for name in names}
    given["skip_bad"] = options.on_bad_record == "skip"
    counts = label(LabelOptions(**given, categories=tuple(options.categories), chat=chat_of(options)))
    lines = [f"{counts.records:,} records{_bad(counts.bad)}: {options.out}"]
    if options.quality is not None:
        lines.append(f"without quality: {counts.unscored:,}")
    if options.labels is not None:
        lines += [
            f"  {count:>8,}  {name or 'without category'}" for name, count in counts.categories.most_common()
        ]
    return "\n".join(lines)


def _add_select(parser: Parser) -> None:
    add = parser.add_argument
    add("--difficulty", metavar="COLUMN", help="field with a number, which --easiest and --hardest bound")
    add("--easiest", type=float, metavar="X", help="leave out records below")
    add("--hardest", type=float, metavar="X", help="leave out records above")
    add("--embeddings", metavar="EMBEDDER", help=_EMBEDDER)
    about = "cosine thresholds of the layers of clusters, increasing (default: 0.6 0.75 0.9)"
    add("--layers", type=float, nargs="+", default=[0.6, 0.75, 0.9], metavar="C", help=about)
    add(
        "--per-cluster",
        type=int,
        default=1,
        metavar="N",
        help="records of a cluster that are kept (default: 1)",
    )
    about = "field with a number: the highest of a cluster are kept (default: the first)"
    add("--best", metavar="COLUMN", help=about)
    add(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="of a text that a model embeds (default: 512)",
    )
    _add_text(parser)


def _select(options: argparse.Namespace) -> str:
    from megatron_align.curation.select import SelectOptions, select

    names = (
        "data",
        "out",
        "difficulty",
        "easiest",
        "hardest",
        "embeddings",
        "per_cluster",
        "best",
        "of",
        "max_tokens",
    )
    given = {name: getattr(options, name) for name in names} | {"skip_bad": options.on_bad_record == "skip"}
    counts = select(SelectOptions(**given, layers=tuple(options.layers)))
    line = f"{counts.selected:,} of {counts.records:,} records selected{_bad(counts.bad)}"
    if options.difficulty is not None:
        line += f"; left out: {counts.too_easy:,} too easy, {counts.too_hard:,} too hard"
    if options.embeddings is not None:
        layers = ", ".join(
            f"{n:,} (cosine {c:g})" for n, c in zip(counts.clusters, options.layers, strict=True)
        )
        line += f"; {counts.redundant:,} redundant in clusters: {layers}"
    return f"{line}: {options.out}"


def _add_mix(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--by",
        required=True,
        metavar="COLUMN",
        help="field whose values are weighted; records without it: none",
    )
    add("--share", nargs="+", default=[], metavar="VALUE=S", help="share of an epoch's samples, in (0, 1]")
    add("--weight", nargs="+", default=[], metavar="VALUE=W", help="passes over a value's records per epoch")


def _mix(options: argparse.Namespace) -> str:
    from megatron_align.curation.mixture import MIXTURE, split

    shares, weights = _numbers(options.share, "--share"), _numbers(options.weight, "--weight")
    parts = split(options.data, options.by, options.out, shares, weights)
    width = max(len(part.value) for part in parts)
    lines = [f"{'value':{width}}   records    weight     share"]
    lines += [f"{p.value:{width}}  {p.records:>8,}  {p.weight:>8.4g}  {p.share:>8.1%}" for p in parts]
    file = Path(options.out) / MIXTURE
    return "\n".join([*lines, f'for a run: --data.train "$(cat {file})"'])


def _numbers(given: Sequence[str], option: str) -> dict[str, float]:
    """Read ``VALUE=NUMBER`` arguments."""
    from megatron_align.errors import InputError

    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise InputError(f"{option} must be VALUE=NUMBER, got {text[:80]}") from None
    return found


_ADD = {"dedup": _add_dedup, "label": _add_label, "select": _add_select, "mix": _add_mix}
_RUN = {"dedup": _dedup, "label": _label, "select": _select, "mix": _mix}


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["data", *sys.argv[1:]]))
