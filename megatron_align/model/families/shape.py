"""The shape of a model, read from a Hugging Face folder's config.json.

The JSON is read directly: missing keys take the default that ``transformers`` gives the class. A model that we would
compute differently from ``transformers`` is refused, never approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_align.errors import InputError, one_line, shown
from megatron_align.model.rope import RopeScaling, rope_frequencies


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes and options of an architecture that the model and the weight table need."""

    architecture: str  # Hugging Face class name
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    qk_norm: bool = False  # RMSNorm of queries and keys per head
    norm_head: bool = False  # the output head's rows are normalised to unit length (Baichuan2)

    @property
    def is_reward(self) -> bool:
        """Whether the model has a scalar reward head instead of a vocabulary head."""
        return self.architecture.endswith("ForSequenceClassification")

    def rope_frequencies(self) -> Tensor:
        """Return the rotary frequencies ``[head_dim / 2]`` in fp32 (``model/rope.py``)."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    def as_reward(self) -> ModelShape:
        """Return the shape of the reward model that training initialises from this model.

        Raises:
            InputError: if the family has no reward model.
        """
        if self.is_reward:
            return self
        family = self.architecture.removesuffix("ForCausalLM")
        architecture = f"{family}ForSequenceClassification"
        if architecture not in _DEFAULTS:
            families = [name for name in _DEFAULTS if name.endswith("ForSequenceClassification")]
            raise InputError(
                f"a reward model must be one of {', '.join(families)}; model.path is of {self.architecture}"
            )
        return replace(self, architecture=architecture, tied_embeddings=False)


# The defaults of transformers for keys missing in config.json. Sizes have none: a guess would be wrong.
_COMMON = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "head_dim": None,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {
        **_COMMON,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "LlamaForCausalLM": {
        **_COMMON,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "Qwen3ForCausalLM": {
        **_COMMON,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "attention_bias": False,
    },
    "MistralForCausalLM": {
        **_COMMON,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "BaichuanForCausalLM": {**_COMMON, "num_key_value_heads": None},
}
_DEFAULTS |= {
    f"{name}ForSequenceClassification": _DEFAULTS[f"{name}ForCausalLM"] for name in ("Qwen2", "Llama")
}
_ARCHITECTURE_OF_MODEL_TYPE = {
    name.removesuffix("ForCausalLM").lower(): name for name in _DEFAULTS if name.endswith("ForCausalLM")
}


# No model comes near; beyond, sizes of tensors or the number of rows of the weight table overflow memory or int64.
LARGEST_COUNT, MOST_LAYERS = 2**31 - 1, 10_000
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-30, 1e30


class _Keys:
    """Typed look-ups in one JSON object; ``source`` names it in errors."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def error(self, key: str, expected: str) -> InputError:
        found = shown(self.values[key]) if key in self.values else "nothing"
        return InputError(f"{key} must be {expected}, found {found} in {self.source}")

    def count(self, key: str, largest: int = LARGEST_COUNT) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 1 <= value <= largest:
            limit = "" if type(value) is not int or value < 1 else f" of at most {largest:,}"
            raise self.error(key, f"a positive whole number{limit}")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not SMALLEST_NUMBER <= value <= LARGEST_NUMBER
        ):
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        InputError: if there is no such file, or it does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise InputError(f"a Hugging Face folder needs a file {path.name}, found none at {path}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: malformed, not UTF-8, a number of 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, 200)
        raise InputError(f"{path} is not valid JSON: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a JSON object, found a {type(content).__name__}")
    return content


def read_shape(folder: str | Path) -> ModelShape:
    """Read ``config.json`` of a Hugging Face folder, written by transformers 4 or 5.

    Raises:
        InputError: naming the key and the file, if anything is malformed or not supported.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    architecture = _architecture(raw, path)
    keys = _Keys({**_DEFAULTS[architecture], **raw}, str(path))
    _refuse_unsupported(keys, architecture)
    num_heads = keys.count("num_attention_heads")
    given_groups = keys.values["num_key_value_heads"]
    groups = num_heads if given_groups is None else keys.count("num_key_value_heads")
    if num_heads % groups:
        raise keys.error("num_key_value_heads", f"a divisor of num_attention_heads = {num_heads}")
    rope_theta, rope_scaling = _rope(keys)
    return ModelShape(
        architecture=architecture,
        num_layers=keys.count("num_hidden_layers", MOST_LAYERS),
        hidden_size=keys.count("hidden_size"),
        ffn_size=keys.count("intermediate_size"),
        num_heads=num_heads,
        num_query_groups=groups,
        head_dim=_head_dim(keys, num_heads),
        vocab_size=keys.count("vocab_size"),
        tied_embeddings=keys.flag("tie_word_embeddings") and architecture.endswith("ForCausalLM"),
        qkv_bias=architecture.startswith("Qwen2For"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        norm_head=architecture == "BaichuanForCausalLM",
        norm_eps=keys.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_positions=keys.count("max_position_embeddings"),
    )


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    """Return the HF class name; without ``architectures`` it follows from model_type, as in AutoModelForCausalLM."""
    named = raw.get("architectures") or [_ARCHITECTURE_OF_MODEL_TYPE.get(str(raw.get("model_type")), "")]
    supported = list(_DEFAULTS)
    if not isinstance(named, list) or len(named) != 1 or named[0] not in supported:
        given = raw.get("architectures") or raw.get("model_type") or "nothing"
        found = given[0] if isinstance(given, list) and len(given) == 1 else given
        raise InputError(
            f"architectures must be one of {', '.join(supported)}, found {shown(found)} in {path}: "
            "models of another architecture are not trained or converted"
        )
    return named[0]


def _head_dim(keys: _Keys, num_heads: int) -> int:
    if keys.values["head_dim"] is not None:
        head_dim = keys.count("head_dim")
        expected = "an even number, as rotary embeddings rotate pairs"
    else:
        head_dim, rest = divmod(keys.count("hidden_size"), num_heads)
        expected = f"an even multiple of num_attention_heads = {num_heads} where there is no head_dim"
        if rest:
            raise keys.error("hidden_size", expected)
    if head_dim % 2:
        raise keys.error("head_dim" if keys.values["head_dim"] is not None else "hidden_size", expected)
    return head_dim


def _refuse_unsupported(keys: _Keys, architecture: str) -> None:
    """Raise InputError for options that transformers supports and we do not."""
    values = keys.values
    if architecture == "BaichuanForCausalLM" and "max_position_embeddings" not in values:
        raise keys.error(
            "max_position_embeddings", "given: a Baichuan without it has ALiBi (13B), which is not supported"
        )
    if architecture == "MistralForCausalLM" and values["sliding_window"] is not None:
        maximum = keys.count("max_position_embeddings")
        if keys.count("sliding_window") < maximum:
            raise keys.error(
                "sliding_window", f"null or at least {maximum}: sliding windows are not supported"
            )
    if architecture.endswith("ForSequenceClassification"):
        names = values.get("id2label")
        labels = values.get("num_labels", len(names) if isinstance(names, dict) and names else 2)
        if labels != 1:
            raise InputError(f"a reward model must have num_labels 1, found {shown(labels)} in {keys.source}")
    if values.get("quantization_config") is not None:
        raise keys.error("quantization_config", "absent: training needs fp32, fp16 or bf16 weights")
    if values["hidden_act"] not in ("silu", "swish"):
        raise keys.error("hidden_act", "'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise keys.error(key, "false: this architecture is supported without biases")
    if values["attention_dropout"]:
        raise keys.error("attention_dropout", "0: results must not depend on the layout")
    layer_types = values.get("layer_types")
    if layer_types is not None and (
        type(layer_types) is not list or any(kind != "full_attention" for kind in layer_types)
    ):
        raise keys.error("layer_types", "'full_attention' for every layer")
    if layer_types is None and values["use_sliding_window"] and values.get("sliding_window") is not None:
        first = values.get("max_window_layers", 0)
        if type(first) is not int or first < keys.count("num_hidden_layers"):
            raise keys.error(
                "use_sliding_window",
                f"false: sliding windows are not supported, they start at layer {shown(first)}",
            )


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from transformers 4's two keys or transformers 5's ``rope_parameters``."""
    values = keys.values
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise keys.error(name, "one flat object that is valid for every layer")
    defaults = {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "max_position_embeddings": None,
        **values,
    }
    rope = _Keys(
        {**{key: defaults[key] for key in ("rope_theta", "partial_rotary_factor")}, **given},
        f"{name} of {keys.source}",
    )
    if rope.values["partial_rotary_factor"] not in (None, 1.0):
        raise rope.error("partial_rotary_factor", "1.0")
    theta = rope.number("rope_theta")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"rope_type must be 'default' or 'llama3', found {shown(kind)} in {rope.source}")
    # In transformers the top-level key takes precedence over the inner one; the fallback is max_position_embeddings.
    outer = keys if "original_max_position_embeddings" in values else rope
    inside = "original_max_position_embeddings" in outer.values
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=outer.count("original_max_position_embeddings")
        if inside
        else keys.count("max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error("high_freq_factor", f"more than low_freq_factor = {scaling.low_freq_factor}")
    return theta, scaling
