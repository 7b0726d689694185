"""The configuration of an evaluation: a model, a layout and a list of tasks, each kind with options of its own.

The docstring of a field is its help text.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from megatron_align.config import ParallelConfig
from megatron_align.config.paths import expand_fields
from megatron_align.config.run import plain_mapping
from megatron_align.config.values import convert, option_types
from megatron_align.config.yaml_text import read_yaml
from megatron_align.data.tokenize.template_clock import parse_date
from megatron_align.errors import InputError, key_text, nearest, require, shown
from megatron_align.evaluation.adapter_names import ONLY, parse_adapters, require_name
from megatron_align.rollout.endpoint import Endpoint
from megatron_align.rollout.types import Sampling
from megatron_align.rollout.verifiers.checks import CHECKS

_Options = TypeVar("_Options")
_PATHS = ("data", "chat_template", "reference", "baseline", "include_path")  # options of tasks that are paths
FILES = ("chat_template", "baseline")  # options of tasks that are files they read besides their data
_HOLDS = "model, out and tasks"
ABOUT = """Evaluate a model: the loss on chat data, preference pairs, multiple choice, generated answers.

The tasks are listed in a YAML file: {model, out, precision, parallel, tasks: [{name, kind, data, ...}]}; kinds are
loss, preference, choice, generate, judge and lm_eval. OUT/results.json has the metrics of each task with 95% intervals,
OUT/items/ a row for each item; `megatron-align evaluate compare OUT OUT` compares two. MODEL is a Hugging Face folder
or a checkpoint of any layout. See docs/evaluation.md."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of an evaluation.

    Args:
        name: of its results; the name of a file
        kind: one of the kinds below
        data: file, folder or glob pattern, or a list of them, each reported by itself too
    """

    name: str
    kind: str
    data: str | list[str]

    def __post_init__(self) -> None:
        require(
            bool(self.name) and not set(self.name) & set("/\\\0") and not self.name.startswith("."),
            f"the name of a task must be usable as the name of a file, got '{self.name}'",
        )
        require(bool(self.sources), f"task {self.name}: data must name a file, got none")
        expand_fields(self, *(name for name in _PATHS if hasattr(self, name)))

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the data."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)


@dataclass(frozen=True, kw_only=True)
class StoredTask(Task):
    """A task on data in the shapes that training reads, tokenised into a store.

    Args:
        shape: format of the records; null: recognised from each file's first record
        chat_template: file with a Jinja chat template; null: the tokenizer's own
        too_long: what to do with a sample longer than sequence_length: error, or drop it
    """

    shape: str | None = None
    chat_template: str | None = None
    too_long: Literal["error", "drop"] = "error"


@dataclass(frozen=True, kw_only=True)
class LossTask(StoredTask):
    """Mean negative log-likelihood per trained token of chat data, and its perplexity."""

    kind: Literal["loss"] = "loss"


@dataclass(frozen=True, kw_only=True)
class PreferenceTask(StoredTask):
    """Share of pairs whose chosen answer has the higher score.

    Args:
        score: logprob: summed log-prob; per_token: its mean over tokens; implicit_reward: its difference to the
            reference's; reward: the output of a reward model; null: what the model and reference allow
        reference: the reference of implicit_reward: Hugging Face folder or checkpoint of the model's shape
    """

    kind: Literal["preference"] = "preference"
    score: Literal["logprob", "per_token", "implicit_reward", "reward"] | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.reference is not None) == (self.score == "implicit_reward") or self.score is None,
            f"task {self.name}: reference belongs to score implicit_reward, which needs it; got score {self.score} "
            f"with reference {self.reference}",
        )


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Task):
    """Multiple choice by log-prob: records with prompt (or question), choices and answer.

    Args:
        delimiter: text between a prompt that is text and each choice
        chat_template: file with a Jinja chat template; null: the tokenizer's own
        limit: first records of each source only; null: all
    """

    kind: Literal["choice"] = "choice"
    delimiter: str = " "
    chat_template: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_limit(self.name, self.limit)


@dataclass(frozen=True, kw_only=True)
class AnsweredTask(Task):
    """A task on answers that the model generates.

    Args:
        as_chat: a prompt that is text is the turn of a user
        chat_template: file with a Jinja chat template; null: the tokenizer's own
        limit: first records of each source only; null: all
        completions: answers of each prompt; the score of a prompt is their mean
        max_tokens: longest answer
        temperature: 0 is greedy
        top_p: as in generate
        top_k: as in generate
        stop: texts that end an answer
        seed: of the random numbers
    """

    as_chat: bool = False
    chat_template: str | None = None
    limit: int | None = None
    completions: int = 1
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    seed: int = 1234

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_limit(self.name, self.limit)
        self.sampling()

    def sampling(self) -> Sampling:
        """Return how answers are drawn."""
        names = [f.name for f in fields(Sampling)]
        return Sampling(**{name: getattr(self, name) for name in names} | {"stop": tuple(self.stop)})


@dataclass(frozen=True, kw_only=True)
class GenerateTask(AnsweredTask):
    """Answers that are generated and checked.

    Args:
        check: how an answer is judged, see docs/evaluation.md
        extract: regular expression searched in the answer, the last match is judged (its first group, if it has
            one); null: all of the answer
    """

    kind: Literal["generate"] = "generate"
    check: Literal["exact_match", "contains", "math", "code", "ifeval"] = "exact_match"
    extract: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        CHECKS[self.check].require(self.name, self.extract)


@dataclass(frozen=True, kw_only=True)
class JudgeTask(AnsweredTask):
    """Answers that a judge compares with a baseline's, in both orders; an order that decides otherwise makes a tie.

    Args:
        url: of an OpenAI-compatible endpoint; its key is read from the environment variable OPENAI_API_KEY
        judge: name of the judging model at the endpoint
        baseline: JSONL file that generate wrote for the same prompts, whose first completions are compared with;
            null: each record's own answer
        judge_tokens: longest reply of the judge
        tries: replies requested until one has a verdict; without one the comparison counts as a tie, and is counted
        workers: requests at once
        failures: requests that may fail after all their tries
    """

    kind: Literal["judge"] = "judge"
    url: str
    judge: str
    baseline: str | None = None
    judge_tokens: int = 1024
    tries: int = 3
    workers: int = 16
    failures: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        Endpoint(self.url)
        for name in ("judge_tokens", "tries", "workers"):
            value = getattr(self, name)
            require(value >= 1, f"task {self.name}: {name} must be at least 1, got {value}")
        require(self.failures >= 0, f"task {self.name}: failures must not be negative, got {self.failures}")


@dataclass(frozen=True, kw_only=True)
class LMEvalTask(Task):
    """Tasks of lm-eval, run on the sharded model.

    Args:
        data: names of lm-eval's tasks, groups or tags, or YAML files of tasks
        include_path: folder with further task files; null: none
        num_fewshot: examples in the prompt; null: the task's own
        limit: first documents of each task only; null: all
        apply_chat_template: prompts are messages, rendered with the tokenizer's template
        system_instruction: system prompt; null: none
        fewshot_as_multiturn: with a chat template the examples are turns of a conversation
        gen_kwargs: options of generation in place of the tasks': until, max_gen_toks, do_sample, temperature, ...
    """

    kind: Literal["lm_eval"] = "lm_eval"
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    gen_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_limit(self.name, self.limit)
        line = f"task {self.name}: kind lm_eval needs the package lm_eval: pip install 'megatron-align[eval]'"
        require(importlib.util.find_spec("lm_eval") is not None, line)
        line = f"task {self.name}: num_fewshot must not be negative, got {self.num_fewshot}"
        require(self.num_fewshot is None or self.num_fewshot >= 0, line)
        line = f"task {self.name}: include_path must be a folder, found none at {self.include_path}"
        require(self.include_path is None or Path(self.include_path).is_dir(), line)


_AUGMENT = ("augment", "augment_template")
_ENGINE_OPTIONS = ("rollout.engine", "rollout.url", "rollout.vllm_python", "rollout.vllm_options")
KINDS: dict[str, type[Task]] = {
    "loss": LossTask,
    "preference": PreferenceTask,
    "choice": ChoiceTask,
    "generate": GenerateTask,
    "judge": JudgeTask,
    "lm_eval": LMEvalTask,
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine that answers the prompts of tasks of the kinds generate and judge.

    Args:
        engine: transformers: a copy of the model on every rank; vllm: servers, of a Hugging Face folder
        url: of servers that hold the model; null: vllm_python starts one
        vllm_python: interpreter of an environment with vLLM, in which rank 0 starts a server; its log is out/vllm.log
        vllm_options: of that server, as of vllm serve; --dtype is precision's unless it is given
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    url: str | list[str] | None = None
    vllm_python: str | None = None
    vllm_options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        expand_fields(self, "vllm_python")
        for name in ("url", "vllm_python", "vllm_options"):
            value = getattr(self, name)
            line = f"rollout.{name} belongs to rollout.engine vllm, got {value} with engine {self.engine}"
            require(self.engine == "vllm" or not value, line)
        if self.engine == "vllm":
            found = f"got {self.urls or 'none'} and {self.vllm_python}"
            line = f"rollout.engine vllm needs rollout.url, of servers, or rollout.vllm_python, to start one; {found}"
            require(bool(self.urls) != (self.vllm_python is not None), line)
            line = (
                f"rollout.vllm_options are those of a server that vllm_python starts, got {self.vllm_options}"
            )
            require(not self.vllm_options or self.vllm_python is not None, line)
            for url in self.urls:
                Endpoint(url)

    @property
    def urls(self) -> list[str]:
        """The servers that run already."""
        return [self.url] if isinstance(self.url, str) else list(self.url or ())


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One evaluation.

    Args:
        model: Hugging Face folder, checkpoint of any layout, or run folder (its newest checkpoint)
        out: folder of the results; results.json in it is replaced
        tasks: what is evaluated, in order
        adapter: PEFT folder or checkpoint of an adapter of the model; several as {NAME: PATH}, each evaluated into
            out/NAME; null: none
        parallel: how the model is sharded over ranks, as in training
        precision: of weights and computation: bf16 or fp32
        sequence_length: capacity of a pack and longest sample, in tokens; null: 4096, at most the model's positions
        template_date: date that chat templates read from the clock (2024-07-26); null: today; results.json has it
        rollout: engine of generated answers: {engine, url, vllm_python, vllm_options}
        augment: model that writes a complement of each prompt of tasks of the kinds generate and judge, which is
            appended to it: path, URL#NAME or FILE.py:FUNCTION; null: none does
        augment_template: file of the template that this model was trained on; null: that of pas build
    """

    model: str
    out: str
    tasks: tuple[Task, ...]
    adapter: str | dict[str, str] | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["bf16", "fp32"] = "bf16"
    sequence_length: int | None = None
    template_date: str | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    augment: str | None = None
    augment_template: str | None = None

    def __post_init__(self) -> None:
        expand_fields(self, "model", "out", "adapter", "augment", "augment_template")
        if self.augment is not None:
            line = f"augment is for tasks of the kinds generate and judge, the evaluation has none, got {self.augment}"
            require(any(isinstance(task, AnsweredTask) for task in self.tasks), line)
        line = (
            f"augment_template is that of the model that augment names, got {self.augment_template} without"
        )
        require(self.augment is not None or self.augment_template is None, line)
        if self.rollout.engine == "vllm":
            line = (
                "rollout.engine vllm answers tasks of the kinds generate and judge, the evaluation has none"
            )
            require(any(isinstance(task, AnsweredTask) for task in self.tasks), line)
            line = f"adapters are loaded by the vllm servers themselves (--enable-lora), got {self.adapter}"
            require(self.adapter is None, line)
        if self.template_date is not None:
            parse_date(self.template_date, "template_date")
        require(self.adapter != {}, "adapter must name at least one adapter, or be null, got {}")
        for name in self.adapter if isinstance(self.adapter, dict) else ():
            require_name(name)
        require(
            self.sequence_length is None or self.sequence_length > 1,
            f"sequence_length must be at least 2 tokens, got {self.sequence_length}",
        )


