"""The quickstart, a few steps of each stage: tiny Qwen2 -> SFT -> DPO, GRPO on two processes -> HF folder -> report.

Slow, as CI runs the complete quickstart after the tests.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def quickstart(out, *more, timeout=300):
    command = [sys.executable, "-m", "examples.quickstart.run", "--out", str(out), *more]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    # So few steps of DPO show nothing at its own, careful rate.
    few = ("--train.steps", "12", "--optimizer.warmup_steps", "3", "--optimizer.lr", "2e-3")
    few += ("--train.global_batch_size", "32")
    return out, quickstart(out, "--need", "0", *few)


def test_it_trains_and_reports(short):
    out, done = short
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    sft, dpo, grpo = report["stages"]
    assert sft["steps"] == dpo["steps"] == grpo["steps"] == len(grpo["rewards"]) == 12
    assert sft["last_loss"] < 0.8 * sft["first_loss"]
    assert dpo["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo["last_loss"] < dpo["first_loss"]
    assert [exam["model"] for exam in report["exams"]] == ["untrained", "sft", "dpo", "sft early", "grpo"]
    assert report["exams"][2]["margin"] > report["exams"][1]["margin"]  # on sums that were held out
    files = ("metrics.jsonl", "hf/model.safetensors", "hf/tokenizer.json")
    for file in ("loss.png", *(f"{stage}/{name}" for stage in ("sft", "dpo", "grpo") for name in files)):
        assert (out / file).is_file(), file


def test_its_output_is_plain_text_in_a_pipe(short):
    _, done = short
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    assert "tokens/s" in done.stdout
