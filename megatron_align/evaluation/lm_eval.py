"""lm-eval's interface of a language model, ``LM``, around the live policy on any layout.

Every rank runs lm-eval's loop with all requests, as under tensor parallelism; the requests are divided over ranks here.
Needs the package ``lm_eval`` (extra ``eval``).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_align.data.sample_table import MemoryTable
from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import require
from megatron_align.evaluation.progress import progress
from megatron_align.hf.assets import AssetChanges
from megatron_align.model import parallel
from megatron_align.records import Conversation, Message, Sample
from megatron_align.rollout.live_weights import live_engine, update_engine
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.rollout.types import Completion, Prompt, Sampling
from megatron_align.training.likelihood import CompletionScorer

MAX_TOKENS = 256  # of an answer whose task does not say, as in lm-eval
LEAST_SHARED = 16  # tokens of a context that is computed once for all its continuations
_OPEN_END = "\ue000open\ue000 "  # marks where the last message ends, within a rendered conversation
Tokenised = tuple[Any, list[int], list[int]]  # texts, or None; context; continuation


class PolicyLM(TemplateLM):
    """A language model for ``lm_eval.simple_evaluate(model=PolicyLM(...), ...)``, which every rank calls.

    Args:
        score: this rank's chunks and layout; its sequence length is that of the longest context with its continuation:
            longer ones are cut from the left, as lm-eval does.
        assets: folder with the config, generation config and tokenizer.
        changes: of training in these.
        seed: of answers that are drawn.
        now: what the chat template reads from the clock; None: the time of each rendering.
        chat_template: text of the template; None: the tokenizer's own.
        shown: whether rank 0 shows progress.
    """

    def __init__(  # noqa: PLR0913 - options that are independent of each other
        self,
        score: CompletionScorer,
        assets: Path,
        changes: AssetChanges = AssetChanges(),  # noqa: B008 - immutable
        seed: int = 1234,
        now: datetime | None = None,
        chat_template: str | None = None,
        shown: bool = True,
    ) -> None:
        super().__init__()
        self._shown = shown
        self.max_length = score.sequence_length
        # The last target is not an input: one token more than the context fits.
        self._score = replace(score, sequence_length=self.max_length + 1)
        self._assets, self._changes, self._seed = assets, changes, seed
        self.tokenizer = load_tokenizer(str(assets))
        self._template = ChatTemplate(self.tokenizer, chat_template, now)
        self._engine: TransformersEngine | None = None

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token of an empty context: the tokenizer's BOS, or its EOS if it has none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches of requests."""
        return str(self._assets).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; a BOS that it has already is not added again."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, by the tokenizer's template; one without a generation prompt stays open.

        Raises:
            InputError: there is no template, it fails, or it does not write the last message.
        """
        turns = tuple(Message(turn["role"], turn["content"]) for turn in chat_history)
        if not add_generation_prompt:
            turns = (*turns[:-1], replace(turns[-1], content=turns[-1].content + _OPEN_END))
        conversation = Conversation(turns, "a prompt of lm-eval")
        self._template.require_template(conversation)
        text = self._template.render(conversation, len(turns), prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        end = text.rfind(_OPEN_END.strip())
        require(
            end >= 0, f"{conversation.where}: the chat template must write the last message to continue it"
        )
        # A template that strips contents has stripped the mark's space: the content's own would have been too.
        return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-prob and whether it is greedy of each continuation of a context."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-prob of each text, in windows of the longest context, each token predicted once."""
        windows: list[Tokenised] = []
        counts: list[int] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(pair)) for pair in rolled]
            windows, counts = windows + own, [*counts, len(own)]
        sums = np.array([logprob for logprob, _ in self._loglikelihood_tokens(windows)])
        return [float(part.sum()) for part in np.split(sums, np.cumsum(counts)[:-1])]

    def _loglikelihood_tokens(self, requests: Sequence[Tokenised], **_: Any) -> list[tuple[float, bool]]:
        if not requests:
            return []
        table, order = _table(requests, self.max_length)
        doing = "scoring requests"
        with progress(f"lm-eval: {doing}", len(table), self._shown and dist.get_rank() == 0) as advance:
            sums_C, greedy_C = self._score.with_greedy(table, doing, advance)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for place, total, greedy in zip(order, sums_C, greedy_C, strict=True):
            answers[place] = (float(total), bool(greedy))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that the policy writes after each context, up to a stop text."""
        with parallel.failing_together():
            self._engine = self._engine or live_engine(self._score.chunks, self._assets, self._changes)
        assert self._engine is not None, "every rank has built one"
        update_engine(self._engine, self._score.chunks, self._engine.weight_version + 1)
        groups: dict[str, list[int]] = defaultdict(list)  # requests with the same options
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        own: dict[int, str] = {}
        shown = self._shown and rank == 0
        with progress("lm-eval: answering", len(requests), shown) as advance, parallel.failing_together():
            for options, members in groups.items():
                mine = members[rank::ranks]
                texts = self._answer([requests[i].args[0] for i in mine], mine, json.loads(options), advance)
                own |= dict(zip(mine, texts, strict=True))
        gathered: list[dict[int, str]] = [{} for _ in range(ranks)]
        dist.all_gather_object(gathered, own)
        texts_by_request = {i: text for each in gathered for i, text in each.items()}
        return [texts_by_request[i] for i in range(len(requests))]

    def _answer(
        self, contexts: Sequence[str], keys: Sequence[int], options: dict[str, Any], advance: Any
    ) -> list[str]:
        """Return the answers to contexts with the same options of generation."""
        engine = self._engine
        assert engine is not None, "the caller opens it"
        sampling = _sampling(options, self._seed)
        room = engine.context - sampling.max_tokens
        require(
            room > 0,
            f"lm-eval's max_gen_toks must leave room in the model's {engine.context} positions, "
            f"got {sampling.max_tokens}",
        )
        prompts = [
            Prompt(self.tok_encode(text)[-room:], key) for text, key in zip(contexts, keys, strict=True)
        ]
        ends = engine.end_ids
        added = self.tokenizer.get_added_vocab()  # a stop text that is a token of its own may have no text

        def on_token(*_: int) -> None:
            self._score.watchdog.detail("generating")
            advance(0, 1)

        engine.end_ids = ends | {added[stop] for stop in sampling.stop if stop in added}
        try:
            answers = engine.generate(prompts, sampling, on_token)
        finally:
            engine.end_ids = ends
        advance(len(prompts), 0)
        return [_cut(completion, sampling.stop) for [completion] in answers]


def _cut(completion: Completion, stops: Sequence[str]) -> str:
    return min((completion.text.split(stop)[0] for stop in stops), key=len, default=completion.text)


def _sampling(options: dict[str, Any], seed: int) -> Sampling:
    """Return the sampling of lm-eval's options.

    Raises:
        InputError: an option that the engine does not have.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_TOKENS))
    stop = known.pop("until", None) or []
    drawn = bool(known.pop("do_sample", False))
    values = {name: known.pop(name, default) for name, default in (("top_p", 1.0), ("top_k", 0))}
    temperature = float(known.pop("temperature", 0.0))
    max_tokens = int(known.pop("max_gen_toks"))
    require(
        not known,
        f"lm-eval's options of generation must be until, max_gen_toks, do_sample, temperature, top_p and top_k, "
        f"got {', '.join(known)}",
    )
    return Sampling(
        max_tokens=max_tokens,
        temperature=(temperature or 1.0) if drawn else 0.0,
        stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
        seed=seed,
        **(values if drawn else {}),
    )


