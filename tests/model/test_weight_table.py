"""The weight table is a bijection: for any number of tensor ranks, each element of an HF tensor is in one shard."""

import pytest
import torch

from megatron_align.errors import InputError
from megatron_align.model.families import (
    TABLES,
    ModelShape,
    copy_segments,
    local_shape,
    padded_vocab,
    rows,
    to_hf,
    to_megatron,
)


def tiny(architecture="Qwen2ForCausalLM", **changes):
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_size": 24,
        "num_heads": 8,
        "num_query_groups": 2,
        "head_dim": 4,
        "vocab_size": 131,
        "tied_embeddings": False,
        "qkv_bias": architecture == "Qwen2ForCausalLM",
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "max_positions": 64,
    }
    return ModelShape(architecture=architecture, **{**sizes, **changes})


def shard(row, shape, parts, rank, ranks):
    """Build one rank's tensor from complete HF tensors, by the segments."""
    dim = row.split or 0
    tensors, pieces = dict(zip(row.hf, parts, strict=True)), []
    for name, hf_start, _, count, _ in copy_segments(row, shape, rank, ranks):
        size = list(parts[0].shape)
        size[dim] = count
        pieces.append(torch.zeros(size) if name is None else tensors[name].narrow(dim, hf_start, count))
    return torch.cat(pieces, dim)


def named(shape, name):
    return next(row for row in rows(shape) if row.megatron == name)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("architecture", TABLES)
def test_every_element_is_in_exactly_one_shard(architecture, groups, ranks):
    shape = tiny(architecture, num_query_groups=groups)
    for row in rows(shape):
        sizes = [s[row.split or 0] for s in row.hf_shapes(shape)]
        times = {n: torch.zeros(size, dtype=torch.int64) for n, size in zip(row.hf, sizes, strict=True)}
        zeros = 0
        for rank in range(ranks):
            position = 0
            for segment in copy_segments(row, shape, rank, ranks):
                assert segment.start == position
                position += segment.size
                if segment.name is None:
                    zeros += segment.size
                else:
                    times[segment.name][segment.hf_start : segment.hf_start + segment.size] += 1
            assert position == local_shape(row, shape, ranks)[row.split or 0]
        copies = ranks if row.split is None else 1
        assert all((t == copies).all() for t in times.values()), row.megatron
        is_vocab = row.dims[0][0] == "vocab"
        assert zeros == (padded_vocab(131, ranks) - 131 if is_vocab else 0), row.megatron


@pytest.mark.parametrize("architecture", TABLES)
def test_any_interval_of_rows_is_what_slicing_the_megatron_tensor_gives(architecture):
    """Also of tensors that ranks cut along columns; and to_hf inverts to_megatron."""
    shape = tiny(architecture)
    for row in rows(shape):
        tensors = {name: torch.randn(size) for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)}
        joined = to_megatron(row, tensors, shape)
        back = to_hf(row, [joined], shape)
        assert all(torch.equal(back[name], tensors[name]) for name in row.hf)
        for start, stop in ((0, len(joined)), (0, 1), (len(joined) // 3, len(joined) // 3 + 7)):
            rebuilt = torch.full_like(joined, torch.nan)
            for segment in copy_segments(row, shape, dim=0, within=(start, min(stop, len(joined)))):
                source = 0 if segment.name is None else segment.of_hf(tensors[segment.name])
                segment.of_megatron(rebuilt).copy_(torch.as_tensor(source))
            assert torch.equal(rebuilt[start:stop], joined[start:stop]), row.megatron
            assert rebuilt.isnan().sum() == joined.numel() - joined[start:stop].numel()


@pytest.mark.parametrize("tail", [(), (16,)], ids=["bias", "weight"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_qkv_puts_each_key_value_head_after_its_queries(ranks, groups, tail):
    """Also where the cut goes through a group, as groups < ranks makes it."""
    shape = tiny(num_query_groups=groups)
    d, per_group = shape.head_dim, shape.num_heads // groups
    q, k, v = (torch.randn(heads * d, *tail) for heads in (shape.num_heads, groups, groups))
    by_hand = []
    for g in range(groups):
        by_hand += [
            q[g * per_group * d : (g + 1) * per_group * d],
            k[g * d : (g + 1) * d],
            v[g * d : (g + 1) * d],
        ]
    row = named(shape, "decoder.layers.1.self_attention.linear_qkv." + ("weight" if tail else "bias"))
    for rank, want in enumerate(torch.cat(by_hand).chunk(ranks)):
        assert torch.equal(shard(row, shape, [q, k, v], rank, ranks), want)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_packed_qkv_is_laid_out_like_three_tensors(ranks):
    apart, packed = tiny("LlamaForCausalLM"), tiny("BaichuanForCausalLM")
    parts = [torch.randn(size, 16) for size in (32, 8, 8)]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    for rank in range(ranks):
        want = shard(named(apart, name), apart, parts, rank, ranks)
        assert torch.equal(shard(named(packed, name), packed, [torch.cat(parts)], rank, ranks), want)


@pytest.mark.parametrize("architecture", [name for name in TABLES if "Classification" in name])
def test_every_rank_holds_the_full_reward_head(architecture):
    shape = tiny(architecture)
    row = named(shape, "reward_head.weight")
    assert (row.hf, row.split, local_shape(row, shape, 4)) == (("score.weight",), None, (1, 16))
    assert "output_layer.weight" not in {row.megatron for row in rows(shape)}


def test_each_rank_holds_its_gate_rows_and_then_its_up_rows():
    shape = tiny()
    gate, up = torch.randn(24, 16), torch.randn(24, 16)
    row = named(shape, "decoder.layers.0.mlp.linear_fc1.weight")
    assert torch.equal(shard(row, shape, [gate, up], 1, 4), torch.cat([gate[6:12], up[6:12]]))


def test_row_parallel_weights_are_cut_by_columns():
    shape = tiny()
    down = torch.randn(16, 24)
    row = named(shape, "decoder.layers.0.mlp.linear_fc2.weight")
    assert torch.equal(shard(row, shape, [down], 3, 4), down[:, 18:])


def test_vocabulary_is_padded_with_zeros_at_its_end():
    shape = tiny()
    table = torch.randn(131, 16)
    row = named(shape, "embedding.word_embeddings.weight")
    last = shard(row, shape, [table], 1, 2)
    assert last.shape == (128, 16)
    assert torch.equal(last[:3], table[128:])
    assert not last[3:].any()


@pytest.mark.parametrize(
    "size, ranks, want", [(131, 1, 256), (128, 8, 128), (131, 3, 384), (151936, 8, 151936), (1, 256, 256)]
)
def test_padded_vocabulary(size, ranks, want):
    assert padded_vocab(size, ranks) == want


def test_tied_embeddings_have_no_output_layer():
    names = {row.megatron for row in rows(tiny(tied_embeddings=True))}
    assert names == {row.megatron for row in rows(tiny())} - {"output_layer.weight"}


def test_ranks_that_do_not_divide_are_named():
    shape = tiny()
    with pytest.raises(InputError) as error:
        list(copy_segments(named(shape, "decoder.layers.1.mlp.linear_fc1.weight"), shape, 0, 5))
    line = "parallel.tensor must divide the 24 of decoder.layers.1.mlp.linear_fc1.weight, got 5 ranks"
    assert str(error.value) == line
