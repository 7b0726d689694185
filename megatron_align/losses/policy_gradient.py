"""Policy-gradient losses on sampled completions: GRPO and its relatives. Names are TRL's ``loss_type``.

Shapes: N scored tokens of C complete completions, one completion after the other.

A loss is ``sum of weight_N * loss_N``: :class:`PolicyGradient` returns ``loss_N``, not reduced, and
:func:`token_weights` the weights, from normalisers of the step's global batch that the caller gives. So no number
depends on which packs, slabs and ranks hold the completions. Everything else is given: advantages
(losses/advantages.py), log-probs of the policy that sampled (``old``), of the reference, and the weight that corrects a
difference between the trainer and the engine.

In the formulas, ``w`` is the ratio ``policy / old``, of a token or of its completion, and ``A`` the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_align.errors import require
from megatron_align.losses.kl import KL_ESTIMATORS
from megatron_align.losses.segments import per_token, segment_sums

Level = Literal["token", "sequence"]
Aggregation = Literal["completion_mean", "completion_sum", "token_mean", "rollout_token_mean", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """The scored tokens of some complete completions. Floats are ``[N]`` fp32 or fp64; ``policy_N`` has the gradient.

    Args:
        policy_N: log-prob under the policy that is trained, in nats
        advantage_N: of each token; of a completion's, repeated
        length_C: tokens of each completion, int64
        old_N: log-prob under the policy that sampled, from the same forward path; None: this is that policy, every
            ratio is 1
        mask_N: bool: the token counts; None: all do. Truncated answers are masked so
        reference_N: log-prob under the reference; only for a KL term in the loss
        correction_N: weight of each token for the difference between trainer and engine (losses/engine_mismatch.py)
        sampler_N: log-prob of the engine that sampled, for the off-policy mask; None: ``old_N``
    """

    policy_N: Tensor
    advantage_N: Tensor
    length_C: Tensor
    old_N: Tensor | None = None
    mask_N: Tensor | None = None
    reference_N: Tensor | None = None
    correction_N: Tensor | None = None
    sampler_N: Tensor | None = None

    def masked(self, values_N: Tensor) -> Tensor:
        """Return the values with 0 where a token does not count."""
        return values_N if self.mask_N is None else values_N.masked_fill(~self.mask_N, 0.0)

    def counted_C(self) -> Tensor:
        """Return the number of tokens that count in each completion, float."""
        if self.mask_N is None:
            return self.length_C.to(self.policy_N.dtype)
        return segment_sums(self.mask_N.to(self.policy_N.dtype), self.length_C)

    def completion_sums(self, values_N: Tensor) -> Tensor:
        """Sum over the tokens that count of each completion, ``[C]``."""
        return segment_sums(self.masked(values_N), self.length_C)

    def completion_means(self, values_N: Tensor) -> Tensor:
        """Average over the tokens that count of each completion, ``[C]``; 0 where none does."""
        return self.completion_sums(values_N) / self.counted_C().clamp(min=1)

    def spread(self, values_C: Tensor) -> Tensor:
        """Repeat each completion's value for its tokens."""
        return per_token(values_C, self.length_C)


def clipped(
    tokens: PolicyTokens,
    ratio_N: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate: ``-min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)``. arXiv:1707.06347.

    ``epsilon_high`` above ``epsilon`` is DAPO's clip-higher (arXiv:2503.14476). ``delta``, above ``1 + epsilon_high``,
    bounds the ratio of tokens with a negative advantage: dual clip with c = delta (arXiv:1912.09729, 2505.07291).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    advantage_N = tokens.advantage_N
    return -torch.minimum(bounded_N * advantage_N, ratio_N.clamp(1 - epsilon, 1 + high) * advantage_N)


def cispo(
    tokens: PolicyTokens, ratio_N: Tensor, *, epsilon_high: float | None = None, epsilon: float | None = None
) -> Tensor:
    """CISPO: ``-sg(min(w, epsilon_high)) A log policy``: the ratio is cut, no token's gradient is. arXiv:2506.13585.

    ``epsilon_high`` is the bound itself, as in TRL (verl, NeMo-RL: 1 plus it); None: 0.2, TRL's default, which is far
    too small: TRL recommends 5 (arXiv:2510.13786). With ``epsilon`` the ratio is at least ``1 - epsilon`` too (verl,
    NeMo-RL; not in TRL).
    """
    low, high = cispo_bounds(epsilon, epsilon_high)
    return -ratio_N.detach().clamp(low, high) * tokens.advantage_N * tokens.policy_N


