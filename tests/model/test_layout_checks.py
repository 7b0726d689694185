"""A layout that the model does not divide over is refused in words, before any rank is joined."""

import pytest
import torch

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import read_shape
from megatron_align.model.policy import transformer_config


@pytest.mark.parametrize(
    "parallel, recompute, message",
    [
        ({"tensor": 3}, 0, "parallel.tensor must divide the model's 8 attention heads, got 3"),
        ({"pipeline": 3}, 0, "must divide the model's 4 layers, got 3 x 1 = 3"),
        ({"pipeline": 4, "virtual_pipeline": 2}, 0, "must divide the model's 4 layers, got 4 x 2 = 8"),
        ({"pipeline": 2}, 3, "train.recompute_layers must be at most the 2 layers of a model chunk, got 3"),
        (
            {"tensor": 2, "context": 8, "context_kind": "ulysses"},
            0,
            "tensor x context divide, got 8 heads for 2 x 8; use allgather, which has no such rule",
        ),
    ],
)
def test_refused(tiny_models, parallel, recompute, message):
    with pytest.raises(InputError, match=message):
        transformer_config(read_shape(tiny_models()), ParallelConfig(**parallel), torch.float32, recompute)


def test_key_value_heads_and_ranks_must_nest(tmp_path):
    from tests.harness.tiny import make_model

    six = make_model(
        tmp_path / "six", hidden_size=72, num_attention_heads=12, num_key_value_heads=6, head_dim=8
    )
    with pytest.raises(InputError, match="the model's 6 key/value heads or be a multiple of them, got 4"):
        transformer_config(read_shape(six), ParallelConfig(tensor=4), torch.float32)


def test_auto_never_asks_for_heads_that_are_not_there(tiny_models):
    shape = read_shape(tiny_models())  # 8 heads, 2 key/value heads
    assert context_kind_of(shape, ParallelConfig(tensor=2, context=8)) == "allgather"
    assert context_kind_of(shape, ParallelConfig(context=8)) == "ulysses"
    assert context_kind_of(shape, ParallelConfig(context=8, context_kind="allgather")) == "allgather"
    assert context_kind_of(shape, ParallelConfig(tensor=8)) is None


def test_world_size():
    assert ParallelConfig(tensor=2, pipeline=2).data_parallel(8) == 2
    with pytest.raises(InputError, match="multiple of tensor x pipeline x context = 2 x 2 x 1 = 4, got 6"):
        ParallelConfig(tensor=2, pipeline=2).data_parallel(6)
