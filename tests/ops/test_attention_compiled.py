"""Every row of the table of tiles compiles for its chip: no spills, shared memory within the limit, tensor cores used,
and a loop over full tiles without mask code.

What is compiled is what ``packed_attention`` launches there, forward and backward, for all queries and for a rank's
share of them. No GPU is needed.
"""

import pytest
import torch

from megatron_align.kernels import PackedLayout
from megatron_align.kernels.packed_attention import tiles as tile_sizes
from megatron_align.kernels.packed_attention.autograd import attend
from megatron_align.kernels.packed_attention.tuned_tiles import TABLE
from tests.harness.compiled import compiling_for
from tests.harness.marks import mark_slow

WHOLE = PackedLayout.from_lengths([256])
SHARE = WHOLE.for_queries(torch.arange(3, 256, 2))  # 127: no multiple of anything

# Instructions of the inner loop that are not matrix products, of all warps for 1,024 scores (forward, dq, dkdv), when
# full and partial tiles shared one loop: listings of Triton 3.6, with mask code that a full tile jumped over.
ONE_LOOP = {
    ("sm_80", 64): (647, 549, 712),
    ("sm_80", 128): (1028, 846, 966),
    ("sm_90", 64): (520, 494, 588),
    ("sm_90", 128): (566, 602, 828),
}


def compiled(chip, head_dim, dtype, tiles, layout=WHOLE):
    shapes = [(layout.queries, 8, head_dim), *[(layout.tokens, 2, head_dim)] * 2]
    tensors = [torch.zeros(shape, dtype=dtype).requires_grad_() for shape in shapes]
    with compiling_for(chip) as built:
        out = attend(*tensors, layout, head_dim**-0.5, tiles)
        out.backward(torch.ones_like(out))
    assert [kernel.name for kernel in built] == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    return built


def faults(built, **needs):
    return "\n".join(filter(None, (kernel.fault(**needs) for kernel in built)))


LAYOUTS = {"all": WHOLE, "share": SHARE}
# fp16 has the tiles of bf16 (test below), and the same instructions. Each row with one of the layouts on every commit.
ROWS = [(row, layout) for row in TABLE if row[2] == "bfloat16" for layout in LAYOUTS]


@pytest.mark.parametrize(
    "row, layout", mark_slow(ROWS, [case for i, case in enumerate(ROWS) if i % 4 in (1, 2)]), ids=str
)
def test_rows_of_16_bit(row, layout):
    chip, head_dim, name = row
    dtype = getattr(torch, name)
    tiles = tile_sizes.choose_tiles(chip, head_dim, dtype)
    built = compiled(chip, head_dim, dtype, tiles, LAYOUTS[layout])
    assert not faults(built)
    assert all(kernel.warpgroup for kernel in built) == (chip == "sm_90")
    # Counted for all queries: an odd number of them costs the loads of their log-sum-exps a few more.
    counted = ONE_LOOP[chip, head_dim] if layout == "all" else (float("inf"),) * 3
    for kernel, tile, before in zip(built, tiles, counted, strict=True):
        full, partial = sorted(kernel.loops, key=lambda loop: loop.other)
        assert full.matrix == partial.matrix
        now = full.other * kernel.warps * 1024 / (tile.queries * tile.keys)
        assert now * 1.5 <= before, (
            f"{kernel.name} on {chip}: {now:.0f} instructions for 1,024 scores, of {before}"
        )


@pytest.mark.parametrize("row", [row for row in TABLE if row[2] == "float32"], ids=str)
def test_rows_of_fp32_run_outside_the_tensor_cores(row):
    """TF32 would show here as tensor-core instructions."""
    chip, head_dim, name = row
    built = compiled(
        chip, head_dim, getattr(torch, name), tile_sizes.choose_tiles(*row[:2], getattr(torch, name))
    )
    assert not faults(built, tensor_core=False)
    assert not any(kernel.tensor_core for kernel in built)


@pytest.mark.parametrize(
    "chip, head_dim",
    mark_slow(
        [("sm_80", 64), ("sm_86", 128), ("sm_90", 80), ("sm_100", 128), ("sm_86", 256), ("sm_90", 256)],
        [("sm_80", 64), ("sm_86", 128), ("sm_90", 256)],
    ),
)
def test_safe_tiles_of_16_bit(chip, head_dim):
    tiles = tile_sizes.SAFE_16_BIT if head_dim <= 128 else tile_sizes.SAFE_16_BIT_WIDE
    assert not faults(compiled(chip, head_dim, torch.bfloat16, tiles))


def test_fp16_has_the_tiles_of_bf16():
    assert all(TABLE[row] == TABLE[(*row[:2], "bfloat16")] for row in TABLE if row[2] == "float16")


def test_a_chip_that_is_not_in_the_table_gets_the_safe_tiles_and_a_line_in_the_log(caplog):
    tile_sizes.choose_tiles.cache_clear()
    for _ in range(2):
        assert tile_sizes.choose_tiles("sm_77", 64, torch.bfloat16) == tile_sizes.SAFE_16_BIT
    assert tile_sizes.choose_tiles("sm_90", 80, torch.float16) == tile_sizes.SAFE_16_BIT
    assert tile_sizes.choose_tiles("sm_90", 256, torch.float32) == tile_sizes.SAFE_32_BIT_WIDE
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(";")[0] for line in lines] == [
        "packed_attention: no tuned tiles for sm_77, head dim 64, bfloat16",
        "packed_attention: no tuned tiles for sm_90, head dim 80, float16",
        "packed_attention: no tuned tiles for sm_90, head dim 256, float32",
    ]
