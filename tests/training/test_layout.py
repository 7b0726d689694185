"""Law 1: loss, gradient norm and weights after three steps are the same on every layout (1e-5 relative, fp32)."""

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments

ULYSSES, ALLGATHER = ({"parallel__context_kind": kind} for kind in ("ulysses", "allgather"))
# Any layout must give these numbers: one process, no packing choice, no recompute.
LAYOUTS = {
    "tp2": (2, {"parallel__tensor": 2, "parallel__sequence": False}),
    "tp2_sp": (2, {"parallel__tensor": 2}),
    "tp4_cuts_kv_heads": (4, {"parallel__tensor": 4}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "pp4": (4, {"parallel__pipeline": 4}),
    "vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "tp2_dp2": (4, {"parallel__tensor": 2}),
    "pp2_dp2": (4, {"parallel__pipeline": 2}),
    "unpacked": (1, {"data__packing": False}),
    "unpacked_tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "data__packing": False}),
    "recompute": (1, {"train__recompute_layers": 1}),
    "recompute_tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "train__recompute_layers": 2}),
    "long_packs": (1, {"data__sequence_length": 1024}),
    "unpacked_ulysses2": (2, {**ULYSSES, "parallel__context": 2, "data__packing": False}),
    "unpacked_allgather2_pp2": (
        4,
        {**ALLGATHER, "parallel__context": 2, "parallel__pipeline": 2, "data__packing": False},
    ),
    "ulysses2_tp2": (
        4,
        {**ULYSSES, "parallel__context": 2, "parallel__tensor": 2, "parallel__sequence": False},
    ),
    "allgather2_vpp2": (
        4,
        {**ALLGATHER, "parallel__context": 2, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    ),
    "recompute_ulysses2_pp2": (
        4,
        {**ULYSSES, "parallel__context": 2, "parallel__pipeline": 2, "train__recompute_layers": 2},
    ),
    "recompute_allgather2": (2, {**ALLGATHER, "parallel__context": 2, "train__recompute_layers": 2}),
}
# The others cover each of these options, and each pair of two kinds of ranks.
SLOW = (
    *("tp2", "tp2_sp", "pp2", "vpp2", "dp2", "dp4", "tp2_pp2", "tp2_dp2", "unpacked", "unpacked_tp2_pp2"),
    *("recompute", "recompute_allgather2", "unpacked_allgather2_pp2", "recompute_ulysses2_pp2"),
)
REST = ("qwen2_untied", "llama3", "llama32_tied")
SHORT = {"train__steps": 3}  # at the second the optimizer's moments are no longer 0


@pytest.fixture(scope="module")
def reference(pool, tiny_models, chat_file, tmp_path_factory):
    done = {}

    def get(variant, **options):
        key = (variant, *sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("reference")
            arguments = run_arguments(
                tiny_models(variant), chat_file, folder, checkpoint__export_hf=True, **SHORT, **options
            )
            pool.run(1, training_ranks.train, arguments)
            done[key] = folder
        return done[key]

    return get


def assert_same_run(got, want):
    got_rows, want_rows = metrics_of(got), metrics_of(want)
    assert [row["step"] for row in got_rows] == [1, 2, 3]
    for row, same in zip(got_rows, want_rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(same[key], rel=1e-5), (row["step"], key)
        assert (row["tokens"], row["samples"]) == (same["tokens"], same["samples"])
    weights, reference = (load_file(folder / "hf" / "model.safetensors") for folder in (got, want))
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        # Adam turns a gradient of rounding noise into a step of lr: 3 steps x 1e-3 bound any such element.
        assert (tensor - reference[name]).abs().max() <= 3.1e-3, name
        torch.testing.assert_close(tensor.norm(), reference[name].norm(), rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, SLOW))
def test_layouts_agree(pool, tiny_models, chat_file, tmp_path, reference, layout):
    world, options = LAYOUTS[layout]
    options = {**SHORT, **options, "checkpoint__export_hf": True}
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **options))
    assert_same_run(tmp_path, reference("qwen2_tied"))


@pytest.mark.parametrize("variant", mark_slow(REST, ["llama3"]))  # llama32_tied has its rope too
def test_every_family_agrees_on_tp2_pp2(pool, tiny_models, chat_file, tmp_path, reference, variant):
    options = {"parallel__tensor": 2, "parallel__pipeline": 2}
    arguments = run_arguments(
        tiny_models(variant), chat_file, tmp_path, checkpoint__export_hf=True, **SHORT, **options
    )
    pool.run(4, training_ranks.train, arguments)
    assert_same_run(tmp_path, reference(variant))


@pytest.mark.parametrize(
    "world, layout",
    [
        (2, {"parallel__tensor": 2}),
        pytest.param(2, {"parallel__pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(1, {"data__packing": False}, marks=pytest.mark.slow),
        pytest.param(2, {**ULYSSES, "parallel__context": 2}, marks=pytest.mark.slow),
        pytest.param(2, {**ALLGATHER, "parallel__context": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp2", "pp2", "dp2", "unpacked", "ulysses2", "allgather2"],
)
def test_bf16_layouts_agree_as_far_as_bf16_goes(
    pool, tiny_models, chat_file, tmp_path, reference, world, layout
):
    """bf16 keeps 8 bits (4e-3): sums over ranks and packs round in another order, and steps add up."""
    options = {"train__precision": "bf16"}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, **SHORT, **layout, **options)
    pool.run(world, training_ranks.train, arguments)
    want = metrics_of(reference("qwen2_tied", **options))
    for row, same in zip(metrics_of(tmp_path), want, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-2)
    exact = metrics_of(reference("qwen2_tied"))
    for row, fp32 in zip(want, exact, strict=True):
        assert row["loss"] == pytest.approx(fp32["loss"], rel=1e-3)


def test_sample_normalisation_agrees_on_tp2_dp2(pool, tiny_models, chat_file, tmp_path, reference):
    options = {"objective__normalization": "sample"}
    arguments = run_arguments(
        tiny_models(), chat_file, tmp_path, checkpoint__export_hf=True, parallel__tensor=2, **SHORT, **options
    )
    pool.run(4, training_ranks.train, arguments)
    assert_same_run(tmp_path, reference("qwen2_tied", **options))
    token = [row["loss"] for row in metrics_of(reference("qwen2_tied"))]
    # Within three steps the two differ by several 1e-4: ten times what layouts may.
    assert [row["loss"] for row in metrics_of(tmp_path)] != pytest.approx(token, rel=1e-4)


@pytest.mark.parametrize(
    "samples, layout",
    [
        (3, {}),
        (1, {**ALLGATHER, "parallel__context": 2}),
        pytest.param(1, {**ULYSSES, "parallel__context": 2, "parallel__tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=["dp4", "allgather2_dp2", "ulysses2_tp2"],
)
def test_fewer_samples_than_ranks(pool, tiny_models, chat_file, tmp_path, reference, samples, layout):
    """Some ranks get packs of padding only, or no scored row of a pack, and still take part."""
    options = {"train__global_batch_size": samples}
    arguments = run_arguments(
        tiny_models(), chat_file, tmp_path, checkpoint__export_hf=True, **SHORT, **layout, **options
    )
    pool.run(4, training_ranks.train, arguments)
    assert_same_run(tmp_path, reference("qwen2_tied", **options))
