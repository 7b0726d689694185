"""Law 1 tensor by tensor: every parameter's gradient of a first step is that of one rank, on any layout.

A norm over all of them would not see two errors that cancel, nor one in a small tensor.
"""

import pytest
from safetensors.torch import load_file

from tests.harness import training_ranks
from tests.harness.tiny import run_arguments, write_pairs

OBJECTIVES = {"sft": {}, "dpo": {"objective__name": "dpo", "reference__mode": "none"}}
ULYSSES, ALLGATHER = ({"parallel__context_kind": kind} for kind in ("ulysses", "allgather"))
LAYOUTS = {
    "ulysses2": (2, {**ULYSSES, "parallel__context": 2}),
    "allgather4": (4, {**ALLGATHER, "parallel__context": 4}),
    "ulysses2_tp2": (4, {**ULYSSES, "parallel__context": 2, "parallel__tensor": 2}),
    "allgather2_pp2": (4, {**ALLGATHER, "parallel__context": 2, "parallel__pipeline": 2}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, chat_file, tmp_path_factory):
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")

    def run(objective, world=1, **layout):
        folder = tmp_path_factory.mktemp("run")
        data = chat_file if objective == "sft" else pairs
        arguments = run_arguments(tiny_models(), data, folder, **OBJECTIVES[objective], **layout)
        pool.run(world, training_ranks.gradients, arguments, folder / "gradients")
        return load_file(folder / "gradients" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def one_rank(gradients):
    return {objective: gradients(objective) for objective in OBJECTIVES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "objective",
    [name if name == "dpo" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES],
)
def test_every_gradient_is_that_of_one_rank(objective, layout, gradients, one_rank):
    world, options = LAYOUTS[layout]
    found, wanted = gradients(objective, world, **options), one_rank[objective]
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.norm() > 0, name
        # fp32 sums in another order: rounding of each element, measured against its tensor.
        assert (found[name] - want).norm() <= 1e-5 * want.norm(), name
