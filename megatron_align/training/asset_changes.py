"""Decide what training changes in the files of the folder that it starts from: template, stop tokens, padding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_align.config import RunConfig
from megatron_align.data.sample_table import TrainingData
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.data.tokenize.turn_ends import turn_end_token_ids
from megatron_align.hf.assets import AssetChanges, Padding, require_editable, stop_ids_of
from megatron_align.hf.padding import choose_padding
from megatron_align.model.families import ModelShape

Notes = tuple[tuple[str, str], ...]  # name and text of each, as a run's summary shows them


def plan_asset_changes(
    config: RunConfig, shape: ModelShape, assets: Path, stores: Iterable[TrainingData]
) -> tuple[AssetChanges, Notes]:
    """Return the changes, and what to say about them at the start.

    A model that generates stops at the tokens that end the turns it was trained on. A reward model gets a padding token
    that no sample ends with.

    Raises:
        InputError: a file that would be changed is malformed.
    """
    require_editable(assets)
    tokenizer = load_tokenizer(str(assets))
    file = config.data.chat_template
    template = load_chat_template(file) if file else None
    notes = {"template": f"{file}, which is exported with the model"} if file else {}
    if config.data.template_date:
        notes["template date"] = f"{config.data.template_date}, for the entire run (data.template_date)"
    if shape.is_reward:
        padding = choose_padding(
            tokenizer,
            shape.vocab_size,
            {token for store in stores for token in store.last_tokens()},
            stop_ids_of(assets),
        )
        notes |= _padding_note(padding, tokenizer)
        return AssetChanges(chat_template=template, padding=padding), tuple(notes.items())
    before, eos = stop_ids_of(assets), tokenizer.eos_token_id
    found = [*turn_end_token_ids(tokenizer, template), *before, *([] if eos is None else [eos])]
    stops = tuple(token for token in dict.fromkeys(found) if token < shape.vocab_size)
    notes["stops at"] = (
        _named(stops, tokenizer) or "no token: neither template nor tokenizer has one that ends a turn"
    )
    if added := [token for token in stops if token not in before]:
        notes["stops at"] += (
            f"; the export's generation_config.json gets {_named(added, tokenizer)} as eos_token_id too"
        )
    return AssetChanges(chat_template=template, stop_ids=stops), tuple(notes.items())


def _padding_note(padding: Padding, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    if padding.id is None:
        return {
            "padding": "none, as every special token ends samples: transformers will score single texts, no batches"
        }
    if padding.token == tokenizer.pad_token:
        return {}
    was = "none" if tokenizer.pad_token is None else f"{tokenizer.pad_token}, which samples end with"
    return {
        "padding": f"{padding.token} ({padding.id}) in the export, as no sample ends with it; it was {was}"
    }


def _named(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids)
