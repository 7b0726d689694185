"""Layers are distributed as megatron-core distributes them, each once, or the layout is refused with one line."""

import re

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model.policy import transformer_config
from megatron_align.model.stages import layers_of_chunks
from tests.harness.tiny import make_model

SPLITS = {
    "first": (5, {"pipeline": 2, "first_stage_layers": 2}, [2, 3]),
    "last": (5, {"pipeline": 2, "last_stage_layers": 2}, [3, 2]),
    "both_of_2": (5, {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 4}, [1, 4]),
    "both_of_4": (6, {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}, [1, 2, 2, 1]),
    "first_virtual": (6, {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}, [1, 2, 1, 2]),
    "both_virtual": (
        8,
        {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 6},
        [1, 3, 1, 3],
    ),
    "both_virtual_of_3": (
        8,
        {"pipeline": 3, "virtual_pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 2},
        [1, 2, 1, 1, 2, 1],
    ),
    "embedding": (7, {"pipeline": 4, "count_embedding": True}, [1, 2, 2, 2]),
    "loss": (7, {"pipeline": 4, "count_loss": True}, [2, 2, 2, 1]),
    "counted": (6, {"pipeline": 2, "count_embedding": True, "count_loss": True}, [3, 3]),
    "counted_virtual": (
        6,
        {"pipeline": 2, "virtual_pipeline": 2, "count_embedding": True, "count_loss": True},
        [1, 2, 2, 1],
    ),
    "even": (8, {"pipeline": 2, "virtual_pipeline": 2}, [2, 2, 2, 2]),
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    from megatron_align.model.families import read_shape

    return read_shape(make_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("split", SPLITS)
def test_as_megatron_core_builds_them(split, shape):
    from dataclasses import replace

    layers, options, expected = SPLITS[split]
    parallel = ParallelConfig(**options)
    assert layers_of_chunks(layers, parallel) == expected
    config = transformer_config(replace(shape, num_layers=layers), parallel, torch.float32)
    order = [(stage, chunk) for chunk in range(parallel.chunks) for stage in range(parallel.pipeline)]
    virtual = parallel.virtual_pipeline
    places = [(config, chunk if virtual else None, stage) for stage, chunk in order]
    assert [get_num_layers_to_build(*place) for place in places] == expected
    assert [get_transformer_layer_offset(*place) for place in places] == [
        sum(expected[:i]) for i in range(len(expected))
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first_stage_layers": 2}, "first_stage_layers needs at least 2 stages of parallel.pipeline, got 1"),
        ({"count_loss": True}, "count_loss needs at least 2 stages of parallel.pipeline, got 1"),
        ({"pipeline": 2, "last_stage_layers": 0}, "last_stage_layers must be at least 1, got 0"),
        ({"pipeline": 2, "last_stage_layers": 2, "count_loss": True}, "or count_embedding and count_loss"),
        ({"pipeline": 2, "first_stage_layers": 6}, "equal layers, at least one each; they leave 0 of 6"),
        ({"pipeline": 4, "first_stage_layers": 2}, "the other 3 stages of parallel.pipeline equal layers"),
        (
            {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 2},
            "must add up to the model's 6 layers on 2 stages, they leave 2",
        ),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 3},
            r"virtual_pipeline must divide the layers of every stage, got 2 for \[3, 3\]",
        ),
        ({"pipeline": 2, "count_loss": True}, "6 layers and the 1 counted in addition, got 2 x 1 = 2"),
        (
            {"pipeline": 4, "virtual_pipeline": 2, "count_embedding": True, "count_loss": True},
            r"must leave every chunk a layer, got \[0, 1, 1, 1, 1, 1, 1, 0\] of 6 layers",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        layers_of_chunks(6, ParallelConfig(**options))


@pytest.mark.parametrize(
    "layers, options, way_out",
    [
        (28, {"pipeline": 3}, ": set parallel.first_stage_layers (or last_stage_layers) 8, the others then have 10"),
        (4, {"pipeline": 3}, ": set parallel.first_stage_layers (or last_stage_layers) 2, the others then have 1"),
        (30, {"pipeline": 4, "virtual_pipeline": 2}, " (or last_stage_layers) 6, the others then have 8"),
        (2, {"pipeline": 3}, ": use parallel.pipeline 2"),
    ],
)  # fmt: skip
def test_layers_that_do_not_divide_name_a_way_out_that_works(layers, options, way_out):
    with pytest.raises(InputError) as error:
        layers_of_chunks(layers, ParallelConfig(**options))
    assert str(error.value).endswith(way_out)
    if first := re.search(r"last_stage_layers\) (\d+)", way_out):
        for name in ("first_stage_layers", "last_stage_layers"):
            assert sum(layers_of_chunks(layers, ParallelConfig(**options, **{name: int(first[1])}))) == layers
