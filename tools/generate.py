"""``megatron-align generate``: completions for the prompts of a file. Also ``python tools/generate.py``.

Exit code: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_align.rollout.types import Sampling
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align generate"
ABOUT = """Generate completions for the prompts of a file: JSONL in, JSONL out, in the same order.

MODEL is a Hugging Face folder, one of our checkpoints of any layout, or a run's folder. A record has a prompt (text,
continued as it is, or messages), messages, conversations or instruction. A row of the output is the record with
completions: [{content, finish_reason, tokens}]. A killed run continues when the same command is run again, and writes
the same file. Every draw depends on the seed, the prompt's index, the sample and the position only."""

TEMPLATE_DATE = "date that the chat template reads, such as 2024-07-26 (default: that of the first start)"


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``generate``; return the exit code."""
    from megatron_align.tools.command import Parser

    parser = Parser(PROGRAM, ABOUT)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="Hugging Face folder, checkpoint, or run folder")
    add("--prompts", required=True, metavar="PATH", help="file, folder or glob pattern of prompts")
    add("--out", required=True, metavar="FILE", help="JSONL file to write; must not exist")
    add("--completions", type=int, default=1, metavar="K", help="completions of each prompt (default: 1)")
    add_sampling(parser, temperature=1.0)
    add("--chat", action="store_true", help="a prompt that is text is a user's turn, not text to continue")
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add("--template-date", metavar="DATE", help=TEMPLATE_DATE)
    add("--precision", choices=("bf16", "fp32"), help="of weights and computation (default: as stored)")
    about = "prompts that do not fit the model's context: refuse all, or write them without completions"
    add("--too-long", choices=("error", "skip"), default="error", help=f"{about} (default: error)")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--tokens", action="store_true", help="write token ids and log-probs too")
    about = "vLLM servers that hold the model, in place of a model in this process"
    add("--vllm", nargs="+", default=[], metavar="URL", help=about)
    about = "start a vLLM server of the model with this interpreter of an environment that has vLLM; log: OUT.vllm.log"
    add("--vllm-python", metavar="PYTHON", help=about)
    about = "options of that server, as of `vllm serve`, in one argument: '--tensor-parallel-size 2'"
    add("--vllm-options", default="", metavar="OPTIONS", help=about)
    about = "adapter of the model, a PEFT folder or a checkpoint; several as NAME=PATH: each writes OUT with its name"
    add("--adapter", type=str, nargs="+", default=[], metavar="[NAME=]PATH", help=about)
    about = "model that writes a complement of each prompt, which is appended to it (docs/pas.md): path, URL#NAME or "
    add("--augment", metavar="WRITER", help=f"{about}FILE.py:FUNCTION")
    about = "text with {prompt} in it that this model was trained on (default: that of pas build)"
    add("--augment-template", metavar="FILE", help=about)
    options = parser.parse(arguments)
    return _generate(options)


def add_sampling(parser: Parser, temperature: float) -> None:
    """Add the options of drawing tokens; :func:`sampling_of` reads them."""
    add = parser.add_argument
    add(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="longest completion, in tokens (default: 1024)",
    )
    about = f"divides the logits; 0: greedy (default: {temperature:g})"
    add("--temperature", type=float, default=temperature, metavar="T", help=about)
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="smallest set of this probability (default: 1, all)",
    )
    add("--top-k", type=int, default=0, metavar="K", help="likeliest tokens to draw from (default: 0, all)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a completion, left out of it")
    add("--seed", type=int, default=1234, help="seed of the random numbers (default: 1234)")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return the sampling that the options of :func:`add_sampling` describe."""
    from megatron_align.rollout.types import Sampling

    return Sampling(
        completions=getattr(options, "completions", 1),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        stop=tuple(options.stop),
        seed=options.seed,
    )


def _generate(options: argparse.Namespace) -> int:
    from megatron_align.errors import require
    from megatron_align.evaluation.adapter_names import parse_adapters
    from megatron_align.storage.atomic_write import require_one_process

    require_one_process()
    require(options.limit is None or options.limit >= 1, f"--limit must be at least 1, got {options.limit}")
    adapters = parse_adapters(options.adapter)
    out = Path(options.out)
    if len(adapters) < 2:
        _generate_file(options, str(out), next(iter(adapters.values()), None))
    else:
        if not (options.vllm or options.vllm_python):  # these refuse adapters
            from megatron_align.evaluation.adapters import open_adapters_of

            open_adapters_of(options.model, adapters)  # all are refused before the first file is written
        for name, adapter in adapters.items():
            _generate_file(options, str(out.with_name(f"{out.stem}.{name}{out.suffix}")), adapter)
    return 0


def _generate_file(options: argparse.Namespace, out: str, adapter: str | None) -> None:
    from megatron_align.evaluation.generation import GenerateOptions, generate_file

    counts = generate_file(
        GenerateOptions(
            model=options.model,
            adapter=adapter,
            prompts=options.prompts,
            out=out,
            sampling=sampling_of(options),
            precision=options.precision,
            as_chat=options.chat,
            chat_template=options.chat_template,
            template_date=options.template_date,
            too_long=options.too_long,
            limit=options.limit,
            with_tokens=options.tokens,
            vllm=tuple(options.vllm),
            vllm_python=options.vllm_python,
            vllm_options=tuple(shlex.split(options.vllm_options)),
            augment=options.augment,
            augment_template=options.augment_template,
        )
    )
    if counts.augmented:
        print(counts.augmented)
    skipped = f", {counts.skipped:,} prompts skipped as too long" if counts.skipped else ""
    resumed = f" ({counts.resumed:,} by an earlier process)" if counts.resumed else ""
    print(
        f"answered {counts.prompts:,} prompts{resumed}: {counts.completions:,} completions, {counts.tokens:,} tokens, "
        f"{counts.truncated:,} cut by length{skipped}, to {out}"
    )


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["generate", *sys.argv[1:]]))
