"""Options of each objective: what ``objective.name`` may be, and which options then exist.

An option that an objective or its loss type does not use is an error, never ignored. Formulas: ``losses/`` and
docs/objectives.md; names and defaults are TRL's where TRL has the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_align.errors import nearest, require

Kinds = tuple[str, ...]

# The options of each loss type besides beta; tests hold them against the losses' own parameters.
_DIVERGENCE = ("f_divergence_type",)
DPO_OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing", *_DIVERGENCE),
    "sigmoid_norm": _DIVERGENCE,
    "robust": ("label_smoothing", *_DIVERGENCE),
    "hinge": _DIVERGENCE,
    "ipo": _DIVERGENCE,
    "exo_pair": ("label_smoothing", *_DIVERGENCE),
    "nca_pair": (),
    "bco_pair": (),
    "sppo_hard": (),
    "aot": ("label_smoothing",),
    "aot_unpaired": ("label_smoothing",),
    "apo_zero": (),
    "apo_down": (),
    "discopop": ("discopop_tau", *_DIVERGENCE),
    "sft": (),
    "margin": ("margin_scale", *_DIVERGENCE),
    "reward_aware": ("margin_scale", *_DIVERGENCE),
}
CPO_OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing", "alpha"),
    "hinge": ("alpha",),
    "ipo": ("alpha",),
    "simpo": ("simpo_gamma", "label_smoothing", "alpha"),
    "alphapo": ("simpo_gamma", "label_smoothing", "alpha"),
}
TPO_OPTIONS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing",),
    "hinge": (),
    "ipo": (),
    "tpo-l": ("tpo_l_gamma", "label_smoothing"),
}
COUPLED = ("aot", "aot_unpaired")  # loss types that sort over the step's global batch


def _require_types(loss_types: Sequence[str], known: Mapping[str, tuple[str, ...]]) -> None:
    require(len(loss_types) > 0, "objective.loss_type must name at least one loss type, got none")
    for name in loss_types:
        require(
            name in known,
            f"objective.loss_type must be of {', '.join(known)}; got '{name}'{nearest(name, list(known))}",
        )


def _require_used(
    given: Mapping[str, object], loss_types: Sequence[str], known: Mapping[str, tuple[str, ...]]
) -> None:
    """Check that every option that was given belongs to one of the loss types."""
    for option, value in given.items():
        users = [name for name, options in known.items() if option in options]
        require(
            value is None or any(name in users for name in loss_types),
            f"objective.{option} belongs to loss_type {', '.join(users)}; "
            f"got {value} with loss_type {', '.join(loss_types)}",
        )


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"objective.{name} must be positive, got {value}")


def _require_smoothing(value: float | None) -> None:
    require(value is None or 0 <= value < 0.5, f"objective.label_smoothing must lie in [0, 0.5), got {value}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning: cross-entropy on the assistant's tokens.

    Args:
        name: sft
        normalization: token: every trained token of the step's global batch weighs the same;
            sample: every sample weighs the same, its tokens sharing that weight
    """

    kinds: ClassVar[Kinds] = ("chat",)
    compares: ClassVar[bool] = False  # with a reference model

    name: Literal["sft"] = "sft"
    normalization: Literal["token", "sample"] = "token"


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation and its relatives, on pairs, against a reference.

    Args:
        name: dpo
        loss_type: sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot,
            aot_unpaired, apo_zero, apo_down, discopop, sft, margin, reward_aware; or a list of them
        loss_weights: of each of several loss types; null: 1 each
        beta: strength of the pull to the reference
        label_smoothing: share of labels taken to be wrong (sigmoid, then conservative DPO; robust, exo_pair, aot,
            aot_unpaired)
        f_divergence_type: what holds the policy to the reference; null: reverse_kl
        f_alpha_divergence_coef: alpha of alpha_divergence; null: 0.5
        discopop_tau: temperature of discopop; null: 0.05
        ld_alpha: weight of the tokens past the shorter answer's length (LD-DPO); null: 1, plain
        use_weighting: weigh pairs by how likely the policy is to write them (WPO)
        rpo_alpha: weight of the likelihood of the chosen answer beside the loss (RPO); null: none
        margin_scale: margin, reward_aware: the data's margins (or differences of scores) are multiplied by it; null: 1
    """

    kinds: ClassVar[Kinds] = ("pair",)
    compares: ClassVar[bool] = True

    name: Literal["dpo"] = "dpo"
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float | None = None
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    f_alpha_divergence_coef: float | None = None
    discopop_tau: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    rpo_alpha: float | None = None
    margin_scale: float | None = None

    def __post_init__(self) -> None:
        types = self.loss_types
        _require_types(types, DPO_OPTIONS)
        names = ("label_smoothing", "f_divergence_type", "discopop_tau", "margin_scale")
        _require_used({name: getattr(self, name) for name in names}, types, DPO_OPTIONS)
        _require_positive(beta=self.beta)
        _require_smoothing(self.label_smoothing)
        require(
            self.loss_weights is None or len(self.loss_weights) == len(types),
            f"objective.loss_weights must be one for each of {len(types)} loss types, got {self.loss_weights}",
        )
        require(
            self.f_alpha_divergence_coef is None or self.f_divergence_type == "alpha_divergence",
            f"objective.f_alpha_divergence_coef belongs to f_divergence_type alpha_divergence, "
            f"got {self.f_alpha_divergence_coef} with {self.f_divergence_type}",
        )
        if self.f_divergence_type not in (None, "reverse_kl"):
            others = [
                name for name in types if name != "sft" and "f_divergence_type" not in DPO_OPTIONS[name]
            ]
            require(
                not others,
                f"objective.f_divergence_type {self.f_divergence_type} must suit every loss type, "
                f"and {', '.join(others)} takes none",
            )
        require(
            self.discopop_tau is None or self.discopop_tau > 0,
            f"objective.discopop_tau must be positive, got {self.discopop_tau}",
        )
        require(
            self.ld_alpha is None or 0 <= self.ld_alpha <= 1,
            f"objective.ld_alpha must lie in [0, 1], got {self.ld_alpha}",
        )
        require(
            self.rpo_alpha is None or (self.rpo_alpha > 0 and "sft" not in types),
            f"objective.rpo_alpha must be positive, and stands for loss_type sft; got {self.rpo_alpha} with "
            f"loss_type {', '.join(types)}",
        )
        coupled, scaled = (
            [name for name in types if name in group]
            for group in (
                COUPLED,
                [name for name, options in DPO_OPTIONS.items() if "margin_scale" in options],
            )
        )
        require(
            not (coupled and scaled),
            f"objective.loss_type {', '.join(scaled)} reads a margin for each pair, and {', '.join(coupled)} mixes "
            "the step's pairs: not both",
        )
        mixing = [name for name in types if name in (*COUPLED, "sft")] + ["rpo_alpha"] * (
            self.rpo_alpha is not None
        )
        require(
            not (mixing and self.use_weighting),
            f"objective.use_weighting weighs pairs, and {', '.join(mixing)} mixes the step's pairs: not both",
        )

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The loss types, one or several."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)


@dataclass(frozen=True, kw_only=True)
class CPOConfig:
    """Contrastive preference optimisation: pairs without a reference, beside the likelihood of the chosen answer.

    Args:
        name: cpo
        loss_type: sigmoid, hinge, ipo, simpo (with cpo_alpha: CPO-SimPO), alphapo (without likelihood)
        beta: factor of the difference of log-probs
        label_smoothing: share of labels taken to be wrong (sigmoid, simpo, alphapo)
        cpo_alpha: weight of the likelihood term; null: 1, for alphapo 0
        simpo_gamma: simpo, alphapo: target margin; null: 0.5
        alpha: of AlphaPO's reward; null: 0, the log-prob itself
    """

    kinds: ClassVar[Kinds] = ("pair",)
    compares: ClassVar[bool] = False

    name: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float | None = None
    cpo_alpha: float | None = None
    simpo_gamma: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        names = ("label_smoothing", "simpo_gamma", "alpha")
        _require_used({name: getattr(self, name) for name in names}, (self.loss_type,), CPO_OPTIONS)
        _require_positive(beta=self.beta)
        _require_smoothing(self.label_smoothing)
        require(
            self.cpo_alpha is None or (self.cpo_alpha >= 0 and self.loss_type != "alphapo"),
            f"objective.cpo_alpha must not be negative, and alphapo has no likelihood term; "
            f"got {self.cpo_alpha} with loss_type {self.loss_type}",
        )


@dataclass(frozen=True, kw_only=True)
class SimPOConfig:
    """SimPO: pairs without a reference, on log-probs per token.

    Args:
        name: simpo
        beta: factor of the difference of log-probs per token (the paper: 2 to 10; the default is TRL's)
        simpo_gamma: target margin (the paper: 0.3 to 1.6)
        label_smoothing: share of labels taken to be wrong
    """

    kinds: ClassVar[Kinds] = ("pair",)
    compares: ClassVar[bool] = False

    name: Literal["simpo"] = "simpo"
    beta: float = 0.1
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require_positive(beta=self.beta)
        _require_smoothing(self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class TPOConfig:
    """Triple preference optimisation: pairs without a reference, beside the likelihood of a third, gold answer.

    Args:
        name: tpo
        loss_type: sigmoid, hinge, ipo, tpo-l (log-probs per token and a target margin)
        beta: factor of the difference of log-probs
        label_smoothing: share of labels taken to be wrong (sigmoid, tpo-l)
        tpo_alpha: weight of the likelihood of the gold answer
        tpo_l_gamma: tpo-l: target margin; null: 0.5
    """

    kinds: ClassVar[Kinds] = ("triple",)
    compares: ClassVar[bool] = False

    name: Literal["tpo"] = "tpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "tpo-l"] = "sigmoid"
    beta: float = 0.01
    label_smoothing: float | None = None
    tpo_alpha: float = 1.0
    tpo_l_gamma: float | None = None

    def __post_init__(self) -> None:
        names = ("label_smoothing", "tpo_l_gamma")
        _require_used({name: getattr(self, name) for name in names}, (self.loss_type,), TPO_OPTIONS)
        _require_positive(beta=self.beta)
        _require_smoothing(self.label_smoothing)
        require(
            self.tpo_alpha > 0,
            f"objective.tpo_alpha must be positive (without the gold answer it is objective cpo), got {self.tpo_alpha}",
        )


@dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """ORPO: likelihood of the chosen answer and an odds-ratio term, without a reference.

    Args:
        name: orpo
        beta: weight of the odds-ratio term (the paper's lambda)
        nll_over: the likelihood is of the prompt and the chosen answer (as TRL) or of the answer (as the paper)
    """

    kinds: ClassVar[Kinds] = ("pair",)
    compares: ClassVar[bool] = False

    name: Literal["orpo"] = "orpo"
    beta: float = 0.1
    nll_over: Literal["prompt_and_chosen", "chosen"] = "prompt_and_chosen"

    def __post_init__(self) -> None:
        _require_positive(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """KTO: single answers marked desirable or not, against a reference.

    Args:
        name: kto
        loss_type: kto: with a baseline taken over the step's global batch; apo_zero_unpaired: without
        beta: strength of the pull to the reference
        desirable_weight: factor on the losses of desirable answers
        undesirable_weight: factor on the losses of the others
    """

    kinds: ClassVar[Kinds] = ("unpaired",)
    compares: ClassVar[bool] = True

    name: Literal["kto"] = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


@dataclass(frozen=True, kw_only=True)
class BCOConfig:
    """Binary classifier optimisation: single answers, against a reference; rewards are centred per step.

    Args:
        name: bco
        beta: strength of the pull to the reference
    """

    kinds: ClassVar[Kinds] = ("unpaired",)
    compares: ClassVar[bool] = True

    name: Literal["bco"] = "bco"
    beta: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Reward model: a scalar on the last token of each answer, from pairs or ranked lists.

    Args:
        name: reward
        alpha: weight of the squared error to absolute scores, where a sample has them (the report's objective)
        score_normalization: none: scores as they are; standard: mean 0 and deviation 1 over the training data;
            range: from -1 to 1
        center_rewards_coefficient: weight of the squared sum of a pair's rewards, which keeps them around 0
        ranked_loss: of ranked lists: plackett_luce or all_pairs; null: plackett_luce for ranked data
    """

    kinds: ClassVar[Kinds] = ("pair", "ranked")
    compares: ClassVar[bool] = False

    name: Literal["reward"] = "reward"
    alpha: float = 0.0
    score_normalization: Literal["none", "standard", "range"] | None = None
    center_rewards_coefficient: float = 0.0
    ranked_loss: Literal["plackett_luce", "all_pairs"] | None = None

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"objective.alpha must not be negative, got {self.alpha}")
        require(
            self.center_rewards_coefficient >= 0,
            f"objective.center_rewards_coefficient must not be negative, got {self.center_rewards_coefficient}",
        )
        require(
            self.score_normalization is None or self.alpha > 0,
            f"objective.score_normalization is of the scores that alpha > 0 reads, got {self.score_normalization} "
            f"with alpha {self.alpha}",
        )


OBJECTIVES: dict[str, type] = {
    kind.name: kind
    for kind in (
        SFTConfig,
        DPOConfig,
        KTOConfig,
        BCOConfig,
        CPOConfig,
        SimPOConfig,
        TPOConfig,
        ORPOConfig,
        RewardConfig,
    )
}
