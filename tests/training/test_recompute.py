"""Law 1 for recompute: whatever is made again in backward, losses and gradients are the same.

The same operations run on the same numbers, so nothing may differ on one layout, bit by bit. Except for norms in
fp32: their input is then one tensor with the residual, whose three gradients are added up in another order.
"""

import pytest
from safetensors.torch import load_file

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments

KINDS = {
    "layers_1": {"train__recompute_layers": 1},
    "layers_3_of_4": {"train__recompute_layers": 3},
    "attention": {"train__recompute_modules": "[attention]"},
    "mlp": {"train__recompute_modules": "[mlp]"},
    "norms": {"train__recompute_modules": "[norms]"},
    "all_parts": {"train__recompute_modules": "[attention, mlp, norms]"},
}
LAYOUTS = {
    "alone": (1, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
}
# A chunk of tp2_pp2 has two layers, one of vpp2 has one.
CASES = [(kind, "alone") for kind in KINDS]
CASES += [("layers_1", "tp2_pp2"), ("all_parts", "tp2_pp2"), ("all_parts", "vpp2")]


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, chat_file, tmp_path_factory):
    """Return ``(layout, options) -> tensors`` of the first step's gradient."""
    done = {}

    def get(layout, **options):
        key = (layout, *options.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("gradients")
            world, how = LAYOUTS[layout]
            arguments = run_arguments(
                tiny_models("qwen3"), chat_file, folder, data__cache=chat_file.parent, **how, **options
            )
            pool.run(world, training_ranks.gradients, arguments, folder / "gradients")
            done[key] = load_file(folder / "gradients" / "model.safetensors")
        return done[key]

    return get


@pytest.mark.parametrize("kind, layout", CASES)
def test_gradients_are_the_same(kind, layout, gradients):
    got, want = gradients(layout, **KINDS[kind]), gradients(layout)
    assert got.keys() == want.keys()
    rounding = 1e-6 if "norms" in str(KINDS[kind]) else 0
    for name, tensor in want.items():
        assert tensor.norm() > 0
        assert (got[name] - tensor).norm() <= rounding * tensor.norm(), name


def test_three_steps_of_bf16_are_bit_identical(pool, tiny_models, chat_file, tmp_path):
    rows = []
    for kind in ("[]", "[attention, mlp, norms]"):
        folder = tmp_path / kind
        options = {"train__recompute_modules": kind, "train__precision": "bf16", "train__steps": 3}
        pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, folder, **options))
        rows.append([(row["loss"], row["grad_norm"]) for row in metrics_of(folder)])
    assert len(rows[0]) == 3
    assert rows[0] == rows[1]
