"""Choose a reward model's padding token: transformers takes the reward at the last token that is not padding.

A padding token that texts also end with (a tokenizer that pads with its end token, as many do) would move the reward
to the token before, which was not trained.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from megatron_align.hf.assets import Padding

NEW_TOKEN = "<|pad|>"
_LIKELY = (
    "pad",
    "unk",
    "reserved",
    "unused",
    "extra",
)  # parts of the names of tokens that texts do not end with


def choose_padding(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Collection[int], stops: Collection[int]
) -> Padding:
    """Return a padding token that no sample ends with.

    The first of: the tokenizer's own; its other special tokens, those of :data:`_LIKELY` names first; a new one, if the
    embeddings have a row for it. A special token at which generation stops is taken only if it is already the padding.

    Args:
        tokenizer: of the model.
        vocab_size: rows of the embeddings.
        ends: the tokens that completions of the data end with.
        stops: tokens at which generation stops: other texts may end with them.

    Returns:
        Without token if there is none: transformers then reads the last token, and refuses batches.
    """
    own = tokenizer.pad_token_id
    if own is not None and own < vocab_size and own not in ends:
        return Padding(tokenizer.pad_token, own)
    forbidden = {*ends, *stops, tokenizer.eos_token_id}
    special = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index < vocab_size and index not in forbidden
    }
    if special:
        index = min(special, key=lambda index: (_rank(special[index], index, tokenizer), index))
        return Padding(special[index], index)
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"pad_token": NEW_TOKEN})
    index = changed.pad_token_id
    if index < vocab_size and index not in forbidden:
        return Padding(NEW_TOKEN, index)
    return Padding(None, None)


def _rank(token: str, index: int, tokenizer: PreTrainedTokenizerBase) -> int:
    likely = next((rank for rank, part in enumerate(_LIKELY) if part in token.lower()), len(_LIKELY))
    return likely + (index == tokenizer.bos_token_id)
