"""Laws of a rehearsed step: no device mix, no host tensor in a collective, no wrong launch; its peak is plan's.

The host waits for the GPU at most twice in a step, so never for a micro-batch, of which a step here has three.

Tensors claim to be on CUDA and have no values, so complete steps of the real training code run on a CPU. The rehearsed
peak is at most what ``plan`` counts and at least 0.97 of it.
"""

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.harness.rehearsals import model_folder, rehearsed, request, require_laws
from tests.harness.sizes import write_config

EXAMPLES = Path(__file__).parents[2] / "examples"

TP, PP, CP = {"parallel.tensor": 2}, {"parallel.pipeline": 2}, {"parallel.context": 2}
VPP = {**PP, "parallel.virtual_pipeline": 2}
# What operations other than matrix products read and write in the steps below, counted with PyTorch 2.13: a new pass is
# a decision, and a smaller count comes in here.
MOST_BYTES = (5_354_252_260, 581_843_326)
DPO, KTO, REWARD = ({"objective.name": name} for name in ("dpo", "kto", "reward"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": model_folder(folder / "untied"),
        "tied": model_folder(folder / "tied", tie_word_embeddings=True),
        "small": model_folder(folder / "small", tie_word_embeddings=True, num_hidden_layers=2),
    }


def test_a_tied_model_alone_and_pairs_on_every_kind_of_rank(models):
    reports = rehearsed(
        [
            request(models["small"], 1, 0, {}, most=3),
            request(models["small"], 16, 1, {**DPO, **TP, **PP, **CP}, most=3),
        ]
    )
    for report, most in zip(reports, MOST_BYTES, strict=True):
        require_laws(report)
        if version("torch").startswith("2.13."):
            assert report["bytes_outside"] <= most, report["largest"]
    launches = reports[0]["launches"]
    for attention, norm in (
        ("forward_kernel", "_norm_forward_kernel"),
        ("dq_kernel", "_norm_backward_kernel"),
    ):
        # Two layers have two norms each, and one comes after them: none is computed twice.
        assert 2 * launches[norm] == 5 * launches[attention] > 0
    assert launches["_rope_kernel"] == launches["forward_kernel"] + launches["dq_kernel"]


@pytest.mark.slow
def test_layouts_and_objectives(models):
    cases = [
        ("untied", 1, 0, {}),
        ("tied", 1, 0, {"data.sequence_length": 128}),  # the vocabulary weighs most
        ("untied", 2, 0, {}),
        ("untied", 2, 0, TP),
        *(("tied", 2, stage, PP) for stage in (0, 1)),
        *(("untied", 2, stage, VPP) for stage in (0, 1)),
        ("untied", 2, 0, CP),
        ("untied", 2, 0, {**CP, "parallel.context_kind": "allgather"}),
        ("tied", 1, 0, DPO),
        ("untied", 1, 0, {**DPO, "reference.mode": "live"}),
        ("untied", 4, 1, {**KTO, **TP, **PP}),
        ("untied", 1, 0, KTO),
        *(("untied", 4, stage, {**REWARD, **TP, **PP}) for stage in (0, 1)),
        ("untied", 2, 0, {"train.recompute_layers": 1}),
    ]
    requests = [request(models[model], world, stage, options) for model, world, stage, options in cases]
    for case, report in zip(cases, rehearsed(requests), strict=True):
        try:
            require_laws(report)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, gpus, stages",
    [
        ("qwen2_7b/sft", 8, [0]),
        ("qwen2_7b/dpo", 8, [0]),
        ("qwen2_7b/reward", 8, [0]),
        ("qwen2_72b/sft", 32, [0, 1, 2, 3]),
        ("llama3_70b/sft", 32, [0, 3]),
        ("llama3_70b/dpo", 32, [0, 1, 2, 3]),
    ],
)
def test_recipes(tmp_path, recipe, gpus, stages):
    """The recipes on their own layouts, the first rank of each stage."""
    size = recipe.partition("/")[0]
    model = str(write_config(tmp_path / size, size))
    config = str(EXAMPLES / f"{recipe}.yaml")
    # As many micro-batches as the first of four stages has in flight, and one more.
    requests = [request(model, gpus, stage, {}, config, most=5 if len(stages) > 1 else 3) for stage in stages]
    for report in rehearsed(requests):
        require_laws(report)
