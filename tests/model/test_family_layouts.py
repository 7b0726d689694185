"""Law 1 for what families add to the model: norms per head and a normalised output head give the same losses and
gradient norms on one rank and on two tensor ranks, and from an imported checkpoint.
"""

import pytest

from megatron_align.convert.import_hf import import_hf
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_baichuan, make_model, metrics_of, run_arguments

FAMILIES = {"qwen3": lambda folder: make_model(folder, "qwen3"), "baichuan2": make_baichuan}
CASES = [(family, sequence) for family in FAMILIES for sequence in (True, False)]


@pytest.mark.parametrize("family, sequence", mark_slow(CASES, [("qwen3", False), ("baichuan2", True)]))
def test_tensor_ranks_do_not_matter(tmp_path, pool, chat_file, family, sequence):
    hf = FAMILIES[family](tmp_path / "hf")
    import_hf(hf, tmp_path / "ckpt")

    def run(name, model, world, **parallel):
        arguments = run_arguments(model, chat_file, tmp_path / name, train__steps=3, **parallel)
        pool.run(world, training_ranks.train, arguments)
        return [(row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / name)]

    one = run("one", hf, 1)
    assert run("imported", tmp_path / "ckpt", 1) == one
    two = run("two", hf, 2, parallel__tensor=2, parallel__sequence=sequence)
    assert two == [pytest.approx(row, rel=1e-5) for row in one]
