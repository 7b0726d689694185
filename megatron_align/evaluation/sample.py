"""Make preference data of sampled answers, as the report does: K answers of one or several models, scored and filtered.

Each stage writes its files into the output folder and is skipped when they are complete and what it reads is the same:
the answers of each model, the scored rows, then the data with the counts of each filter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_align.config import ParallelConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.data.formats.files import expand
from megatron_align.data.store import sha256
from megatron_align.data.tokenize.template_clock import fixed_date, parse_date, tokenizer_templates
from megatron_align.errors import require
from megatron_align.evaluation.engines import Precision, assets_of, weights_state
from megatron_align.evaluation.generation import GenerateOptions, generate_file
from megatron_align.evaluation.near_duplicates import distinct
from megatron_align.evaluation.progress import progress
from megatron_align.evaluation.run import left_after_bad_input
from megatron_align.evaluation.stages import is_complete, noted_key
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.rollout.prompts import PromptRecord, read_prompts
from megatron_align.rollout.types import Sampling
from megatron_align.rollout.verifiers.checks import CHECKS
from megatron_align.rollout.verifiers.running import checking
from megatron_align.storage.atomic_write import write_file
from megatron_align.storage.resumable_lines import ResumableLines, read_rows
from megatron_align.training.reward_model import RewardModel, RewardModelSetup
from megatron_align.training.setup import locate, require_weights
from megatron_align.training.watchdog import join_watched

Format = Literal["ranked", "pair", "all_pairs", "unpaired", "sft"]
CHUNK = 256  # prompts scored between two writes
ANSWERS, SCORED, DATA, COUNTS = "answers", "scored.jsonl", "data.jsonl", "report.json"
# Of each prompt with its answers; None: an answer that cannot be scored.
Scorer = Callable[[Sequence[tuple[PromptRecord, list[str]]]], Sequence[Sequence[float | None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Models, prompts, scores and filters of sampled data.

    Args:
        models: Hugging Face folders, checkpoints or run folders
        prompts: file, folder or glob pattern of prompts
        out: folder to write
        sampling: how answers are drawn; completions is the number of each model
        reward_model: scores the answers; None: a check does
        check: scores answers by the record's own answer or instructions; None: a reward model does
        extract: of the check, as in an evaluation
        format: of the data
        duplicates: ROUGE-L from which a later answer is a duplicate
        all_above: prompts whose answers all score at least this are dropped; None: none are
        tied: prompts whose best and worst scores differ by no more than this are dropped
        threshold: formats unpaired and sft: score from which an answer is good; None: sft takes the best of each
        as_chat: a prompt that is text is the turn of a user
        template_date: ISO date that chat templates read from the clock; None: that of the first start
        precision: of weights and computation; None: as stored, of a reward model fp32
        vllm: URLs of vLLM servers that hold the one model; empty: none
        vllm_python: interpreter of an environment with vLLM, in which a server of each model is started in turn; None:
            models answer in this process
        vllm_options: of these servers, as of ``vllm serve``
    """

    models: tuple[str, ...]
    prompts: str
    out: str
    sampling: Sampling
    reward_model: str | None = None
    check: str | None = None
    extract: str | None = None
    format: Format = "ranked"
    duplicates: float = 0.7
    all_above: float | None = None
    tied: float = 0.0
    threshold: float | None = None
    as_chat: bool = False
    template_date: str | None = None
    precision: Precision | None = None
    vllm: tuple[str, ...] = ()
    vllm_python: str | None = None
    vllm_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        line = (
            f"vllm servers hold one model, got {len(self.models)}: sample each by itself, or use vllm_python"
        )
        require(not self.vllm or len(self.models) == 1, line)
        servers = ", ".join(self.vllm) or self.vllm_python
        line = f"precision is the vllm servers' own, got {self.precision} with {servers}"
        require(not (servers and self.precision and self.reward_model is None), line)
        require(bool(self.models), "sampling needs a model, got none")
        require(
            (self.reward_model is None) != (self.check is None),
            f"answers are scored by a reward model or by a check, got {self.reward_model} and {self.check}",
        )
        if self.template_date is not None:
            parse_date(self.template_date, "template_date")
        if self.check is not None:
            require(self.check in CHECKS, f"check must be one of {', '.join(CHECKS)}, got '{self.check}'")
            CHECKS[self.check].require("sample", self.extract)
        require(
            self.extract is None or self.check is not None, "extract belongs to a check, got a reward model"
        )
        require(0 < self.duplicates <= 1, f"duplicates must be in (0, 1], got {self.duplicates}")
        require(self.tied >= 0, f"tied must not be negative, got {self.tied}")
        takes = self.format in ("unpaired", "sft")
        require(
            takes or self.threshold is None,
            f"threshold belongs to unpaired and sft, got format {self.format}",
        )
        require(
            self.format != "unpaired" or self.threshold is not None,
            "format unpaired needs a threshold, got none",
        )
        answers = len(self.models) * self.sampling.completions
        require(
            answers > 1 or takes,
            f"format {self.format} compares at least 2 answers of a prompt, got {answers}",
        )


