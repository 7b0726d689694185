"""Any config.json is either read or refused with one line: no traceback, no hang, no memory without bound.

The model's tensors are listed too: a shape that is read must have a table of rows that can be walked.
"""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_align.errors import InputError
from megatron_align.model.families import read_shape, rows
from megatron_align.model.families.shape import _DEFAULTS

GOOD = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
}
KEYS = sorted(
    {key for defaults in _DEFAULTS.values() for key in defaults}
    | {*GOOD, "model_type", "num_labels", "id2label", "layer_types", "quantization_config", "rope_theta"}
    | {"rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"}
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(0, 8),
    st.integers(2**30, 2**34),
    st.integers(10**300, 10**320),
    st.floats(),
    st.sampled_from([10**7, 2**63, -1, 0, 1e-320, 1e300, math.inf]),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from([*_DEFAULTS, "llama3"])
)
ROPE = st.dictionaries(
    st.sampled_from(
        ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"]
        + ["original_max_position_embeddings", "partial_rotary_factor"]
    ),
    st.one_of(SCALARS, NUMBERS, st.sampled_from(["llama3", "default", 1.0, 8.0])),
)
VALUES = st.one_of(
    SCALARS,
    ROPE,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
)


def read(folder, text):
    """Read a config.json; return the shape, or None if it was refused with one line of reasonable length."""
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        shape = read_shape(folder)
    except InputError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in refusal
        assert len(refusal) < 1500
        return None
    sizes = [math.prod(size) for row in rows(shape) for size in row.hf_shapes(shape)]
    assert all(size > 0 for size in sizes)
    assert bool(shape.rope_frequencies().isfinite().all()) if shape.head_dim < 10**5 else True
    return shape


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    architecture=st.sampled_from([*_DEFAULTS]),
    dropped=st.sets(st.sampled_from([*GOOD]), max_size=2),
)
def test_values_of_any_kind(tmp_path, changes, architecture, dropped):
    config = {**GOOD, "architectures": [architecture], **changes}
    read(tmp_path, json.dumps({key: value for key, value in config.items() if key not in dropped}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=40), st.binary(max_size=40).map(lambda b: b.decode("latin-1"))))
def test_any_text(tmp_path, text):
    read(tmp_path, text)
    read(tmp_path, '{"architectures": ' + text + "}")


CORPUS = {
    "100,000 brackets": "[" * 100_000,
    "nested object": '{"a": ' * 100_000,
    "nested value": json.dumps(GOOD)[:-1] + ', "hidden_size": ' + "[" * 900 + "]" * 900 + "}",
    "5,000 digits": json.dumps(GOOD)[:-1] + ', "vocab_size": ' + "9" * 5_000 + "}",
    "4,000 digits": json.dumps(GOOD)[:-1] + ', "rope_theta": ' + "9" * 4_000 + "}",
    "ten million layers": json.dumps({**GOOD, "num_hidden_layers": 10**7}),
    "a long name": json.dumps({**GOOD, "architectures": ["x" * 10**6]}),
    "not UTF-8": '"\udcff',
    "null byte": "\0" * 100,
}


@pytest.mark.parametrize("text", CORPUS.values(), ids=list(CORPUS))
def test_known_bad_files(tmp_path, text):
    assert read(tmp_path, text) is None


def test_a_good_file(tmp_path):
    assert read(tmp_path, json.dumps(GOOD)).num_layers == 2
