"""``model.freeze``: patterns of Hugging Face names select exactly those tensors, or are refused in one line."""

import pytest

from megatron_align.errors import InputError
from megatron_align.model.families import read_shape
from megatron_align.model.families.frozen import frozen_tensors


@pytest.fixture(scope="module")
def shape(tiny_models):
    return read_shape(tiny_models())


@pytest.mark.parametrize(
    "patterns, names",
    [
        ([], set()),
        (["model.norm.weight"], {"decoder.final_layernorm.weight"}),
        (["model.norm"], {"decoder.final_layernorm.weight"}),
        # tied: the copy on the last pipeline stage is frozen with it
        (["embed_tokens"], {"embedding.word_embeddings.weight", "output_layer.weight"}),
        (["layers.0.self_attn.o_proj"], {"decoder.layers.0.self_attention.linear_proj.weight"}),
        (
            ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"],
            {"decoder.layers.1.mlp.linear_fc1.weight"},
        ),
    ],
)
def test_patterns(shape, patterns, names):
    assert frozen_tensors(shape, patterns) == names


def test_a_layer(shape):
    found = frozen_tensors(shape, ["layers.2.*"])
    assert len(found) == 7
    assert all(name.startswith("decoder.layers.2.") for name in found)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["embed_token"], r"'embed_token' matches no tensor .* did you mean 'embed_tokens'\?"),
        (["lm_head"], r"'lm_head' matches no tensor .*lm_head is embed_tokens here"),
        (
            ["q_proj"],
            r"all or none of the tensors that are one matrix here: .*q_proj.weight would be frozen, .*k_proj",
        ),
        (
            ["[qkv]_proj.weight"],
            r"must name .*q_proj.bias.* with the weights, as a bias cannot be trained alone",
        ),
        (["*"], "must leave something to train"),
    ],
)
def test_patterns_that_cannot_be(shape, patterns, message):
    with pytest.raises(InputError, match=message):
        frozen_tensors(shape, patterns)
