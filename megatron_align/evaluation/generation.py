"""Generate completions for the prompts of a file, into a JSONL file that a killed process continues."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import megatron_align
from megatron_align.convert.open_adapter import StoredAdapter
from megatron_align.data.formats.files import expand
from megatron_align.data.formats.turns import messages
from megatron_align.data.store import sha256
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.template_clock import fixed_date, parse_date, tokenizer_templates
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.evaluation.adapters import open_adapter_of
from megatron_align.evaluation.engines import Precision, assets_of, open_engine, weights_state
from megatron_align.evaluation.progress import progress
from megatron_align.model.families import read_shape
from megatron_align.rollout.endpoint import Endpoint
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer, read_prompts
from megatron_align.rollout.types import Completion, Prompt, Sampling, require_fitting
from megatron_align.rollout.vllm_engine import VLLMEngine
from megatron_align.rollout.vllm_server import VLLMServer
from megatron_align.storage.atomic_write import require_writable
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.resumable_lines import ResumableLines, stored_key

CHUNK = 128  # prompts between two writes


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Model, prompts, output and options of a generation.

    Args:
        model: Hugging Face folder, checkpoint, or run folder
        prompts: file, folder or glob pattern of prompts
        out: JSONL file to write
        sampling: how completions are drawn
        precision: of weights and computation; None: as stored
        as_chat: a prompt that is text is the turn of a user
        chat_template: file with a Jinja chat template; None: the tokenizer's own
        template_date: ISO date that the chat template reads from the clock; None: that of the first start
        too_long: error: refuse prompts that do not fit the context; skip: write them without completions
        limit: first prompts only; None: all
        with_tokens: write token ids and log-probs too
        vllm: URLs of vLLM servers that hold the model, whose folder then gives tokenizer and template; empty: none
        adapter: PEFT folder or checkpoint of an adapter of the model; None: none
        vllm_python: interpreter of an environment with vLLM, in which a server of the model is started; None: none
        vllm_options: of that server, as of ``vllm serve``
        augment: model that writes a complement of each prompt, which is appended to it (docs/pas.md); None: none does
        augment_template: file of the template that it was trained on; None: ours
    """

    model: str
    prompts: str
    out: str
    sampling: Sampling
    precision: Precision | None = None
    as_chat: bool = False
    chat_template: str | None = None
    template_date: str | None = None
    too_long: Literal["error", "skip"] = "error"
    limit: int | None = None
    with_tokens: bool = False
    vllm: tuple[str, ...] = ()
    adapter: str | None = None
    vllm_python: str | None = None
    vllm_options: tuple[str, ...] = ()
    augment: str | None = None
    augment_template: str | None = None

    def __post_init__(self) -> None:
        require(
            self.augment is not None or self.augment_template is None,
            f"augment_template is that of the model that augment names, got {self.augment_template} without",
        )
        require(
            not (self.vllm and self.vllm_python),
            f"vllm servers run already or are started, got {', '.join(self.vllm)} and vllm_python {self.vllm_python}",
        )
        require(
            not self.vllm_options or self.vllm_python is not None,
            f"vllm_options are those of a server that vllm_python starts, got {shlex.join(self.vllm_options)} without",
        )
        servers = ", ".join(self.vllm) or self.vllm_python
        require(
            not (servers and self.precision),
            f"precision is the vllm servers' own, got {self.precision} with {servers}",
        )
        require(
            not (servers and self.adapter),
            f"adapters are loaded by the vllm servers themselves (--enable-lora), got {self.adapter} with {servers}",
        )
        if self.template_date is not None:
            parse_date(self.template_date, "template_date")

    def dated(self, before: Mapping[str, Any]) -> GenerateOptions:
        """Return the options with a ``template_date`` if the chat template reads the clock, else without one.

        Args:
            before: key of an unfinished output, whose date is kept.
        """
        given, earlier = self.template_date, before.get("template_date")
        return replace(self, template_date=fixed_date(self._templates(), given, earlier))

    def prompt_tokenizer(self) -> PromptTokenizer:
        """Return what renders and tokenises the prompts."""
        template = load_chat_template(self.chat_template) if self.chat_template else None
        now = parse_date(self.template_date) if self.template_date else None
        return PromptTokenizer(load_tokenizer(str(assets_of(self.model))), template, now)

    def _templates(self) -> list[str]:
        if self.chat_template:
            return [load_chat_template(self.chat_template)]
        return tokenizer_templates(str(assets_of(self.model)))

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Give the engine within a with-block: servers, or the model in this process."""
        with ExitStack() as opened:
            servers: list[str | Endpoint] = list(self.vllm)
            if self.vllm_python is not None:
                out = Path(self.out)
                log = out.with_name(f"{out.name}.vllm.log")
                server = VLLMServer(self.vllm_python, self.model, log, self.vllm_options)
                servers = [opened.enter_context(server).endpoint()]
            engine: Engine
            if servers:
                engine = VLLMEngine(servers, load_tokenizer(str(assets_of(self.model))))
            else:
                engine = open_engine(self.model, self.precision, self.adapter)
            yield engine
            engine.close()

    def open_adapter(self) -> StoredAdapter | None:
        """Return the adapter, having checked that it fits the model; None: there is none."""
        return open_adapter_of(self.model, self.adapter) if self.adapter else None

    def key(self) -> dict[str, Any]:
        """Return what determines the output, files by their content."""
        template = self.chat_template and load_chat_template(self.chat_template)
        left_out = ("out", "chat_template", "adapter", "augment", "augment_template")
        return {
            **{
                name: value
                for name, value in asdict(self).items()
                if name not in left_out and (value or not name.startswith("vllm_"))
            },
            **({"adapter": fingerprint(adapter.folder)} if (adapter := self.open_adapter()) else {}),
            "weights": weights_state(self.model),
            "data": [sha256(file) for file in expand(self.prompts)],
            "chat_template": template,
        }


@dataclass(slots=True)
class Generated:
    """Counts of a finished generation."""

    prompts: int = 0
    resumed: int = 0  # of them, written by an earlier process
    skipped: int = 0
    completions: int = 0
    tokens: int = 0
    truncated: int = 0  # completions that ended by length
    augmented: str = ""  # how many prompts, in words


def generate_file(options: GenerateOptions) -> Generated:
    """Generate completions of all prompts of a file, in its order.

    A row is the prompt's record with ``prompt`` and ``completions: [{content, finish_reason, tokens}]``.

    Raises:
        InputError: bad prompts, model, servers or output; nothing has been generated then.
    """
    shape = read_shape(assets_of(options.model))
    options.open_adapter()  # refused before anything is generated
    out = Path(options.out)
    earlier = stored_key(out)
    partial = out.with_name(f".{out.name}.partial")
    require(
        not isinstance(earlier.get("weights"), list),
        f"the unfinished output was begun by an older version, whose key has other weights: delete {partial} "
        f"and {partial.name}.key to begin again, or finish it with that version",
    )
    options = options.dated(earlier)
    tokenizer = options.prompt_tokenizer()
    records = list(read_prompts(options.prompts, as_chat=options.as_chat, limit=options.limit))
    complements = out.with_name(f".{out.name}.complements")
    key: dict[str, Any] = {}
    counts = Generated(prompts=len(records))
    if options.augment is not None:
        key, records = _augmented(options, records, complements, counts)
    prompts = [tokenizer.prompt(record, key) for key, record in enumerate(records)]
    with ExitStack() as opened:
        # Servers may hold the model with another context.
        engine = opened.enter_context(options.engine()) if options.vllm else None
        if options.too_long == "error":
            require_fitting(prompts, engine.context if engine else shape.max_positions)
        output = opened.enter_context(ResumableLines(out, options.key() | key))
        counts.resumed = output.done
        if output.done < len(records):
            engine = engine or opened.enter_context(options.engine())
            if options.too_long == "error":
                require_fitting(prompts, engine.context)
            _fill(engine, list(zip(records, prompts, strict=True)), options, output, counts)
        output.finish()
    complements.unlink(missing_ok=True)
    return counts


def _augmented(
    options: GenerateOptions, records: Sequence[PromptRecord], kept: Path, counts: Generated
) -> tuple[dict[str, Any], list[PromptRecord]]:
    """Return what determines the complements, and the prompts with them; their model is freed before it returns."""
    now = parse_date(options.template_date) if options.template_date else None
    unusable = "keep" if options.too_long == "skip" else "error"
    require_writable(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    augmenting = megatron_align.augmenter(
        options.augment, options.augment_template, unusable=unusable, now=now, kept=kept
    )
    made: list[PromptRecord] = []
    with augmenting as augmenter, progress("augmenting", len(records)) as advance:
        for start in range(0, len(records), CHUNK):
            made += augmenter.augmented(records[start : start + CHUNK])
            advance(min(CHUNK, len(records) - start), 0)
        counts.augmented = augmenter.summary()
        return {"augment": augmenter.identity}, made


def generate(
    model: str | Path | Engine,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    sampling: Sampling | None = None,
    *,
    precision: Precision | None = None,
    adapter: str | Path | None = None,
    **options: Any,
) -> list[list[Completion]]:
    """Return completions of each prompt: ``generate("runs/sft/hf", ["2 + 2 ="], temperature=0)``.

    Args:
        model: Hugging Face folder, checkpoint, run folder, or an engine of :func:`.engines.open_engine`.
        prompts: texts, which are continued as they are, or lists of messages ``{role, content}``.
        sampling: how completions are drawn; None: from ``options``.
        precision: of weights and computation; None: as stored.
        adapter: PEFT folder or checkpoint of an adapter of a model that is given by its path; None: none.
        options: of :class:`.Sampling`, where ``sampling`` is None.

    Raises:
        InputError: bad prompts, model or options.
    """
    if sampling is not None and options:
        raise InputError(f"give sampling or its options, got both: {', '.join(options)}")
    sampling = sampling or Sampling(**options)
    require(
        adapter is None or isinstance(model, (str, Path)),
        "an adapter needs the path of its model, got an engine: open it with its adapter",
    )
    opened = open_engine(model, precision, adapter) if isinstance(model, (str, Path)) else model
    tokenizer = PromptTokenizer(opened.tokenizer)
    records = [given_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    completions = opened.generate([tokenizer.prompt(r, i) for i, r in enumerate(records)], sampling)
    if opened is not model:
        opened.close()
    return completions


def given_prompt(prompt: str | Sequence[Mapping[str, Any]], where: str) -> PromptRecord:
    """Return the record of a prompt that is given as text or messages; ``where``: its place, for errors.

    Raises:
        InputError: malformed messages.
    """
    turns = prompt if isinstance(prompt, str) else messages([dict(turn) for turn in prompt], where, "prompt")
    return PromptRecord(raw={}, where=where, prompt=turns)


def _fill(
    engine: Engine,
    items: Sequence[tuple[PromptRecord, Prompt]],
    options: GenerateOptions,
    output: ResumableLines,
    counts: Generated,
) -> None:
    """Generate and write what is missing, a chunk at a time."""
    with progress("generating", len(items)) as advance:
        advance(output.done, 0)
        for start in range(output.done, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            fitting = [prompt for _, prompt in chunk if len(prompt.token_ids) < engine.context]
            made = iter(engine.generate(fitting, options.sampling, lambda *_: advance(0, 1)))
            lines = []
            for record, prompt in chunk:
                fits = len(prompt.token_ids) < engine.context
                completions = next(made) if fits else []
                counts.skipped += not fits
                counts.completions += len(completions)
                counts.tokens += sum(len(completion.token_ids) for completion in completions)
                counts.truncated += sum(completion.finish_reason == "length" for completion in completions)
                row = _row(record, completions, options.with_tokens)
                if not fits:
                    row["skipped"] = f"prompt of {len(prompt.token_ids)} tokens, context {engine.context}"
                lines.append(json.dumps(row, ensure_ascii=False))
            output.append(lines)
            advance(len(chunk), 0)


def _row(record: PromptRecord, completions: Sequence[Completion], with_tokens: bool) -> dict[str, Any]:
    written = []
    for completion in completions:
        written.append(
            {
                "content": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
            }
        )
        if with_tokens:
            written[-1] |= {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
    return {**record.raw, "prompt": record.prompt_field(), "completions": written}
