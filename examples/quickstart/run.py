"""The quickstart: a tiny Qwen2 learns to add, to prefer right sums, and by its own answers, as a large model does.

    python -m examples.quickstart.run --out runs/quickstart

Unknown options are passed to every ``megatron_align.train`` (for example ``--train.steps 100``). Exit codes: 0 the
model learnt; 1 a stage failed or the model did not learn; 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from examples.quickstart import task, tiny_model
from examples.quickstart.ask import answer_logprobs, ask
from examples.quickstart.report import Exam, Report, Stage

HERE = Path(__file__).resolve().parent
MARK = ".quickstart"  # a folder with this file is an earlier quickstart's and may be emptied
PROCESSES = 2
EARLY = (
    "sft early"  # its first checkpoint, from which the online stage starts: there is something left to learn
)


class QuickstartError(Exception):
    """The quickstart cannot continue; the message is one line and ``code`` the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.run", allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="output folder, emptied first"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the task and of the untrained model")
    parser.add_argument("--need", type=float, default=0.5, help="accuracy below which the run fails")
    options, for_training = parser.parse_known_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    transformers_logging.disable_progress_bar()
    try:
        report = run(options.out, options.seed, for_training, console)
        report.show(console)
        console.print(f"report: {options.out / 'report.json'}   loss: {options.out / 'loss.png'}")
        check(report, options.need)
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code
    return 0


def run(out: Path, seed: int, for_training: Sequence[str], console: Console) -> Report:
    """Train and examine every stage; write all files into ``out``."""
    started = time.perf_counter()
    empty(out)
    splits = task.make_splits(seed)
    task.write_chats(out / "train.jsonl", splits.train)
    task.write_pairs(out / "pairs.jsonl", splits.train)
    task.write_prompts(out / "prompts.jsonl", splits.train)
    task.write_chats(out / "held_out.jsonl", splits.held_out)
    console.print(f"task    {len(splits.train):,} sums to train on, {len(splits.held_out)} held out")
    parameters = tiny_model.save(out / "untrained", seed)
    console.print(f"model   tiny Qwen2, {parameters:,} parameters, random")
    exams = [examine("untrained", out / "untrained", splits.held_out)]
    stages = []
    folders = {"untrained": out / "untrained", EARLY: out / "early"}
    for name, start, data in (
        ("sft", "untrained", "train.jsonl"),
        ("dpo", "sft", "pairs.jsonl"),
        ("grpo", EARLY, "prompts.jsonl"),
    ):
        if start == EARLY:
            export(min((out / "sft").glob("step_*")), folders[EARLY])
            exams.append(examine(EARLY, folders[EARLY], splits.held_out))
        console.print(f"{name:7} {PROCESSES} processes, see {out / name}")
        stages.append(train(name, folders[start], out / data, out / name, for_training))
        folders[name] = out / name / "hf"
        exams.append(examine(name, folders[name], splits.held_out))
    seconds = time.perf_counter() - started
    report = Report(exams=exams, stages=stages, parameters=parameters, seconds=seconds)
    report.write(out / "report.json")
    report.draw(out / "loss.png")
    return report


def empty(out: Path) -> None:
    """Create or empty ``out``; refuse a folder with content that is not an earlier quickstart's."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuickstartError(
            f"--out must be a new or empty folder, or an earlier quickstart's; found '{out}'", 2
        )
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()


def train(name: str, model: Path, data: Path, out: Path, more: Sequence[str]) -> Stage:
    """Run one training stage of ``NAME.yaml`` from HF folder ``model`` to HF folder ``out/hf``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(PROCESSES), "-m", "megatron_align.train"]
    command += ["--config", str(HERE / f"{name}.yaml"), "--model.path", str(model)]
    command += ["--data.train", str(data), "--checkpoint.dir", str(out), *more]
    started = time.perf_counter()
    command_of_stage(name, command)
    return Stage.read(name, out / "metrics.jsonl", time.perf_counter() - started)


def export(checkpoint: Path, folder: Path) -> None:
    """Convert a checkpoint to an HF folder."""
    command = [sys.executable, "-m", "megatron_align.tools.main", "convert", "export"]
    command_of_stage("export", [*command, "--checkpoint", str(checkpoint), "--out", str(folder)])


def command_of_stage(name: str, command: Sequence[str]) -> None:
    """Run a command; raise if it fails."""
    # On the CPU even where there is a GPU: one GPU could not hold two ranks. One thread per process.
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    code = subprocess.run(command, env={**os.environ, **settings}, check=False).returncode
    if code != 0:
        raise QuickstartError(f"stage {name} failed with exit code {code}; see its message above")


def examine(name: str, folder: Path, sums: Sequence[task.Sum]) -> Exam:
    """Score the model in ``folder`` on held-out sums: accuracy, and preference of the right answer to a mistake."""
    questions = [one.question for one in sums]
    answers = [answer.strip() for answer in ask(folder, questions)]
    chosen = answer_logprobs(folder, questions, [one.answer for one in sums])
    rejected = answer_logprobs(folder, questions, [one.mistake for one in sums])
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    right = sum(answer == one.answer for answer, one in zip(answers, sums, strict=True))
    step = max(1, len(sums) // 8)
    examples = {one.question: answer for one, answer in list(zip(sums, answers, strict=True))[::step]}
    return Exam(
        model=name,
        asked=len(sums),
        right=right,
        preferred=sum(margin > 0 for margin in margins),
        margin=sum(margins) / len(margins),
        examples=examples,
    )


def check(report: Report, need: float) -> None:
    """Raise unless the models of dpo and of the last stage answer a share ``need`` of the held-out sums correctly."""
    for exam in report.exams:
        if (exam.model == "dpo" or exam is report.exams[-1]) and exam.accuracy < need:
            raise QuickstartError(
                f"{exam.model} must answer {need:.0%} of the held-out sums, got {exam.accuracy:.1%}"
            )


if __name__ == "__main__":
    sys.exit(main())
