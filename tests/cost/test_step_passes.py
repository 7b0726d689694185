"""A step multiplies no more matrices and moves no more bytes than the table says: a new pass is a decision.

``python -m pytest tests/cost/test_step_passes.py`` names what changed; a smaller count goes into the table as well.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.harness import costs
from tests.harness.tiny import run_arguments, write_chat, write_labelled, write_pairs

TABLE = Path(__file__).with_name("step_passes.json")  # case -> counts of its second step
COUNTS = json.loads(TABLE.read_text(encoding="utf-8"))
CASES = {
    "sft": (write_chat, {}),
    "sft with an adapter": (write_chat, {"model__adapter__kind": "lora", "model__adapter__rank": 4}),
    "dpo, cached reference": (write_pairs, {"objective__name": "dpo"}),
    "dpo, live reference": (write_pairs, {"objective__name": "dpo", "reference__mode": "live"}),
    "kto": (write_labelled, {"objective__name": "kto"}),
    "reward": (write_pairs, {"objective__name": "reward"}),
}


@pytest.mark.skipif(COUNTS["torch"] != torch.__version__.split("+")[0], reason="counted with another PyTorch")
@pytest.mark.parametrize("case", CASES)
def test_a_step_makes_the_passes_of_the_table(pool, tiny_models, tmp_path, case):
    write, options = CASES[case]
    data = write(tmp_path / "data.jsonl")
    arguments = run_arguments(tiny_models("qwen2_tied"), data, tmp_path / "run", **options)
    [found] = pool.run(1, costs.step_passes, arguments)
    assert found == COUNTS[case], f"put into {TABLE.name} if it is meant: {json.dumps(found)}"