def parse(arguments: Sequence[str], program: str) -> EvaluationConfig:
    """Return the evaluation of command-line arguments; ``program``: the command, for messages.

    Raises:
        InputError: for an unknown or malformed argument, or a bad configuration.
        SystemExit: after ``--help`` has printed.
    """
    parser = ArgumentParser(prog=program, description=ABOUT, exit_on_error=False)
    add = parser.add_argument
    add("--config", type=str, help="YAML file of the evaluation: model, out, parallel, tasks")
    add("--model", type=str, help="instead of the configuration's model")
    add("--out", type=str, help="instead of the configuration's out")
    about = "instead of the configuration's adapter: PATH, or several as NAME=PATH"
    add("--adapter", type=str, nargs="+", help=about)
    add("--precision", choices=("bf16", "fp32"), help="instead of the configuration's precision")
    add("--sequence_length", type=str, help="instead of the configuration's sequence_length")
    add("--template_date", type=str, help="instead of the configuration's template_date")
    add("--augment", type=str, help="instead of the configuration's augment")
    add("--augment_template", type=str, help="instead of the configuration's augment_template")
    for option in fields(EngineConfig):
        many = "+" if option.name == "url" else None
        about = f"instead of the configuration's rollout.{option.name}"
        add(f"--rollout.{option.name}", type=str, nargs=many, metavar=option.name.upper(), help=about)
    options = (
        "model",
        "out",
        "adapter",
        "precision",
        "sequence_length",
        "template_date",
        *_AUGMENT,
        *_ENGINE_OPTIONS,
    )
    names = ["--config", *(f"--{name}" for name in options)]
    for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        is_known = name in (*names, "--help") or " " in name  # a value, as '--tensor-parallel-size 2'
        require(is_known, f"{program} has no option {name}{nearest(name, names)}")
    try:
        given = vars(parser.parse_args(list(arguments)).as_flat())
    except ArgumentError as error:
        raise InputError(f"{program}: {' '.join(str(error).split())}") from error
    path = given.pop("config")
    if given["adapter"]:
        paths = parse_adapters(given["adapter"])
        given["adapter"] = paths[ONLY] if list(paths) == [ONLY] else paths
    if given["rollout.vllm_options"] is not None:
        given["rollout.vllm_options"] = shlex.split(given["rollout.vllm_options"])
    require(path is not None, f"{program} needs --config EVAL.yaml, got none")
    return load_evaluation(path, {name: value for name, value in given.items() if value is not None})


