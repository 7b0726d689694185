"""``model.linear: te`` has the numbers, checkpoints and exports of megatron-core's layers, or is refused in one line.

Transformer Engine needs a GPU: a stand-in with its signature computes in PyTorch (``harness/fake_packages.py``).
"""

import pytest

from megatron_align import load_config
from megatron_align.errors import InputError
from megatron_align.model.te_linear import require_te, te_linears
from tests.harness import training_ranks
from tests.harness.fake_packages import installed
from tests.harness.tiny import metrics_of, run_arguments


@pytest.mark.parametrize(
    "packages, chip, options, message",
    [
        (("te",), None, {}, "needs a CUDA GPU, this process sees none"),
        (("te",), (7, 5), {}, "needs a GPU of sm_80 or newer, got sm_75: use model.linear: torch"),
        (
            (),
            (9, 0),
            {},
            "needs transformer-engine 2.8 or newer with its PyTorch part: not installed \\(pip install",
        ),
        (
            ("te",),
            (9, 0),
            {"version": "1.13.0"},
            "needs transformer-engine 2.8 or newer, 1.13.0 is installed",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(packages, chip, options, message):
    with installed(*packages, chip=chip, **options), pytest.raises(InputError, match=message) as refused:
        require_te()
    assert str(refused.value).startswith("model.linear: te ")


def test_adapters_are_refused():
    sections = {"data": {"train": "d"}, "checkpoint": {"dir": "c"}, "train": {"steps": 1}}
    with pytest.raises(InputError, match="model.linear must be torch with model.adapter"):
        load_config({**sections, "model": {"path": "m", "linear": "te", "adapter": {"rank": 2}}}, {})


def test_the_classes_are_made_once():
    with installed("te"):
        assert te_linears() is te_linears()


def test_runs_checkpoints_and_exports_are_the_same(pool, tiny_models, chat_file, tmp_path):
    """Two tensor- and sequence-parallel ranks in fp32; then a run that began with one goes on with the other."""

    def train(name, linear, steps, packages):
        arguments = run_arguments(
            tiny_models("qwen2_untied"), chat_file, tmp_path / name, model__linear=linear, train__steps=steps,
            parallel__tensor=2, checkpoint__export_hf=True,
        )  # fmt: skip
        pool.run(2, training_ranks.train_with_fakes, arguments, *packages)
        return [(row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / name)]

    assert train("te", "te", 2, ["te"]) == train("torch", "torch", 2, [])
    exported = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("te", "torch")]
    assert exported[0] == exported[1]
    assert train("te", "torch", 3, []) == train("torch", "te", 3, ["te"])