def _table(requests: Sequence[Tokenised], max_length: int) -> tuple[MemoryTable, list[int]]:
    """Return samples whose completions are the continuations, and for each completion its request.

    Continuations of one context share a sample, as far as they fit into one pack.
    """
    contexts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (_, context, continuation) in enumerate(requests):
        count = len(continuation)
        require(
            0 < count <= max_length,
            f"lm-eval's continuations must have 1 to {max_length} tokens (sequence_length), got {count}",
        )
        contexts[tuple(context[-(max_length + 1 - count) :])].append(i)
    samples: list[Sample] = []
    order: list[int] = []

    def add(context: Sequence[int], members: Sequence[int]) -> None:
        lengths = tuple(len(requests[i][2]) for i in members)
        tokens = np.concatenate([np.asarray(context), *(np.asarray(requests[i][2]) for i in members)])
        scored_L = np.arange(len(tokens)) >= len(context)
        samples.append(
            Sample(tokens.astype(np.int32), scored_L, prompt_length=len(context), completion_lengths=lengths)
        )
        order.extend(members)

    for shared, members in contexts.items():
        together: list[int] = []
        length = len(shared)
        for i in members:
            more = len(requests[i][2])
            if together and (len(shared) < LEAST_SHARED or length + more > max_length + 1):
                add(shared, together)
                together, length = [], len(shared)
            together, length = [*together, i], length + more
        add(shared, together)
    return MemoryTable(samples), order