def load_evaluation(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> EvaluationConfig:
    """Return the evaluation that a YAML file or a mapping describes.

    Args:
        config: path of a YAML file, or ``{"model": ..., "out": ..., "tasks": [{"name", "kind", "data", ...}]}``.
        overrides: values of ``model``, ``out`` and other options of the top level that win over ``config``.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
    """
    where = "" if isinstance(config, Mapping) else f"{config}: "
    content = plain_mapping(config) if isinstance(config, Mapping) else read_yaml(str(config), _HOLDS)
    engine = content.pop("rollout", None) or {}
    require(isinstance(engine, Mapping), f"{where}rollout must be a mapping of options, got {shown(engine)}")
    for name, value in (overrides or {}).items():
        section, dotted, option = name.partition(".")
        if dotted and section == "rollout":
            engine = {**engine, option: value}
        else:
            content[name] = value
    if isinstance(content.get("model"), Mapping):  # as a run's configuration has it
        content["model"] = content["model"].get("path")
    tasks = tasks_of(content.pop("tasks", None), f"{where}tasks")
    parallel = _options(ParallelConfig, content.pop("parallel", None) or {}, f"{where}parallel")
    rollout = _options(EngineConfig, engine, f"{where}rollout")
    left_out = ("tasks", "parallel", "rollout")
    given = _checked(EvaluationConfig, content, f"{where.removesuffix(': ')}", left_out)
    return EvaluationConfig(**given, tasks=tasks, parallel=parallel, rollout=rollout)


def tasks_of(content: Any, where: str) -> tuple[Task, ...]:
    """Return the tasks that a list of mappings describes.

    Args:
        content: ``[{"name", "kind", "data", ...}]``.
        where: its key, for messages.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
    """
    is_list = isinstance(content, Sequence) and not isinstance(content, str)
    require(is_list, f"{where} must be a list, got {shown(content)}")
    tasks = tuple(_task(task, f"{where}[{i}]") for i, task in enumerate(content))
    require(bool(tasks), f"{where} must name at least one task, got none")
    names = [task.name for task in tasks]
    double = next((name for name in names if names.count(name) > 1), None)
    require(double is None, f"{where}: each task needs a name of its own, got '{double}' twice")
    return tasks


def _task(content: Any, where: str) -> Task:
    require(
        isinstance(content, Mapping),
        f"{where} must be a mapping with name, kind and data, got {shown(content)}",
    )
    kind = content.get("kind")
    require(
        kind in KINDS,
        f"{where}: kind must be one of {', '.join(KINDS)}, got {shown(kind)}{nearest(str(kind), list(KINDS))}",
    )
    return _options(KINDS[kind], content, f"{where} ({content.get('name', kind)})")


def _options(kind: type[_Options], content: Any, where: str) -> _Options:
    require(isinstance(content, Mapping), f"{where} must be a mapping of options, got {shown(content)}")
    return kind(**_checked(kind, content, where))


def _checked(
    kind: type, content: Mapping[str, Any], where: str, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the given options, with the types of a dataclass's fields."""
    place = f"{where}: " if where else ""
    known = [f for f in dataclasses.fields(kind) if f.name not in left_out]
    names = [f.name for f in known]
    for key in content:
        name = key_text(key)
        require(key in names, f"{place}unknown configuration key '{name}'{nearest(name, names)}")
    for option in known:
        needed = option.default is MISSING and option.default_factory is MISSING
        require(
            not needed or content.get(option.name) is not None,
            f"{place}{option.name} must be given, got none",
        )
    kinds = option_types(kind)
    return {name: convert(content[name], kinds[name], f"{place}{name}") for name in names if name in content}


def _require_limit(name: str, limit: int | None) -> None:
    require(limit is None or limit >= 1, f"task {name}: limit must be at least 1, got {limit}")