@dataclass(slots=True)
class SampleCounts:
    """Prompts, answers and rows, and what each filter removed."""

    prompts: int = 0
    answers: int = 0
    empty: int = 0
    duplicates: int = 0
    truncated: int = 0  # answers cut by length: removed, as a judge of half an answer judges the cut
    unscored: int = 0  # answers that do not fit with their prompt into the reward model
    dropped: Counter[str] = field(default_factory=Counter)  # prompts by reason
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        names = (
            "prompts",
            "answers",
            "truncated",
            "empty",
            "duplicates",
            *["unscored"] * bool(self.unscored),
            "rows",
        )
        return {**{name: getattr(self, name) for name in names}, "dropped_prompts": dict(self.dropped)}


def sample(options: SampleOptions) -> SampleCounts:
    """Sample, score, filter and write the data; a killed run continues.

    Raises:
        InputError: bad options, prompts, models or output.
    """
    out = Path(options.out)
    require(not out.exists() or out.is_dir(), f"out must be a folder, found a file at {out}")
    require(
        not (out / DATA).exists(), f"out holds data already: delete it, or name another folder: {out / DATA}"
    )
    records = list(read_prompts(options.prompts, as_chat=options.as_chat))
    if options.check is not None:  # a record without an answer is found before the sampling
        for record in records:
            CHECKS[options.check].expected(record)
    if options.reward_model is not None:
        _require_model(options.reward_model, "reward_model", is_reward=True)
    counts = SampleCounts(prompts=len(records))
    answers = _answers(options, out, records, counts)
    scores = _scores(options, out, list(zip(records, answers, strict=True)))
    lines = []
    for record, texts, of_texts in zip(records, answers, scores, strict=True):
        scored = [(value, text) for value, text in zip(of_texts, texts, strict=True) if value is not None]
        counts.unscored += len(texts) - len(scored)
        ranked = sorted(scored, key=lambda pair: -pair[0])
        lines += [json.dumps(row, ensure_ascii=False) for row in _rows(record, ranked, options, counts)]
    counts.rows = len(lines)
    write_file(out / COUNTS, json.dumps(counts.to_dict(), indent=2) + "\n")
    write_file(out / DATA, "".join(f"{line}\n" for line in lines))
    return counts


def require_language_models(paths: Sequence[str]) -> None:
    """Check models that are going to answer, without reading their weights.

    Raises:
        InputError: one is missing, incomplete, or a reward model.
    """
    for path in paths:
        _require_model(path, "models", is_reward=False)


def _require_model(path: str, name: str, *, is_reward: bool) -> None:
    weights, assets = locate(path)
    found = f"{name} must be Hugging Face folders, checkpoints or run folders, found nothing at {path}"
    require(assets.is_dir(), found)
    shape = read_shape(assets)
    kind = "a reward model" if is_reward else "language models"
    require(shape.is_reward == is_reward, f"{name} must be {kind}, got {shape.architecture} in {path}")
    require_weights(weights, assets, shape)


def _answers(
    options: SampleOptions, out: Path, records: Sequence[PromptRecord], counts: SampleCounts
) -> list[list[str]]:
    """Return the distinct, complete answers to each prompt, over all models."""
    answers: list[list[str]] = [[] for _ in records]
    for i, model in enumerate(options.models):
        file = _answers_file(out, i)
        generating = GenerateOptions(
            model=model,
            prompts=options.prompts,
            out=str(file),
            sampling=options.sampling,
            precision=None if options.vllm or options.vllm_python else options.precision,
            vllm=options.vllm,
            vllm_python=options.vllm_python,
            vllm_options=options.vllm_options,
            as_chat=options.as_chat,
            template_date=options.template_date,
            too_long="skip",
        ).dated(noted_key(file) or {})
        if not is_complete(file, generating.key()):
            generate_file(generating)
        rows = read_rows(file)
        require(
            len(rows) == len(records),
            f"{file} must have a row for each of the {len(records)} prompts, got {len(rows)}: delete it",
        )
        for texts, row in zip(answers, rows, strict=True):
            for completion in row["completions"]:
                counts.answers += 1
                if completion["finish_reason"] == "length":
                    counts.truncated += 1
                elif not completion["content"].strip():
                    counts.empty += 1
                else:
                    texts.append(completion["content"])
    kept = []
    for texts in answers:
        kept.append([texts[k] for k in distinct(texts, options.duplicates)])
        counts.duplicates += len(texts) - len(kept[-1])
    return kept


def _answers_file(out: Path, model: int) -> Path:
    return out / ANSWERS / f"model_{model}.jsonl"


