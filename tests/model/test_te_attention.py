"""``model.attention: te`` gives what our attention gives, in repeatable kernels only, or is refused in one line.

Transformer Engine needs a GPU: a stand-in with its signatures computes in PyTorch (``harness/fake_packages.py``). Loss
and gradients of a model are in ``test_optional_packages.py``.
"""

import pytest
import torch

from megatron_align import load_config
from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.kernels import PackedLayout, packed_attention_reference
from megatron_align.model.families import read_shape
from megatron_align.model.flash import Documents
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.policy import transformer_config
from megatron_align.model.te_attention import TeAttention
from megatron_align.training.model_checks import require_kernels, require_unshared_prompts
from tests.harness.fake_packages import installed
from tests.model.test_flash import LAYOUTS

SECTIONS = {"model": {"path": "m"}, "data": {"train": "d"}, "checkpoint": {"dir": "c"}, "train": {"steps": 1}}


def attention_of(layout, groups=2, scale=0.3):
    """Return the output of 4 heads and its gradients with ``te`` and with the reference, in float64."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(layout.tokens, heads, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, groups, groups)
    ]
    out = TeAttention(16)(*tensors, Documents.of_layout(layout), scale)
    want = packed_attention_reference(*tensors, layout, scale=scale)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    of_te = torch.autograd.grad(out, tensors, weight, allow_unused=True)
    of_te = [torch.zeros_like(x) if g is None else g for g, x in zip(of_te, tensors, strict=True)]
    return [out, *of_te], [want, *torch.autograd.grad(want, tensors, weight)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_output_and_gradients_are_the_references(layout):
    with installed("te"):
        for got, want in zip(*attention_of(layout), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_every_number_of_heads_and_scale_has_its_own_module():
    with installed("te"):
        attention, layout = TeAttention(8), PackedLayout.from_lengths([3])
        for heads, scale in ((4, 0.3), (2, 0.3), (4, None), (4, 0.3)):
            q, kv = torch.randn(3, heads, 8), torch.randn(3, 2, 8)
            out = attention(q, kv, kv, Documents.of_layout(layout), scale)
            torch.testing.assert_close(out, packed_attention_reference(q, kv, kv, layout, scale=scale))
        assert len(attention._modules) == 3


@pytest.mark.parametrize(
    "packages, chip, head_dim, message",
    [
        (("te",), None, 64, "needs a CUDA GPU, this process sees none"),
        (("te",), (7, 5), 64, "needs a GPU of sm_80 or newer, got sm_75: use model.attention: auto"),
        (
            (),
            (9, 0),
            64,
            "needs transformer-engine 2.8 or newer .*: not installed .*use model.attention: auto",
        ),
        (("te",), (9, 0), 100, "head dimensions are multiples of 8 up to 256, got 100"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(packages, chip, head_dim, message):
    with installed(*packages, chip=chip), pytest.raises(InputError, match=message) as refused:
        TeAttention(head_dim)
    assert str(refused.value).startswith("model.attention: te")


def test_a_shape_without_a_kernel_is_named():
    message = "no kernel for 4 heads of dimension 16 over 2, .*NVTE_DEBUG=1"
    with installed("te", lacks="kernel"), pytest.raises(InputError, match=message):
        attention_of(LAYOUTS["documents"])


def test_fp32_shared_prompts_and_gathered_keys_are_refused(tiny_models):
    options = ["model.attention=te", "objective.name=dpo"]
    with pytest.raises(InputError, match="model.attention: te needs train.precision: bf16, got fp32"):
        load_config(SECTIONS, [*options, "train.precision=fp32"])
    pairs = type("Table", (), {"completion_counts": torch.tensor([1, 2]), "__len__": lambda self: 2})()
    with pytest.raises(InputError, match="model.attention: te cannot share a prompt between completions"):
        require_unshared_prompts(load_config(SECTIONS, options), {"train": pairs})
    shape, te = read_shape(tiny_models()), KernelChoice(attention="te")
    with pytest.raises(InputError, match="model.attention: te needs parallel.context_kind: ulysses"):
        transformer_config(
            shape, ParallelConfig(context=2, context_kind="allgather"), torch.bfloat16, kernels=te
        )
    with installed(), pytest.raises(InputError, match="model.attention: te needs transformer-engine"):
        require_kernels(load_config(SECTIONS, options), shape, dry_run=False)
