"""``megatron-align sample``: preference data from sampled answers. Also ``python tools/sample.py``.

Exit code: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

PROGRAM = "megatron-align sample"
ABOUT = """Make preference data: answers of one or several models, scored, filtered, written as training reads them.

For each prompt every model gives K answers (temperature 1, top-p 0.99, top-k 50). Cut and empty answers and near
duplicates (ROUGE-L) are left out, the others are scored by a reward model or a check, and prompts whose answers are all
good or nearly tied are dropped. OUT/data.jsonl is the data, OUT/report.json has the counts of each filter. A killed run
continues when the same command is run again. With --format sft this is rejection sampling."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``sample``; return the exit code."""
    from megatron_align.tools.command import Parser
    from megatron_align.tools.generate import TEMPLATE_DATE, add_sampling

    parser = Parser(PROGRAM, ABOUT)
    add = parser.add_argument
    add(
        "--models",
        required=True,
        nargs="+",
        metavar="MODEL",
        help="Hugging Face folders, checkpoints, run folders",
    )
    add("--prompts", required=True, metavar="PATH", help="file, folder or glob pattern of prompts")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--completions", type=int, default=5, metavar="K", help="answers of each model (default: 5)")
    add_sampling(parser, temperature=1.0)
    parser.set_defaults(top_p=0.99, top_k=50)
    add("--reward-model", metavar="MODEL", help="scores the answers; or --check does")
    add(
        "--check",
        metavar="NAME",
        help="exact_match, contains, math, code or ifeval, by the record's answer or instructions",
    )
    add("--extract", metavar="REGEX", help="part of an answer that the check judges (default: all)")
    formats = ("ranked", "pair", "all_pairs", "unpaired", "sft")
    add(
        "--format",
        choices=formats,
        default="ranked",
        help="of the data; pair: best and worst (default: ranked)",
    )
    about = "ROUGE-L from which a later answer is a duplicate (default: 0.7)"
    add("--duplicates", type=float, default=0.7, metavar="R", help=about)
    add("--all-above", type=float, metavar="S", help="drop prompts whose answers all score at least this")
    about = "drop prompts whose best and worst scores differ by no more than this (default: 0)"
    add("--tied", type=float, default=0.0, metavar="S", help=about)
    add("--threshold", type=float, metavar="S", help="unpaired, sft: score from which an answer is good")
    add("--chat", action="store_true", help="a prompt that is text is a user's turn, not text to continue")
    add("--template-date", metavar="DATE", help=TEMPLATE_DATE)
    about = "of weights and computation (default: as stored, of the reward model fp32)"
    add("--precision", choices=("bf16", "fp32"), help=about)
    about = "vLLM servers that hold the model, in place of a model in this process; of one model"
    add("--vllm", nargs="+", default=[], metavar="URL", help=about)
    about = "start a vLLM server of each model in turn with this interpreter of an environment that has vLLM"
    add("--vllm-python", metavar="PYTHON", help=about)
    about = "options of these servers, as of `vllm serve`, in one argument: '--tensor-parallel-size 2'"
    add("--vllm-options", default="", metavar="OPTIONS", help=about)
    return _sample(parser.parse(arguments))


def _sample(options: argparse.Namespace) -> int:
    from megatron_align.evaluation.sample import DATA, SampleOptions, require_language_models, sample
    from megatron_align.storage.atomic_write import require_one_process
    from megatron_align.tools.generate import sampling_of

    require_one_process()
    names = (
        "prompts",
        "out",
        "reward_model",
        "check",
        "extract",
        "format",
        "duplicates",
        "all_above",
        "tied",
    )
    given = {name: getattr(options, name) for name in (*names, "threshold", "template_date", "precision")}
    sampling = SampleOptions(
        models=tuple(options.models),
        sampling=sampling_of(options),
        as_chat=options.chat,
        vllm=tuple(options.vllm),
        vllm_python=options.vllm_python,
        vllm_options=tuple(shlex.split(options.vllm_options)),
        **given,
    )
    require_language_models(sampling.models)  # before the first of them answers
    counts = sample(sampling)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.dropped.items()))
    unscored = f", {counts.unscored:,} too long for the reward model" if counts.unscored else ""
    print(
        f"{counts.prompts:,} prompts, {counts.answers:,} answers: {counts.truncated:,} cut by length, {counts.empty:,} "
        f"empty, {counts.duplicates:,} near duplicates{unscored}; prompts dropped: {dropped or 'none'}\n"
        f"{counts.rows:,} rows: {Path(options.out) / DATA}"
    )
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["sample", *sys.argv[1:]]))