def cispo_bounds(epsilon: float | None, epsilon_high: float | None) -> tuple[float, float]:
    """Return the smallest and largest ratio of :func:`cispo`.

    Raises:
        InputError: the largest is not above the smallest.
    """
    low, high = 0.0 if epsilon is None else 1 - epsilon, 0.2 if epsilon_high is None else epsilon_high
    require(
        low < high,
        f"epsilon_high of loss_type cispo, the largest ratio itself, must be above the smallest, 1 - epsilon = "
        f"{low:g}; got {'none, which is 0.2' if epsilon_high is None else epsilon_high}",
    )
    return low, high


def sapo(
    tokens: PolicyTokens,
    ratio_N: Tensor,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tensor:
    """SAPO: ``-A s(tau (w - 1)) 4 / tau``, a smooth gate, tau by the advantage's sign. arXiv:2511.20347."""
    tau_N = _where(tokens.advantage_N > 0, sapo_temperature_pos, sapo_temperature_neg, ratio_N)
    return -torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N * tokens.advantage_N


def vespo(
    tokens: PolicyTokens,
    ratio_N: Tensor,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> Tensor:
    """VESPO: ``-sg(phi) A log policy``, ``phi = exp(lambda + k log W - lambda W)``; W: ratio of the entire answer.

    k and lambda by the advantage's sign. Logs of tokens are clamped to 20, log W to ``[log 1e-8, 20]``, as in TRL. The
    engine's correction is part of W, not a factor on the loss. arXiv:2602.10693.
    """
    with torch.no_grad():
        lowest = math.log(1e-8)
        log_N = log_ratio(tokens).clamp(-20, 20)
        if tokens.correction_N is not None:
            log_N = log_N + tokens.correction_N.log().clamp(lowest, 20)
        log_w_N = tokens.spread(tokens.completion_sums(log_N).clamp(lowest, 20))
        positive_N = tokens.advantage_N >= 0
        k_N = _where(positive_N, vespo_k_pos, vespo_k_neg, ratio_N)
        lambda_N = _where(positive_N, vespo_lambda_pos, vespo_lambda_neg, ratio_N)
        phi_N = torch.exp(lambda_N + k_N * log_w_N - lambda_N * log_w_N.exp())
    return -phi_N * tokens.advantage_N * tokens.policy_N


def _where(condition_N: Tensor, yes: float, no: float, like_N: Tensor) -> Tensor:
    return torch.full_like(like_N, no).masked_fill(condition_N, yes)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss of tokens with the names of its options.

    Args:
        function: ``(tokens, ratio_N, **options) -> [N]``, not reduced
        options: names of the keyword arguments that it takes
        aggregation: how its tokens are weighed, see :func:`token_weights`
        corrects_itself: it reads ``correction_N`` itself, and is not multiplied by it
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...]
    aggregation: Aggregation
    corrects_itself: bool = False


_CLIP = ("epsilon", "epsilon_high", "delta")
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(clipped, _CLIP, "completion_mean"),
    "bnpo": PolicyLoss(clipped, _CLIP, "token_mean"),
    "dr_grpo": PolicyLoss(clipped, _CLIP, "constant"),
    "dapo": PolicyLoss(clipped, _CLIP, "rollout_token_mean"),
    "cispo": PolicyLoss(cispo, ("epsilon_high", "epsilon"), "rollout_token_mean"),
    "sapo": PolicyLoss(sapo, ("sapo_temperature_pos", "sapo_temperature_neg"), "completion_mean"),
    "luspo": PolicyLoss(clipped, _CLIP, "completion_sum"),
    "vespo": PolicyLoss(
        vespo,
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "rollout_token_mean",
        corrects_itself=True,
    ),
}


def log_ratio(tokens: PolicyTokens) -> Tensor:
    """Return ``log policy - log old`` of each token, ``[N]``."""
    old_N = tokens.policy_N.detach() if tokens.old_N is None else tokens.old_N
    # masked before any exp: an unbounded ratio of a token that does not count would make its zero gradient NaN
    return tokens.masked(tokens.policy_N - old_N)


