"""Options of rewards: a list of entries, each of one kind with options of its own. A field's docstring is its help.

The list is read as sections are, except that an entry is changed by its name: ``--rewards.NAME.weight 0.5``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_align.config.arguments import content_of_text
from megatron_align.config.paths import expand_fields, expand_home
from megatron_align.config.values import build
from megatron_align.errors import InputError, listed, nearest, require, shown

DEFAULT_CATEGORY = "category"
ABOUT = (
    "list of rewards, weighted and summed: [{kind: model | function | math | exact_match | contains | ifeval | code | "
    "length | regex | endpoint, name, weight, ...}]; docs/online.md"
)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward of completions.

    Args:
        kind: what computes it
        name: of its metric, reward/NAME; null: its kind, or the function's name
        weight: factor in the sum of all rewards; {CATEGORY: factor}: by the prompt's category, other prompts are not
            scored by this reward
        category: field of a prompt's record that weights by category read; null: category
        normalize: none, or (reward - mean) / (deviation + 1e-4) over the completions of a prompt (group) or of a
            step (batch), before it is weighted
    """

    kind: str
    name: str | None = None
    weight: float | dict[str, float] = 1.0
    category: str | None = None
    normalize: Literal["none", "group", "batch"] = "none"

    def __post_init__(self) -> None:
        if self.name is None:
            object.__setattr__(self, "name", self.default_name())
        require(
            re.fullmatch(r"[\w.-]+", self.label) is not None,
            f"rewards: a name is part of a metric's, letters, digits, '_', '-' and '.', got '{self.label}'",
        )
        require(
            self.weight != {}, f"reward {self.label}: weight must name a category, or be a number, got {{}}"
        )
        require(
            self.category is None or isinstance(self.weight, dict),
            f"reward {self.label}: category is read where weight is {{CATEGORY: factor}}, got weight {self.weight}",
        )

    def default_name(self) -> str:
        """Return the name of an entry without one."""
        return self.kind

    @property
    def label(self) -> str:
        """The name, given or not."""
        assert self.name is not None, "set at the start"
        return self.name


@dataclass(frozen=True, kw_only=True)
class ModelReward(RewardConfig):
    """The output of a reward model, on the layout of the run.

    Args:
        path: Hugging Face folder of a reward model, checkpoint, or run folder (its newest checkpoint)
        chat_template: file with a Jinja chat template; null: that of the reward model
        template_date: date that its chat template reads from the clock; null: data.template_date
        precision: of weights and computation; null: train.precision
        sequence_length: capacity of a pack; null: data.sequence_length
        too_long: error, or skip: prompt and completion that pass the reward model's positions or a pack are not scored
    """

    kind: Literal["model"] = "model"
    path: str
    chat_template: str | None = None
    template_date: str | None = None
    precision: Literal["bf16", "fp32"] | None = None
    sequence_length: int | None = None
    too_long: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_fields(self, "path", "chat_template")
        _require_least(self, sequence_length=2)


@dataclass(frozen=True, kw_only=True)
class RetriedReward(RewardConfig):
    """A reward that is computed elsewhere, or by code that may fail.

    Args:
        timeout: seconds of one try; null: no limit
        retries: further tries after one that failed or took too long, with pauses that double from a second
    """

    timeout: float | None = 600.0
    retries: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.timeout is None or self.timeout > 0,
            f"reward {self.label}: timeout must be positive, or null, got {self.timeout}",
        )
        _require_least(self, retries=0)


@dataclass(frozen=True, kw_only=True)
class FunctionReward(RetriedReward):
    """A function of a Python file, called as TRL calls reward functions: f(prompts, completions, **columns).

    Args:
        path: FILE.py:FUNCTION
    """

    kind: Literal["function"] = "function"
    path: str

    def __post_init__(self) -> None:
        file, _, function = self.path.rpartition(":")
        require(
            file.endswith(".py") and function.isidentifier(),
            f"rewards: the path of a function is FILE.py:FUNCTION, got '{self.path}'",
        )
        object.__setattr__(self, "path", f"{expand_home(file)}:{function}")
        super().__post_init__()

    def default_name(self) -> str:
        """Return the function's name."""
        return self.path.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class EndpointReward(RetriedReward):
    """The answer of an HTTP server: POST {prompts, completions, columns} -> {rewards: [...]}.

    Args:
        url: http://HOST:PORT/PATH
        batch_size: completions of one request
        workers: requests at once
        key_variable: environment variable with a key, sent as a bearer token if it is set
    """

    kind: Literal["endpoint"] = "endpoint"
    url: str
    timeout: float = 600.0
    batch_size: int = 64
    workers: int = 4
    key_variable: str = "REWARD_API_KEY"

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = urlsplit(self.url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query,
            f"reward {self.label}: url must be http://HOST:PORT/PATH without a query, got '{self.url}'",
        )
        _require_least(self, batch_size=1, workers=1)


@dataclass(frozen=True, kw_only=True)
class AnswerReward(RewardConfig):
    """1 where the answer is right, else 0: the record's own answer decides (field answer, reference or target).

    Args:
        extract: regular expression searched in the completion, the last match is compared (its first group, if it
            has one); null: all of the completion
    """

    extract: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extract is not None:
            _require_expression(self, "extract", self.extract)


@dataclass(frozen=True, kw_only=True)
class MathReward(AnswerReward):
    """1 where the completion's mathematical answer equals the record's, by math-verify."""

    kind: Literal["math"] = "math"


