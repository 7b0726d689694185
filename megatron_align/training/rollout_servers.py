"""The vLLM servers of a run: limits of their requests, and checks before training that they hold the run's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_align.checkpoint.card import shape_differences
from megatron_align.config.rollout import RolloutConfig
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.rollout.endpoint import VLLM_KEY_VARIABLE, Endpoint, RequestFailed

# White space, digits, accents, several scripts and a character of four bytes: tokenizers differ in these.
_PROBE = "Hello, World!  12345 + 67,890 =\n\n\tdef f(x):  # Straße, naïve, λ 你好 мир 🙂"
_NOT_FOUND = 404


def endpoint_of(config: RolloutConfig, server: str | Endpoint) -> Endpoint:
    """Return a server with the run's limits of a request."""
    endpoint = server if isinstance(server, Endpoint) else Endpoint(server, VLLM_KEY_VARIABLE)
    return dataclasses.replace(
        endpoint,
        timeout_seconds=config.request_timeout,
        tries=config.request_retries + 1,
        timeout_option="rollout.request_timeout",
    )


def require_servers(config: RolloutConfig, assets: Path, shape: ModelShape) -> list[str]:
    """Check that the servers at ``rollout.url`` answer, and hold the run's model, as far as they say.

    Their tokenizer must give the tokens of the model's own, special ones included; where the folder that they serve can
    be read here, its model must have the run's shape. Their chat template is not used: prompts are sent as tokens.

    Args:
        config: the section ``rollout``.
        assets: of the model, with its tokenizer.
        shape: of the model.

    Returns:
        What could not be compared, one line each.

    Raises:
        InputError: a server does not answer, or holds another model.
    """
    urls = [config.url] if isinstance(config.url, str) else config.url or []
    tokenizer = load_tokenizer(str(assets)) if urls else None
    notes = []
    for url in urls:
        assert tokenizer is not None, "there is a server"
        server = endpoint_of(config, url)
        name, folder = _served(server)
        if (folder / "config.json").is_file():
            _require_shape(url, folder, shape)
        try:
            _require_tokens(server, name, tokenizer)
        except RequestFailed as error:
            if error.status != _NOT_FOUND:
                raise InputError(f"the vllm server must tokenise a text: {error}") from error
            notes.append(f"{url} has no route /tokenize: its tokenizer is not compared with the model's")
    return notes


def _served(server: Endpoint) -> tuple[str, Path]:
    """Return the name of the model that a server holds, and its folder or name on the hub."""
    try:
        card = server.get("/v1/models")["data"][0]
        return str(card["id"]), Path(str(card.get("root") or card["id"]))
    except RequestFailed as error:
        raise InputError(f"rollout.url needs a running vllm server: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{server.url}/v1/models must name a model, as vLLM does") from error


def _require_shape(url: str, folder: Path, shape: ModelShape) -> None:
    apart = shape_differences(dataclasses.asdict(shape), dataclasses.asdict(read_shape(folder)))
    facts = ", ".join(f"{key} {found!r} for {ours!r}" for key, (ours, found) in apart.items())
    require(not apart, f"the vllm server {url} serves another model than model.path, got {facts} in {folder}")


def _require_tokens(server: Endpoint, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for text in (_PROBE, *([special[0], special[-1]] if special else [])):
        body = {"model": name, "prompt": text, "add_special_tokens": False}
        found = server.post("/tokenize", body).get("tokens")
        wanted = tokenizer(text, add_special_tokens=False).input_ids
        require(
            found == wanted,
            f"the vllm server {server.url} has another tokenizer than model.path: {text[:40]!r} is tokens "
            f"{_shown(found)} there and {_shown(wanted)} here; start it with this model",
        )


def _shown(tokens: object) -> str:
    if not isinstance(tokens, Sequence):
        return str(tokens)
    return f"[{', '.join(map(str, tokens[:6]))}{', ...' if len(tokens) > 6 else ''}]"