def importance_ratio(
    tokens: PolicyTokens,
    level: Level = "token",
    *,
    sequence_ratio: Literal["mean", "sum"] = "mean",
    log_ratio_bound: float | None = None,
) -> Tensor:
    """Return ``policy / old`` of each token, ``[N]``, with gradient.

    Args:
        tokens: that are scored.
        level: token; sequence: all tokens of a completion get its ratio (GSPO, arXiv:2507.18071).
        sequence_ratio: exp of the mean log-ratio over the completion (GSPO, TRL's GRPOTrainer), or of its sum, the
            ratio of the entire answer (TRL's RLOOTrainer).
        log_ratio_bound: log-ratios are clamped to it on both sides (verl: 20); None: not (TRL).
    """
    log_N = log_ratio(tokens)
    if level == "sequence":
        of_completion = tokens.completion_means if sequence_ratio == "mean" else tokens.completion_sums
        log_N = tokens.spread(of_completion(log_N))
    return (log_N if log_ratio_bound is None else log_N.clamp(-log_ratio_bound, log_ratio_bound)).exp()


def off_policy_mask(tokens: PolicyTokens, threshold: float) -> Tensor:
    """Return which tokens stay, ``[N]`` bool: those with ``A >= 0``, or of answers near the policy that sampled.

    Near: the mean of ``log sampler - log policy`` over the completion is at most ``threshold``. Tokens whose
    sampler's log-prob is NaN (unknown) count as equal. DeepSeek-V3.2, arXiv:2512.02556; TRL:
    ``off_policy_mask_threshold`` (off).
    """
    policy_N = tokens.policy_N.detach()
    old_N = policy_N if tokens.old_N is None else tokens.old_N
    sampler_N = old_N if tokens.sampler_N is None else tokens.sampler_N
    drift_C = tokens.completion_means((sampler_N - policy_N).nan_to_num(nan=0.0))
    return (tokens.advantage_N >= 0) | tokens.spread(drift_C <= threshold)


