"""The library example, run as a user would: it trains, prints each step, saves, and exports a model that loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent.parent


def test_the_library_example_trains_saves_and_exports(tmp_path):
    command = [sys.executable, "-m", "examples.library", str(tmp_path), "train.steps=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d  loss ([\d.]+)  gradient norm", done.stdout)]
    assert len(losses) == 3
    assert losses[0] > losses[-1]
    assert (tmp_path / "run" / "step_000003" / "card.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
