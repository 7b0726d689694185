"""Our merges equal mergekit's on the same folders.

mergekit's pins do not fit ours, so it is no test dependency. To run this file, install it into a folder of its own:
``pip install --no-deps --target judge_packages mergekit immutables peft scipy protobuf`` and
``PYTHONPATH=judge_packages:. pytest tests/merge/test_mergekit.py``. Run with mergekit 0.1.5.
"""

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.merge.merge import merge
from megatron_align.merge.methods import Linear, ModelStock, Slerp, TaskArithmetic, Ties
from tests.merge.test_merge import family  # noqa: F401

pytest.importorskip("mergekit", reason="see the file's first lines")

WEIGHTS = (0.5, 1.0, 0.25)
# our formula, mergekit's name and options for all, its options for each model
CASES = {
    "linear": (Linear(weights=WEIGHTS), {"normalize": True}, "weight"),
    "task_arithmetic": (
        TaskArithmetic(weights=WEIGHTS, scale=0.6),
        {"normalize": False, "lambda": 0.6},
        "weight",
    ),
    "model_stock": (ModelStock(), {}, None),
    "slerp": (Slerp(t=0.3), {"t": 0.3}, None),
    "ties": (Ties(weights=WEIGHTS, density=0.3, scale=0.6), {"density": 0.3, "lambda": 0.6}, "weight"),
}


def by_mergekit(name, base, models, options, per_model, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    entries = [{"model": str(folder)} for folder in models]
    if per_model:
        for entry, weight in zip(entries, WEIGHTS, strict=True):
            entry["parameters"] = {per_model: weight}
    if name == "slerp":
        entries.insert(0, {"model": str(base)})
    config = {"merge_method": name, "models": entries, "parameters": options, "dtype": "float32"}
    if name != "linear":
        config["base_model"] = str(base)
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(cuda=False, quiet=True))
    return {key: t for file in out.glob("*.safetensors") for key, t in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_equals_mergekits(tmp_path, family, name):  # noqa: F811
    base, models = family
    models = models[:1] if name == "slerp" else models
    method, options, per_model = CASES[name]
    theirs = by_mergekit(name, base, models, options, per_model, tmp_path / "theirs")
    merge(method, base, models, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        # both sum in fp32, in another order
        assert torch.allclose(ours[tensor], theirs[tensor], rtol=0, atol=1e-6), tensor