def entropy_threshold(entropy_S: Tensor, share: float) -> Tensor:
    """Return the entropy that the ``share`` of tokens with the highest entropies reaches, a scalar.

    ``entropy_S``: of all tokens that count in the step, over all ranks. ``torch.quantile`` at ``1 - share``, of any
    number of tokens. arXiv:2506.01939; TRL: ``top_entropy_quantile``, over a micro-batch of all ranks.
    """
    sorted_S = entropy_S.double().sort().values
    place = (1 - share) * (len(sorted_S) - 1)
    below = math.floor(place)
    above = min(below + 1, len(sorted_S) - 1)
    return torch.lerp(sorted_S[below], sorted_S[above], place - below)


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Per token, ``[N]``: the loss, not reduced, with 0 where a token does not count; the rest without gradient."""

    loss_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor  # bool: its gradient is cut off, or for cispo its ratio
    kl_N: Tensor | None  # the KL estimate, before any weight; None: no reference


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """A loss of the family with its options; called on tokens it returns their :class:`PolicyTerms`.

    Args:
        loss_type: a name of ``POLICY_LOSSES``
        options: of that loss, by name; its defaults otherwise
        importance_sampling_level: of the ratio
        sequence_ratio: of the ratio at level sequence, see :func:`importance_ratio`
        log_ratio_bound: see :func:`importance_ratio`; the KL estimate's log-ratio is clamped too
        beta: coefficient of a KL term in the loss
        kl_estimator: of that term
        use_bias_correction_kl: weigh that term by the ratio, with its gradient (DeepSeek-V3.2)
        correct_kl: weigh that term by the engine's correction too (SWIFT; TRL does not)
        off_policy_mask_threshold: see :func:`off_policy_mask`; None: no token is dropped
    """

    loss_type: str = "dapo"
    options: Mapping[str, float] = field(default_factory=dict)
    importance_sampling_level: Level = "token"
    sequence_ratio: Literal["mean", "sum"] = "mean"
    log_ratio_bound: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    correct_kl: bool = False
    off_policy_mask_threshold: float | None = None

    def __call__(self, tokens: PolicyTokens, entropy_kept_N: Tensor | None = None) -> PolicyTerms:
        """Return the terms of each token; ``entropy_kept_N``: bool, tokens whose surrogate stays (KL terms always do).

        As in TRL, the KL term is added after the surrogate was masked and, but for ``correct_kl``, corrected.

        Raises:
            ValueError: a KL term without the reference's log-probs, or ``correct_kl`` without a correction.
        """
        if self.beta > 0 and tokens.reference_N is None:
            raise ValueError(f"beta {self.beta} needs log-probs of the reference, got none")
        if self.correct_kl and tokens.correction_N is None:
            raise ValueError("correct_kl needs the correction of the engine's log-probs, got none")
        loss = POLICY_LOSSES[self.loss_type]
        ratio_N = importance_ratio(
            tokens,
            self.importance_sampling_level,
            sequence_ratio=self.sequence_ratio,
            log_ratio_bound=self.log_ratio_bound,
        )
        loss_N = loss.function(tokens, ratio_N, **self.options)
        if self.off_policy_mask_threshold is not None:
            loss_N = loss_N * off_policy_mask(tokens, self.off_policy_mask_threshold)
        if entropy_kept_N is not None:
            loss_N = loss_N * entropy_kept_N
        if tokens.correction_N is not None and not loss.corrects_itself:
            loss_N = loss_N * tokens.correction_N
        kl_N = None
        if tokens.reference_N is not None:
            log_N = tokens.masked(tokens.policy_N - tokens.reference_N)
            bound = self.log_ratio_bound
            kl_N = KL_ESTIMATORS[self.kl_estimator](log_N if bound is None else log_N.clamp(-bound, bound))
            term_N = self.beta * (kl_N * ratio_N if self.use_bias_correction_kl else kl_N)
            if self.correct_kl and tokens.correction_N is not None:
                term_N = term_N * tokens.correction_N
            loss_N = loss_N + term_N
            kl_N = tokens.masked(kl_N.detach())
        ratio_N = ratio_N.detach()
        return PolicyTerms(tokens.masked(loss_N), ratio_N, self._clipped(tokens, ratio_N), kl_N)

    def _clipped(self, tokens: PolicyTokens, ratio_N: Tensor) -> Tensor:
        """Return where the loss's bound is active, ``[N]`` bool, counted as TRL counts; ``delta`` is no such bound."""
        function, advantage_N = POLICY_LOSSES[self.loss_type].function, tokens.advantage_N
        low, high = -math.inf, math.inf
        if function is cispo:
            low, high = cispo_bounds(self.options.get("epsilon"), self.options.get("epsilon_high"))
        elif function is clipped:
            epsilon = self.options.get("epsilon", 0.2)
            low, high = 1 - epsilon, 1 + self.options.get("epsilon_high", epsilon)
        outside_N = ((ratio_N < low) & (advantage_N < 0)) | ((ratio_N > high) & (advantage_N > 0))
        return outside_N if tokens.mask_N is None else outside_N & tokens.mask_N


def token_weights(
    aggregation: Aggregation,
    tokens: PolicyTokens,
    *,
    completion_weight: float | Tensor,
    token_weight: float | Tensor,
    max_completion_length: int | None = None,
) -> Tensor:
    """Return the weight of each token in the step's loss, ``[N]``.

    Args:
        aggregation: completion_mean: completions weigh the same, and the tokens of each (grpo, sapo);
            completion_sum: completions weigh the same, tokens are summed (luspo); constant: the sum of all tokens by
            completions x ``max_completion_length`` (dr_grpo); token_mean: all tokens of the step weigh the same (bnpo);
            rollout_token_mean: the same, where the step is one of several that train on the same rollouts (dapo, cispo,
            vespo).
        tokens: of completions.
        completion_weight: 1 / completions of the step, over all ranks, masked ones too; or ``[C]``.
        token_weight: 1 / tokens that count in the step, over all ranks; for rollout_token_mean steps of the rollouts /
            tokens of the rollouts; or ``[C]``.
        max_completion_length: of constant.
    """

    def spread(weight: float | Tensor) -> Tensor:
        return tokens.spread(torch.as_tensor(weight, dtype=dtype, device=device).expand(completions))

    dtype, device, completions = tokens.policy_N.dtype, tokens.policy_N.device, len(tokens.length_C)
    if aggregation in ("token_mean", "rollout_token_mean"):
        return spread(token_weight)
    if aggregation == "completion_mean":
        return spread(completion_weight / tokens.counted_C().clamp(min=1))
    if aggregation == "completion_sum":
        return spread(completion_weight)
    if max_completion_length is None:
        raise ValueError("dr_grpo needs max_completion_length, got none")
    return spread(completion_weight) / max_completion_length
