"""Write a narrow model with a real vocabulary as a Hugging Face folder.

    python examples/real_data/make_model.py --family qwen2 --vocab qwen.tiktoken --out models/qwen2
    python examples/real_data/make_model.py --family llama3 --vocab tokenizer.model --out models/llama3

The tokenizer is the real one: transformers' own converter turns the tiktoken ranks into a fast tokenizer,
with the family's special tokens and a chat template that knows tools. The weights are random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

TEMPLATES = Path(__file__).parent / "templates"
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NARROW = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Vocabulary of a model family: the pattern that splits text, and the special tokens."""

    pattern: str
    ordinary: int
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    normalizer: normalizers.Normalizer | None
    model: Callable[[], PreTrainedModel]


def _qwen2() -> PreTrainedModel:
    """Qwen2: biases on q, k, v; tied embeddings; 151,936 rows, more than the tokenizer has tokens."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            **NARROW,
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            bos_token_id=151643,
            eos_token_id=151645,
        )
    )


def _llama3() -> PreTrainedModel:
    """Llama-3.1: untied head, rope scaling, a row for every token."""
    return LlamaForCausalLM(
        LlamaConfig(
            **NARROW,
            vocab_size=128256,
            tie_word_embeddings=False,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters=LLAMA3_ROPE,
            bos_token_id=128000,
            eos_token_id=128009,
        )
    )


def _llama3_specials() -> tuple[str, ...]:
    """Return Llama-3.1's 256 special tokens in order; reserved numbers skip the named tokens."""
    named = (
        *(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|reserved_special_token_1|>",
        ),
        *(
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_2|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
        ),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    )
    return named + tuple(f"<|reserved_special_token_{i}|>" for i in range(3, 248))


FAMILIES = {
    "qwen2": Family(
        pattern=rf"{WORD}|\p{{N}}|{REST}",
        ordinary=151643,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        normalizer=normalizers.NFC(),
        model=_qwen2,
    ),
    "llama3": Family(
        pattern=rf"{WORD}|\p{{N}}{{1,3}}|{REST}",
        ordinary=128000,
        specials=_llama3_specials(),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        normalizer=None,
        model=_llama3,
    ),
}


def make_tokenizer(name: str, vocab: str) -> PreTrainedTokenizerFast:
    """Convert a tiktoken file.

    Raises:
        ValueError: if the file does not hold the family's ordinary tokens.
    """
    family = FAMILIES[name]
    core: Tokenizer = TikTokenConverter(
        vocab, pattern=family.pattern, extra_special_tokens=family.specials
    ).converted()
    ordinary = core.get_vocab_size(with_added_tokens=False)
    if ordinary != family.ordinary:
        raise ValueError(
            f"{vocab}: the vocabulary of {name} must have {family.ordinary} tokens, got {ordinary}"
        )
    if family.normalizer:
        core.normalizer = family.normalizer
    if family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, core.token_to_id(family.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        clean_up_tokenization_spaces=False,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
    )


def make_model(name: str, vocab: str, out: str, seed: int = 0) -> None:
    """Write tokenizer and model to ``out``."""
    tokenizer = make_tokenizer(name, vocab)
    torch.manual_seed(seed)
    model = FAMILIES[name].model()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{out}: {name}, {parameters / 1e6:.1f} M parameters, {model.config.vocab_size:,} embedding rows, "
        f"{len(tokenizer):,} tokens ({len(FAMILIES[name].specials)} special)"
    )


def main() -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, choices=sorted(FAMILIES))
    parser.add_argument("--vocab", required=True, help="qwen.tiktoken, or Llama-3's tokenizer.model")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    if not Path(arguments.vocab).is_file():
        print(f"error: --vocab must be a file, found none at '{arguments.vocab}'", file=sys.stderr)
        return 2
    try:
        make_model(arguments.family, arguments.vocab, arguments.out, arguments.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