def _scores(
    options: SampleOptions, out: Path, items: Sequence[tuple[PromptRecord, list[str]]]
) -> list[list[float | None]]:
    """Return the score of every answer, computing those that an earlier run has not written."""
    file = out / SCORED
    template_date = _date_of_rewards(options, noted_key(file) or {})
    key = {
        "answers": [sha256(str(_answers_file(out, i))) for i in range(len(options.models))],
        "prompts": [sha256(prompts) for prompts in expand(options.prompts)],
        "as_chat": options.as_chat,
        "reward_model": options.reward_model and weights_state(options.reward_model),
        "precision": options.reward_model and options.precision,
        "check": options.check,
        "extract": options.extract,
        "duplicates": options.duplicates,
        "template_date": template_date,
    }
    if not is_complete(file, key):
        with ResumableLines(file, key) as output, progress("scoring", len(items)) as advance:
            advance(output.done, 0)
            if output.done < len(items):
                with _scorer(options, template_date) as scorer:
                    for start in range(output.done, len(items), CHUNK):
                        chunk = items[start : start + CHUNK]
                        output.append([json.dumps(scores) for scores in scorer(chunk)])
                        advance(len(chunk), 0)
            output.finish()
    scores = read_rows(file)
    lengths = [len(texts) for _, texts in items]
    require(
        [len(each) for each in scores] == lengths,
        f"{file} holds the scores of other answers: delete it, and the answers are scored again",
    )
    return scores


def _date_of_rewards(options: SampleOptions, before: Mapping[str, Any]) -> str | None:
    """Return the date that the reward model's chat template reads; None: it reads none."""
    if options.reward_model is None:
        return None
    templates = tokenizer_templates(str(assets_of(options.reward_model)))
    return fixed_date(templates, options.template_date, before.get("template_date"))


@contextmanager
def _scorer(options: SampleOptions, template_date: str | None) -> Iterator[Scorer]:
    if options.check is not None:
        check = CHECKS[options.check]
        with checking(options.check, options.extract) as scoring:

            def checked(items: Sequence[tuple[PromptRecord, list[str]]]) -> list[list[float | None]]:
                return [
                    [
                        scores[check.metrics[0]]
                        for scores in scoring([(text, check.expected(record)) for text in texts])
                    ]
                    for record, texts in items
                ]

            yield checked
        return
    assert options.reward_model is not None, "checked with the options"
    with _rewards(options.reward_model, options.precision, template_date) as scorer:
        yield scorer


@contextmanager
def _rewards(path: str, precision: Precision | None, template_date: str | None) -> Iterator[Scorer]:
    """Yield the function that scores answers by a reward model, on one process."""
    reward = ModelReward(path=path, template_date=template_date, too_long="skip")
    layout = ParallelConfig()
    setup = RewardModelSetup.of(
        reward, capacity=read_shape(assets_of(path)).max_positions, precision=precision or "fp32"
    )
    watchdog = join_watched(parallel.RankInfo.from_environment(), layout)
    with watchdog.watching(), left_after_bad_input():
        model = RewardModel(setup, layout, parallel.groups(), watchdog)
        yield model.score_texts


def _rows(
    record: PromptRecord,
    ranked: Sequence[tuple[float, str]],
    options: SampleOptions,
    counts: SampleCounts,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one prompt's answers, best first; a prompt that a filter drops is counted."""
    compares = options.format in ("ranked", "pair", "all_pairs")
    reason = None
    if len(ranked) < 1 + compares:
        reason = "too_few_answers"
    elif options.all_above is not None and ranked[-1][0] >= options.all_above:
        reason = "all_above"
    elif compares and ranked[0][0] - ranked[-1][0] <= options.tied:
        reason = "tied"
    elif options.format == "sft" and options.threshold is not None and ranked[0][0] < options.threshold:
        reason = "none_good"
    if reason:
        counts.dropped[reason] += 1
        return
    prompt = record.prompt_field()
    tools = {"tools": list(record.tools)} if record.tools else {}
    if options.format == "ranked":
        yield {"prompt": prompt, "completions": [{"content": t, "score": s} for s, t in ranked], **tools}
    elif options.format == "sft":
        best = _answer(record, ranked[0][1])
        yield {"prompt": prompt, "completion": best, **tools}
    elif options.format == "unpaired":
        for score, text in ranked:
            label = score >= (options.threshold or 0.0)
            yield {"prompt": prompt, "completion": _answer(record, text), "label": label, **tools}
    else:
        last = [(0, len(ranked) - 1)]
        every = [(i, j) for i in range(len(ranked)) for j in range(i + 1, len(ranked))]
        for i, j in last if options.format == "pair" else every:
            (high, chosen), (low, rejected) = ranked[i], ranked[j]
            if high - low > options.tied:
                yield {
                    "prompt": prompt,
                    "chosen": _answer(record, chosen),
                    "rejected": _answer(record, rejected),
                    "chosen_score": high,
                    "rejected_score": low,
                    **tools,
                }


def _answer(record: PromptRecord, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(record.prompt, str) else [{"role": "assistant", "content": text}]
