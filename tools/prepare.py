"""``megatron-align prepare``: tokenise before training and report on the data. Also ``python tools/prepare.py``.

Exit code: 0 done (``--check``: the store is intact), 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_align.data.report import PackingSetup
    from megatron_align.data.store import TokenStore
    from megatron_align.data.tokenize.cache_key import StoreSpec
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align prepare"
ABOUT = """Tokenise data into a memory-mapped store that training reuses.

Either --config run.yaml, for the data of a run, or --tokenizer, --data, --sequence-length and --cache. If nothing
changed, a second run does nothing; a killed run is resumed. Needs no GPU and no torchrun."""
_REQUIRED = ("tokenizer", "data", "sequence_length", "cache")
_FEW = 3  # examples of samples that are too long, on the terminal; the report lists more
_OPTIONAL = (
    "shape",
    "columns",
    "chat_template",
    "template_date",
    "train_turns",
    "drop_fields",
    "too_long",
    "on_bad_record",
)


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``prepare``; return the exit code."""
    from megatron_align.tools.command import Parser

    parser = Parser(PROGRAM, ABOUT)
    _arguments(parser)
    options = parser.parse(arguments)
    if "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # other processes may be using them
    _quiet_transformers()
    from megatron_align.data.store import TokenStore
    from megatron_align.data.tokenize.prepare import prepare

    for split, spec, setup in _requested(options):
        store = TokenStore(prepare(spec), verify=options.check)
        print(_counts(split, store, options.check))
        if options.report:
            folder = Path(options.report) / ("" if split == "train" else split)
            _report(store, spec, setup, _samples(store, options, split), folder)
    return 0


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        metavar="RUN.yaml",
        help="run configuration: its training and validation data are prepared",
    )
    _data_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="also read the entire store and verify the SHA-256 of its files"
    )
    _report_arguments(parser)


def _data_arguments(parser: Parser) -> None:
    from megatron_align.tools.command import positive_count

    add = parser.add_argument
    add("--tokenizer", metavar="DIR", help="Hugging Face folder with the tokenizer")
    add("--data", nargs="+", metavar="PATH", help="files, folders or glob patterns; each is one source")
    add("--sequence-length", type=positive_count, metavar="N", help="longest sample, in tokens")
    add("--cache", metavar="DIR", help="folder where stores are kept")
    add("--shape", help="shape of the records (default: recognised from each file's first record)")
    add(
        "--columns",
        nargs="+",
        type=_column,
        metavar="FIELD=COLUMN",
        help="columns with other names in the files, as prompt=question; NAME= leaves column NAME alone",
    )
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add(
        "--template-date",
        metavar="DATE",
        help="date that the chat template reads from the clock (default: now)",
    )
    add(
        "--train-turns",
        choices=("all", "last"),
        help="turns of conversations that are trained (default: all)",
    )
    add(
        "--drop-fields",
        nargs="+",
        metavar="NAME",
        help="fields of turns to leave out (reasoning_content, tools)",
    )
    add(
        "--too-long",
        choices=("error", "drop", "truncate"),
        help="what to do with longer samples (default: error)",
    )
    add(
        "--on-bad-record",
        choices=("error", "skip"),
        help="what to do with malformed records (default: error)",
    )
    add(
        "--processes",
        type=positive_count,
        metavar="N",
        help="number of tokenising processes (default: one per core, 1 for little data)",
    )


def _report_arguments(parser: Parser) -> None:
    from megatron_align.tools.command import positive_count

    add = parser.add_argument
    add("--report", metavar="DIR", help="write report.html, report.json and lengths.png, and show a sample")
    add("--ranks", type=positive_count, metavar="N", help="report: data-parallel ranks (default: 1)")
    add(
        "--pack-length",
        type=positive_count,
        metavar="L",
        help="report: tokens of a pack (default: sequence length)",
    )
    add(
        "--global-batch-size",
        type=positive_count,
        metavar="B",
        help="report: samples of a step (default: 16)",
    )
    add(
        "--sample", type=int, nargs="+", metavar="I", help="report: indices of the samples shown (default: 0)"
    )
    add(
        "--random-samples",
        type=positive_count,
        metavar="N",
        help="report: also show this many samples chosen at random",
    )
    add("--seed", type=int, default=0, help="report: of the random choice (default: 0)")


def _column(text: str) -> tuple[str, str | None]:
    name, equals, column = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be FIELD=COLUMN, got {text}")
    return name, column or None


