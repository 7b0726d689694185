"""``train.fp8`` computes the transformer's linear layers in the recipe, on packs that it can take, or is refused.

Transformer Engine needs a GPU: a stand-in with its signatures computes in PyTorch, and rounds as FP8 does or not at all
(``harness/fake_packages.py``). Without the rounding a run has the numbers of a run without FP8.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_align import load_config
from megatron_align.config import ParallelConfig
from megatron_align.cost.activations import layer_bytes
from megatron_align.cost.placement import Placement
from megatron_align.errors import InputError
from megatron_align.model.families import read_shape
from megatron_align.model.fp8 import require_fp8, require_widths
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.te_linear import require_te
from megatron_align.training import likelihood
from megatron_align.training.batches import pack_multiples, pack_options
from tests.harness import training_ranks
from tests.harness.fake_packages import installed
from tests.harness.tiny import metrics_of, run_arguments

SECTIONS = {"data": {"train": "d"}, "checkpoint": {"dir": "c"}}


def config(model=None, **train):
    sections = {"model": {"path": "m", "linear": "te", **(model or {})}, "train": {"steps": 1, **train}}
    return load_config({**SECTIONS, **sections}, {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": {"linear": "torch"}}, "train.fp8 needs model.linear: te, .*, got torch"),
        ({"precision": "fp32"}, "train.fp8 needs train.precision: bf16, got fp32"),
        (
            {"fp8": {"recipe": "delayed"}},
            "must be tensorwise, blockwise or mxfp8, got delayed: its scales come",
        ),
        ({"fp8": {"recipe": "int8"}}, "train.fp8.recipe must be one of tensorwise, .*, got 'int8'"),
        ({"fp8": True}, "train.fp8 must be a mapping"),
        ({"model": {"adapter": {"rank": 2}}}, "model.linear must be torch with model.adapter"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_configuration(options, message):
    with pytest.raises(InputError, match=message):
        config(**{"fp8": {}, **options})


@pytest.mark.parametrize(
    "recipe, chip, options, message",
    [
        ("tensorwise", (8, 0), {}, "train.fp8 needs a GPU of sm_89 or newer, got sm_80, which has no FP8"),
        ("tensorwise", (9, 0), {"version": "2.8.1"}, "train.fp8 needs .* 2.9 or newer, 2.8.1 is installed"),
        ("mxfp8", (9, 0), {"lacks": "is_mxfp8_available"}, "mxfp8 cannot run on sm_90: .*: use tensorwise"),
        ("tensorwise", (9, 0), {"lacks": "is_fp8_available"}, "is not supported .*: leave train.fp8 out"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(recipe, chip, options, message):
    with installed("te", chip=chip, **options), pytest.raises(InputError, match=message) as refused:
        require_fp8(require_te(), recipe)
    assert "\n" not in str(refused.value)


def test_weights_that_no_recipe_can_compute_are_refused(tiny_models):
    shape = read_shape(tiny_models())  # hidden 64, 8 heads of 8, 2 of keys, feed-forward 96
    require_widths(shape, ParallelConfig(tensor=2), "tensorwise")
    require_widths(shape, ParallelConfig(tensor=8), None)
    for tensor, recipe, found in ((8, "tensorwise", "8 .queries of"), (2, "mxfp8", "48 .queries, keys")):
        with pytest.raises(InputError, match=f"{recipe} needs dimensions .*, got {found}"):
            require_widths(shape, ParallelConfig(tensor=tensor), recipe)


@pytest.mark.parametrize("recipe, tokens", [("tensorwise", 16), ("blockwise", 16), ("mxfp8", 32)])
def test_run_and_plan_pad_packs_to_what_the_recipe_needs_of_each_rank(recipe, tokens, tiny_models):
    shape = read_shape(tiny_models())
    for options, ranks in (
        ({}, 1),
        ({"tensor": 2}, 2),
        ({"tensor": 2, "sequence": False}, 1),
        ({"tensor": 2, "context": 3}, 6),
    ):
        layout = ParallelConfig(**options)
        of_run = config(fp8={"recipe": recipe})
        placement = replace(Placement.of_run(of_run, shape, 1), parallel=layout)
        assert pack_multiples(layout, recipe)[0] == placement.token_multiple == ranks * tokens
        assert pack_multiples(layout)[0] == replace(placement, fp8=None).token_multiple == ranks


def test_training_and_scoring_of_completions_pad_to_it(monkeypatch):
    """The self-check takes the options of training's packs."""
    setup = SimpleNamespace(config=config(fp8={"recipe": "mxfp8"}))
    assert pack_options(setup, SimpleNamespace(score_prompt=False)).multiple == 32

    class Stop(Exception):
        pass

    def stop(table, steps, options, rank, normalization):
        raise Stop(options.multiple)

    monkeypatch.setattr(likelihood, "StepBatches", stop)
    monkeypatch.setattr(likelihood, "packed_lengths", lambda table, share: np.array([4]))
    monkeypatch.setattr(likelihood, "data_rank", lambda *given: None)
    kernels = KernelChoice(linear="te", fp8="mxfp8")
    chunk = SimpleNamespace(config=SimpleNamespace(kernels=kernels), shape=SimpleNamespace(is_reward=False))
    groups = SimpleNamespace(dp=SimpleNamespace(size=lambda: 1))
    scorer = likelihood.CompletionScorer(
        chunks=[chunk], parallel=ParallelConfig(), groups=groups, watchdog=None, sequence_length=8
    )
    with pytest.raises(Stop, match="32"):
        scorer._columns(None, None, 1, SimpleNamespace(sources=np.zeros(1, np.int64)), ("", None))


def test_plan_counts_two_fp8_copies_of_the_weights_of_a_layer(tiny_models):
    placement = Placement.of_run(config(fp8={}), read_shape(tiny_models()), 1)
    weights = 64 * (64 + 2 * 16) + 64 * 64 + 64 * 2 * 96 + 96 * 64
    assert layer_bytes(placement, 64) - layer_bytes(replace(placement, fp8=None), 64) == 2 * weights


@pytest.mark.slow
def test_a_run_has_the_recipes_numbers(pool, tiny_models, chat_file, tmp_path):
    """Two tensor-parallel ranks. Without rounding: those of bf16; with it: near them; resumed: the same."""
    rows, fp8 = {}, {"train__fp8": "{recipe: tensorwise}"}
    for name, package, steps, options in (
        ("bf16", "te", 2, {}),
        ("exact", "te_exact", 2, fp8),
        ("resumed", "te", 1, fp8),
        ("resumed", "te", 2, fp8),
        ("fp8", "te", 2, fp8),
    ):
        arguments = run_arguments(
            tiny_models("qwen2_untied"), chat_file, tmp_path / name, model__linear="te", train__steps=steps,
            train__precision="bf16", parallel__tensor=2, **options,
        )  # fmt: skip
        pool.run(2, training_ranks.train_with_fakes, arguments, package)
        rows[name] = np.array([(row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / name)])
    np.testing.assert_allclose(rows["exact"], rows["bf16"], rtol=1e-5)
    np.testing.assert_allclose(rows["fp8"], rows["bf16"], rtol=0.02)
    assert (rows["fp8"] != rows["bf16"]).all()
    assert (rows["fp8"] == rows["resumed"]).all()