@dataclass(frozen=True, kw_only=True)
class ExactMatchReward(AnswerReward):
    """1 where the completion is the record's answer, up to white space."""

    kind: Literal["exact_match"] = "exact_match"


@dataclass(frozen=True, kw_only=True)
class ContainsReward(AnswerReward):
    """1 where the completion contains the record's answer, up to white space."""

    kind: Literal["contains"] = "contains"


@dataclass(frozen=True, kw_only=True)
class InstructionReward(RewardConfig):
    """IFEval's checks of the record's instructions.

    Args:
        metric: prompt: 1 where all are followed; instruction: the share that is; loose: also without the first line,
            the last line or asterisks
    """

    kind: Literal["ifeval"] = "ifeval"
    metric: Literal["prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"] = (
        "prompt_strict"
    )


@dataclass(frozen=True, kw_only=True)
class CodeReward(RewardConfig):
    """1 where the completion's program passes the record's tests, in a sandbox."""

    kind: Literal["code"] = "code"


@dataclass(frozen=True, kw_only=True)
class LengthReward(RewardConfig):
    """0 for a completion of min to max units, else falling to -1 at a distance of ramp units.

    Args:
        unit: tokens, words or characters
        min: shortest completion without a penalty
        max: longest completion without a penalty; null: none
        ramp: units outside of min and max over which the reward falls to -1
    """

    kind: Literal["length"] = "length"
    unit: Literal["tokens", "words", "characters"] = "tokens"
    min: int = 0
    max: int | None = None
    ramp: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_least(self, min=0, max=self.min, ramp=1)
        require(
            self.min > 0 or self.max is not None,
            f"reward {self.label}: length needs min or max, got neither",
        )


@dataclass(frozen=True, kw_only=True)
class RegexReward(RewardConfig):
    """1 where the completion matches a regular expression, else 0.

    Args:
        pattern: Python's syntax; flags are written inline, (?s) for instance
        fullmatch: the expression must match all of the completion, not a part of it
    """

    kind: Literal["regex"] = "regex"
    pattern: str
    fullmatch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_expression(self, "pattern", self.pattern)


KINDS: dict[str, type[RewardConfig]] = {
    "model": ModelReward,
    "function": FunctionReward,
    "math": MathReward,
    "exact_match": ExactMatchReward,
    "contains": ContainsReward,
    "ifeval": InstructionReward,
    "code": CodeReward,
    "length": LengthReward,
    "regex": RegexReward,
    "endpoint": EndpointReward,
}


def build_rewards(entries: Any) -> tuple[RewardConfig, ...]:
    """Return the rewards that a configuration lists.

    Raises:
        InputError: an unknown kind or option, an unsuitable value, or a name that is given twice.
    """
    if entries is None:
        return ()
    require(isinstance(entries, (list, tuple)), f"rewards must be a list, [{{...}}], got {shown(entries)}")
    rewards = tuple(_built(entry, f"rewards[{i}]") for i, entry in enumerate(entries))
    names = [reward.label for reward in rewards]
    double = next((name for name in names if names.count(name) > 1), None)
    require(double is None, f"rewards: each needs a name of its own, got '{double}' twice: set name")
    return rewards


def changed_rewards(before: Any, key: str, value: Any) -> Any:
    """Return the list of entries after ``rewards``, ``rewards+`` or ``rewards.NAME.option`` was given.

    Args:
        before: the list so far; None: none.
        key: ``rewards``, ``rewards+`` or ``rewards.NAME.option``.
        value: of it.

    Raises:
        InputError: no entry has this name.
    """
    value, (_, dotted, rest) = content_of_text(value, key), key.partition(".")
    if not dotted:
        return (
            [*(before or []), *(value if isinstance(value, list) else [value])] if key[-1] == "+" else value
        )
    entries = [dict(entry) for entry in before or () if isinstance(entry, Mapping)]
    names = [_name_of(entry) for entry in entries]
    name, _, option = rest.rpartition(".")  # a name may have dots
    require(bool(name), f"an option of a reward is named rewards.NAME.option, got '{key}'")
    if name not in names:
        raise InputError(
            f"'{key}': no reward is named {name}, the rewards are {listed(names) or 'none'}{nearest(name, names)}"
        )
    entries[names.index(name)][option] = value
    return entries


def _name_of(entry: Mapping[str, Any]) -> str:
    if entry.get("name") is not None:
        return str(entry["name"])
    kind = str(entry.get("kind"))
    return str(entry.get("path")).rpartition(":")[2] if kind == "function" else kind


def _built(entry: Any, where: str) -> RewardConfig:
    if isinstance(entry, RewardConfig):
        return entry
    require(isinstance(entry, Mapping), f"{where} must be a mapping {{kind, ...}}, got {shown(entry)}")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise InputError(
            f"{where}.kind must be one of {', '.join(KINDS)}, got {shown(kind)}{nearest(str(kind), list(KINDS))}"
        )
    built = build(entry, KINDS[kind], where)
    assert isinstance(built, RewardConfig), "a kind's dataclass"
    return built


def _require_least(reward: RewardConfig, **least: int) -> None:
    assert set(least) <= {option.name for option in fields(reward)}, "options of the kind"
    for name, lowest in least.items():
        value = getattr(reward, name)
        require(
            value is None or value >= lowest,
            f"reward {reward.label}: {name} must be at least {lowest}, got {value}",
        )


def _require_expression(reward: RewardConfig, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"reward {reward.label}: {name} must be a regular expression, got {pattern!r}: {error}"
        ) from error