def _requested(options: argparse.Namespace) -> list[tuple[str, StoreSpec, PackingSetup]]:
    """Return ``(split, spec, setup)`` of every requested store."""
    from megatron_align.errors import InputError

    given = [_flag(name) for name in (*_REQUIRED, *_OPTIONAL) if getattr(options, name) is not None]
    if options.config:
        if given:
            raise InputError(f"{PROGRAM}: --config already names the data, got {', '.join(given)} as well")
        return _of_run(options)
    missing = [_flag(name) for name in _REQUIRED if getattr(options, name) is None]
    if missing:
        raise InputError(
            f"{PROGRAM} needs --config, or {', '.join(map(_flag, _REQUIRED))}; got no {missing[0]}"
        )
    from megatron_align.data.report import PackingSetup
    from megatron_align.data.tokenize.cache_key import StoreSpec

    spec = StoreSpec(
        sources=tuple(options.data),
        tokenizer=options.tokenizer,
        sequence_length=options.sequence_length,
        too_long=options.too_long or "error",
        cache=options.cache,
        shape=options.shape,
        columns=dict(options.columns or []),
        chat_template=options.chat_template,
        template_date=options.template_date,
        train_turns=options.train_turns or "all",
        drop_fields=tuple(sorted(set(options.drop_fields or ()))),
        on_bad_record=options.on_bad_record or "error",
        processes=options.processes,
    )
    setup = PackingSetup(
        ranks=options.ranks or 1,
        pack_length=options.pack_length or options.sequence_length,
        global_batch_size=options.global_batch_size or 16,
    )
    return [("train", spec, setup)]


def _of_run(options: argparse.Namespace) -> list[tuple[str, StoreSpec, PackingSetup]]:
    import dataclasses

    from megatron_align.data.batching.sampler import passes_per_epoch
    from megatron_align.data.report import PackingSetup
    from megatron_align.data.tokenize.cache_key import StoreSpec
    from megatron_align.objectives.configuration import parse
    from megatron_align.training.setup import locate

    config = parse(["--config", options.config])
    _, tokenizer = locate(config.model.path, weights=False)
    requested = []
    for split in ("train", "validation"):
        spec = StoreSpec.of_run(config, split, str(tokenizer))
        if spec is None:
            continue
        setup = PackingSetup(
            ranks=options.ranks or 1,
            pack_length=options.pack_length or config.data.sequence_length,
            global_batch_size=options.global_batch_size or config.train.global_batch_size or 16,
            share_prefix=config.data.share_prefix,
            packing=config.data.packing,
            seed=config.train.seed,
            passes=passes_per_epoch(getattr(config.data, split)),
        )
        requested.append((split, dataclasses.replace(spec, processes=options.processes), setup))
    return requested


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _counts(split: str, store: TokenStore, checked: bool) -> str:
    from megatron_align.data.formats.columns import fields_text

    manifest: dict[str, Any] = store.manifest
    lines = [
        f"{split}: {store.path}",
        f"  {store.kind} data, shape {', '.join(manifest['shapes'])}: {manifest['samples']:,} samples, "
        f"{manifest['tokens']:,} tokens, {manifest['scored_tokens']:,} trained",
        f"  fields: {fields_text(manifest)}",
        f"  {manifest['dropped']:,} dropped as too long, {manifest['truncated']:,} truncated, "
        f"{manifest['skipped']:,} skipped as malformed",
    ]
    for reason, examples in manifest["examples"].items():
        shown = examples if reason == "skipped" else examples[:_FEW]
        lines += [f"    {reason}: {line}" for line in shown]
        if manifest[reason] > len(shown) > 0:
            lines.append(f"    and {manifest[reason] - len(shown):,} more {reason}")
    if len(manifest["sources"]) > 1:
        lines += [
            f"  {s['path']}: {s['samples']:,} samples, {s['tokens']:,} tokens" for s in manifest["sources"]
        ]
    if checked:
        lines.append("  intact: every file matches the SHA-256 in the manifest")
    return "\n".join(lines)


def _samples(store: TokenStore, options: argparse.Namespace, split: str) -> list[int]:
    """Return the indices of the samples to show."""
    import random

    from megatron_align.errors import InputError

    # The indices that the user gives are of the training data.
    chosen = options.sample if options.sample is not None and split == "train" else [0]
    if options.random_samples:
        others = sorted(set(range(len(store))) - set(chosen)) if len(store) < 10_000 else range(len(store))
        count = min(options.random_samples, len(others))
        picked = sorted(random.Random(options.seed).sample(others, count))
        chosen = picked if options.sample is None else [*chosen, *picked]
    for index in chosen:
        if not 0 <= index < len(store):
            raise InputError(f"--sample must be within 0..{len(store) - 1}, got {index}")
    return list(dict.fromkeys(chosen))


def _report(
    store: TokenStore, spec: StoreSpec, setup: PackingSetup, indices: list[int], folder: Path
) -> None:
    from megatron_align.data.report import rendered, report
    from megatron_align.data.tokenize.tokenizer import load_tokenizer
    from megatron_align.tools.prepare_report import rows, to_terminal, write_report

    numbers, tokenizer = report(store, setup), load_tokenizer(spec.tokenizer)
    samples = [(index, rendered(store.sample(index), tokenizer)) for index in indices]
    write_report(folder, numbers, samples)
    shown = rows(numbers)
    width = max(len(name) for name, _ in shown)
    print("\n".join(f"  {name:{width}}  {text}" for name, text in shown))
    colours = sys.stdout.isatty()
    for index, sections in samples:
        print(f"sample {index}, trained tokens {'on green' if colours else 'between ⟦ and ⟧'}:")
        print(to_terminal(sections, colours))
    print(f"report: {folder / 'report.html'}")


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
