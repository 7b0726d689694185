"""Law 1 for overlap: reducing and gathering while the model computes changes no number.

Two data-parallel ranks add two numbers, in any order. The tiny model is cut into several buckets, so that some are
under way while others are computed. The ranks then own other parts: squares are summed in another order for the norm,
in fp64.
"""

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.training import optimizer
from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments

BOTH = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
VPP = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
CASES = {
    "dp2_tied": (2, "qwen2_tied", {}, BOTH),
    "dp2_untied": (2, "qwen2_untied", {}, {"parallel__overlap_grad_reduce": True}),
    "tp2_dp2": (4, "qwen2_untied", {"parallel__tensor": 2}, BOTH),
    "pp2_dp2_tied": (4, "qwen2_tied", {"parallel__pipeline": 2}, BOTH),
    "vpp2_dp2_tied": (4, "qwen2_tied", VPP, {**BOTH, "parallel__overlap_p2p": True}),
    "vpp2": (2, "qwen2_tied", VPP, {"parallel__overlap_p2p": True}),
}
QUICK = ("dp2_untied", "vpp2_dp2_tied")
BUCKET = 30_000  # elements, of 180,000


@pytest.fixture
def run(pool, tiny_models, chat_file, tmp_path):
    """Return metrics and exported weights of a run with validation, saving and several micro-batches."""

    def train(name, world, variant, **options):
        folder = tmp_path / name
        arguments = run_arguments(
            tiny_models(variant),
            chat_file,
            folder,
            data__validation=chat_file,
            data__cache=chat_file.parent,
            train__validate_every=2,
            checkpoint__save_every=2,
            checkpoint__export_hf=True,
            **{"train__steps": 3, **options},
        )
        pool.run(world, training_ranks.train_in_buckets, arguments, BUCKET)
        rows = [
            (row["step"], row["loss"], row.get("grad_norm", 0.0))
            for split in (None, "validation")
            for row in metrics_of(folder, split)
        ]
        return rows, load_file(folder / "hf" / "model.safetensors")

    return train


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_nothing_changes(case, run):
    world, variant, layout, overlap = CASES[case]
    rows, weights = run("plain", world, variant, **layout)
    got_rows, got = run("overlap", world, variant, **layout, **overlap)
    assert len(rows) == 3 + 2
    for row, want in zip(got_rows, rows, strict=True):
        assert row == pytest.approx(want, rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_run_resumes_under_overlap(run):
    options = {"world": 2, "variant": "qwen2_tied", **BOTH}
    rows, weights = run("whole", **options)
    run("halves", train__steps=2, **options)
    got_rows, got = run("halves", **options)
    assert got_rows[:3] == rows[:3]
    assert all(tensor.equal(got[name]) for name, tensor in weights.items())


def test_a_gradient_is_reduced_in_several_buckets(pool, tiny_models):
    assert pool.run(2, count_buckets, tiny_models()) == [[False, True]] * 2


def count_buckets(rank_info, model):
    """Return whether there are several buckets without overlap, and with it."""
    from megatron_align.model.families import read_shape
    from megatron_align.model.policy import build_policy, transformer_config

    found, before = [], optimizer.BUCKET_ELEMENTS
    parallel.join(rank_info, ParallelConfig())
    for config in (ParallelConfig(), ParallelConfig(overlap_grad_reduce=True)):
        optimizer.BUCKET_ELEMENTS = BUCKET
        shape = read_shape(model)
        chunks = build_policy(transformer_config(shape, config, torch.float32), shape, parallel.groups())
        found.append(len(optimizer.wrap_data_parallel(chunks, config)[0].bucket_groups) > 2)
        optimizer.BUCKET_ELEMENTS = before
    parallel.leave()
    return found


@pytest.mark.parametrize(
    "options, world, message",
    [
        ({"overlap_param_gather": True}, 2, "overlap_param_gather needs parallel.overlap_grad_reduce"),
        ({"overlap_p2p": True, "pipeline": 2}, 2, "overlap_p2p needs parallel.virtual_pipeline"),
        ({"overlap_grad_reduce": True, "tensor": 2}, 2, "needs at least 2 data-parallel ranks, got 1"),
    ],
)
def test_what_would_do_nothing_is_refused(options, world, message):
    with pytest.raises(InputError, match=message):
        ParallelConfig(**options).data_parallel(world)
