"""The whole quickstart, a few steps of it: tiny Qwen2 -> SFT on two processes -> HF folder -> answers -> report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def quickstart(out, *more, timeout=300):
    command = [sys.executable, "-m", "examples.quickstart.run", "--out", str(out), *more]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    few = ("--train.steps", "12", "--optimizer.warmup_steps", "3", "--train.global_batch_size", "32")
    return out, quickstart(out, "--need", "0", *few)


def test_it_trains_and_reports(short):
    out, done = short
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    (stage,) = report["stages"]
    assert stage["steps"] == 12
    assert stage["last_loss"] < 0.8 * stage["first_loss"]
    assert [exam["model"] for exam in report["exams"]] == ["untrained", "sft"]
    for file in ("loss.png", "sft/metrics.jsonl", "sft/hf/model.safetensors", "sft/hf/tokenizer.json"):
        assert (out / file).is_file(), file


def test_its_output_is_plain_text_in_a_pipe(short):
    _, done = short
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    assert "tokens/s" in done.stdout
