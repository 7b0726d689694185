"""Options of online training: the engine that answers the prompts, and how its answers are drawn and corrected for.

The docstring of a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from megatron_align.config.paths import expand_fields
from megatron_align.config.sections import CriticConfig
from megatron_align.errors import require

# Most tokens in the cache of the engine transformers, padding and room for completions included.
BATCH_TOKENS = 1 << 16
# Options that say where servers are and how long they are waited for, not what they answer: a requeued job has others.
OF_SERVERS = ("url", "vllm_python", "weights_folder", "request_timeout", "request_retries")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights for the difference between the log-probs of the trainer and of the engine that sampled.

    Args:
        mode: ratio of each token, or of its completion (sequence); truncate: bounded; mask: 0 outside the bounds
        cap: upper bound; null: none
        floor: lower bound; null: none
    """

    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    cap: float | None = 2.0
    floor: float | None = None

    def __post_init__(self) -> None:
        for name in ("cap", "floor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"rollout.correction.{name} must be positive, got {value}")
        require(
            self.cap is not None or self.floor is not None,
            "rollout.correction must have a cap or a floor (without, it has no bound), or be null; got neither",
        )
        require(
            self.cap is None or self.floor is None or self.floor < self.cap,
            f"rollout.correction.floor must be below cap {self.cap}, got {self.floor}",
        )


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """Dynamic sampling (DAPO, arXiv:2503.14476): prompts whose completions all have the same reward are replaced.

    Args:
        max_batches: batches of prompts that are answered for a set of rollouts, the first included; each further one
            has as many prompts as are missing
        exhausted: what happens if prompts without signal are left after these: keep: the set is filled with the first
            of them, which the row's groups_without_signal counts; stop: the run ends
        reward: name of the reward that is compared; null: the weighted sum of all
    """

    max_batches: int = 10
    exhausted: Literal["keep", "stop"] = "keep"
    reward: str | None = None

    def __post_init__(self) -> None:
        require(
            self.max_batches >= 2,
            "rollout.dynamic_sampling.max_batches must be at least 2 (the first included, so 1 replaces nothing), got "
            f"{self.max_batches}",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollouts: the completions that objectives grpo, rloo and ppo train on.

    Args:
        engine: transformers: a copy of the model on every rank; vllm: servers; data: completions and scores come with
            the data (ranked), nothing is generated
        completions: of each prompt; null: 3, for engine data those that a prompt has
        prompts: of one set of rollouts, which serves objective.iterations x minibatches steps; null:
            train.global_batch_size x objective.minibatches, or 128 where that is not given either
        max_tokens: longest completion
        temperature: divides the logits, in the trainer too
        top_p: draw from the smallest set of tokens whose probability reaches this
        top_k: draw from this number of likeliest tokens; 0: all
        stop: texts that end a completion
        url: vllm: servers, one or a list; null: the run starts one with vllm_python
        vllm_python: interpreter of an environment with vLLM, in which the run starts a server
        vllm_options: of vllm serve, as in ["--gpu-memory-utilization", "0.5"]
        weights_folder: vllm: folder that the servers can read, for new weights; null: the folder for temporary files
        request_timeout: vllm: seconds until a request without an answer is made again
        request_retries: vllm: further tries of a request that failed or took too long, with pauses that double from a
            second; after the last the run ends
        correction: {mode, cap, floor}: weights for the difference between trainer and engine; null: none
        mismatch_stop: largest mean difference of a step's log-probs, trainer against engine, in nats per token, that
            does not end the run; null: 0.05, with off_policy_steps 0.5
        as_chat: a prompt that is text is the turn of a user, not to be continued as it is
        dynamic_sampling: {max_batches, exhausted, reward}: replace prompts whose completions all have the same reward,
            by the next prompts; null: not
        off_policy_steps: 1: a set of rollouts is generated with the weights before the first update on the set before
            it, so that servers generate while the run trains; 0: with the newest weights
    """

    engine: Literal["transformers", "vllm", "data"] = "transformers"
    completions: int | None = None
    prompts: int | None = None
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    url: str | list[str] | None = None
    vllm_python: str | None = None
    vllm_options: list[str] = field(default_factory=list)
    weights_folder: str | None = None
    request_timeout: float = 600.0
    request_retries: int = 2
    correction: CorrectionConfig | None = field(default_factory=CorrectionConfig)
    mismatch_stop: float | None = None
    as_chat: bool = False
    dynamic_sampling: DynamicSamplingConfig | None = None
    off_policy_steps: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        expand_fields(self, "vllm_python", "weights_folder")
        for name in ("completions", "prompts", "max_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"rollout.{name} must be at least 1, got {value}")
        require(
            0 < self.temperature < float("inf"),
            "rollout.temperature must be positive: greedy answers have no log-prob to learn from; got "
            f"{self.temperature}",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k >= 0, f"rollout.top_k must be 0 (all tokens) or positive, got {self.top_k}")
        require(all(self.stop), "rollout.stop: a stop text must not be empty")
        require(
            self.mismatch_stop is None or self.mismatch_stop > 0,
            f"rollout.mismatch_stop must be positive, got {self.mismatch_stop}",
        )
        require(
            0 < self.request_timeout < float("inf"),
            f"rollout.request_timeout must be a positive number, got {self.request_timeout}",
        )
        require(
            self.request_retries >= 0,
            f"rollout.request_retries must be at least 0, got {self.request_retries}",
        )
        self._check_engine()

    def _check_engine(self) -> None:
        of_vllm = (
            "url",
            "vllm_python",
            "vllm_options",
            "weights_folder",
            "request_timeout",
            "request_retries",
        )
        if self.engine == "vllm":
            require(
                (self.url is None) != (self.vllm_python is None),
                "rollout.engine vllm needs rollout.url, of servers, or rollout.vllm_python, to start one; "
                f"got {'both' if self.url else 'neither'}",
            )
            require(
                not self.vllm_options or self.vllm_python is not None,
                f"rollout.vllm_options needs rollout.vllm_python, got {self.vllm_options}",
            )
        of_engines = (
            "top_p",
            "top_k",
            "stop",
            "mismatch_stop",
            "as_chat",
            "dynamic_sampling",
            "off_policy_steps",
        )
        unread = {"transformers": of_vllm, "data": (*of_vllm, *of_engines), "vllm": ()}[self.engine]
        defaults = RolloutConfig.__dataclass_fields__
        for name in unread:
            default = defaults[name]
            plain = default.default_factory() if callable(default.default_factory) else default.default
            value = getattr(self, name)
            require(
                value == plain, f"rollout.{name} does not apply to rollout.engine {self.engine}, got {value}"
            )


def changed(config: RolloutConfig | CriticConfig, section: str) -> list[str]:
    """Return the options of a section, all of which have defaults, that were given another value."""
    usual = type(config)()
    return [
        f"{section}.{option.name}"
        for option in fields(config)
        if getattr(config, option.name) != getattr(usual, option.name)
    ]
