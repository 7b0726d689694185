"""``model.attention: flash`` gives what our attention gives, by each of its packages, or is refused in one line.

The packages themselves need a GPU: stand-ins with their signatures compute in PyTorch (``harness/fake_packages.py``).
"""

import numpy as np
import pytest
import torch

from megatron_align import load_config
from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.kernels import PackedLayout, packed_attention_reference
from megatron_align.model.families import read_shape
from megatron_align.model.flash import Documents, find_flash
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.policy import transformer_config
from megatron_align.training.model_checks import require_unshared_prompts
from tests.harness import training_ranks
from tests.harness.fake_packages import installed
from tests.harness.tiny import metrics_of, run_arguments, write_pairs

LAYOUTS = {
    "documents": PackedLayout.from_lengths([5, 0, 9, 1]),
    "padding": PackedLayout.from_groups([(3, [4]), (0, [6])], total=17),
    "nothing but padding": PackedLayout.from_lengths([], total=4),
}


@pytest.mark.parametrize("package, chip", [("flash2", (8, 0)), ("flash3", (9, 0)), ("flash4", (10, 0))])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_output_and_gradients_are_the_references(layout, package, chip):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(layout.tokens, heads, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    ]
    with installed(package, chip=chip):
        out = find_flash(16)(*tensors, Documents.of_layout(layout), 0.3)
    want = packed_attention_reference(*tensors, layout, scale=0.3)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for got_g, want_g in zip(
        torch.autograd.grad(out, tensors, weight, allow_unused=True),
        torch.autograd.grad(want, tensors, weight),
        strict=True,
    ):
        got_g = torch.zeros_like(want_g) if got_g is None else got_g
        torch.testing.assert_close(got_g, want_g, rtol=1e-12, atol=1e-12)


def test_documents_are_complete_and_unshared():
    layout = PackedLayout.from_groups([(3, [4, 2])])
    with pytest.raises(ValueError, match="without shared prompts"):
        Documents.of_layout(layout)
    with pytest.raises(ValueError, match="complete packs"):
        Documents.of_layout(PackedLayout.from_lengths([8]).for_queries(torch.arange(4)))


@pytest.mark.parametrize(
    "packages, chip, name",
    [
        (("flash2", "flash3"), (9, 0), "FlashAttention-3"),
        (("flash2",), (9, 0), "flash-attn 2.8.3"),
        (("flash4",), (9, 0), "flash-attn-4 4.0.0b36"),
        (("flash4",), (10, 3), "flash-attn-4 4.0.0b36"),
        (("flash2", "flash3"), (8, 6), "flash-attn 2.8.3"),
    ],
)
def test_the_chip_decides_which_package_is_used(packages, chip, name):
    with installed(*packages, chip=chip):
        assert find_flash(128).name == name


@pytest.mark.parametrize(
    "packages, chip, head_dim, options, message",
    [
        ((), None, 128, {}, "needs a CUDA GPU, this process sees none; leave it out"),
        ((), (7, 5), 128, {}, "needs a GPU of sm_80 or newer, got sm_75: use model.attention: auto"),
        ((), (8, 0), 128, {}, "for sm_80 and head dimension 128: flash-attn: not installed \\(pip install"),
        (("flash2",), (8, 0), 128, {"version": "2.5.6"}, "2.5.6 is installed, 2.8 or newer is needed"),
        (
            ("flash2",),
            (8, 0),
            100,
            {},
            "head dimension 100: flash-attn 2.8.3: head dimensions are multiples of 8",
        ),
        (
            ("flash4",),
            (10, 0),
            192,
            {},
            "on sm_100 are multiples of 8 up to 128, or 256; flash-attn: not installed",
        ),
        (("flash3",), (9, 0), 264, {}, "multiples of 8 up to 256; flash-attn-4: not installed"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(packages, chip, head_dim, options, message):
    with installed(*packages, chip=chip, **options), pytest.raises(InputError, match=message) as refused:
        find_flash(head_dim)
    assert str(refused.value).startswith("model.attention: flash ")


def test_an_interface_without_what_is_passed_is_named():
    with installed("flash3", chip=(9, 0)):
        import flash_attn_interface

        flash_attn_interface.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q: q
        with pytest.raises(
            InputError, match="flash_attn_varlen_func has no cu_seqlens_k, max_seqlen_q, .*determin"
        ):
            find_flash(64)


def _config(**options):
    sections = {
        "model": {"path": "m", "attention": "flash"},
        "data": {"train": "d"},
        "checkpoint": {"dir": "c"},
    }
    return load_config(
        {**sections, "objective": {"name": "dpo"}, "train": {"steps": 1}},
        {k.replace("__", "."): v for k, v in options.items()},
    )


def test_fp32_and_shared_prompts_are_refused():
    with pytest.raises(InputError, match="model.attention: flash needs train.precision: bf16, got fp32"):
        _config(train__precision="fp32")
    pairs = type("Table", (), {"completion_counts": np.array([1, 2]), "__len__": lambda self: 2})()
    with pytest.raises(
        InputError, match="data.validation has up to 2 of them .*: set data.share_prefix: false"
    ):
        require_unshared_prompts(_config(), {"validation": pairs})
    require_unshared_prompts(_config(data__share_prefix=False), {"validation": pairs})
    require_unshared_prompts(_config(model__attention="auto"), {"validation": pairs})


def test_ranks_that_hold_some_of_the_queries_are_refused(tiny_models):
    shape, flash = read_shape(tiny_models()), KernelChoice(attention="flash")
    for kind in ("allgather", "auto"):
        with pytest.raises(InputError, match="needs parallel.context_kind: ulysses, .* got " + kind):
            transformer_config(
                shape, ParallelConfig(context=2, context_kind=kind), torch.bfloat16, kernels=flash
            )
    config = transformer_config(
        shape, ParallelConfig(context=2, context_kind="ulysses"), torch.bfloat16, kernels=flash
    )
    assert config.kernels.attention == "flash"


def test_a_run_has_the_numbers_of_a_run_without_it(pool, tiny_models, tmp_path):
    """Pairs with copied prompts, on context-parallel ranks; two orders of summation in bf16."""
    data = write_pairs(tmp_path / "pairs.jsonl", samples=8)
    rows = {}
    for name, packages in {"auto": [], "flash": ["flash3"]}.items():
        arguments = run_arguments(
            tiny_models(), data, tmp_path / name, objective__name="dpo", train__precision="bf16", train__steps=2,
            train__global_batch_size=4, model__attention=name, data__share_prefix=False, parallel__context=2,
            parallel__context_kind="ulysses",
        )  # fmt: skip
        pool.run(2, training_ranks.train_with_fakes, arguments, *packages)
        rows[name] = [(row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / name)]
    for got, want in zip(rows["flash"], rows["auto"], strict=True):
        assert got == pytest.approx(want, rel=1e-2)
