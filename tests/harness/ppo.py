"""A judge of PPO, which TRL no longer has: transformers' models in float64, one completion at a time, torch's AdamW.

Written from the formulas of Schulman et al. 2016 (GAE) and 2017 (PPO) and of Ziegler et al. 2019 (the KL of each token
in the reward); it imports none of our modules.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@dataclass
class Settings:
    """What both runs have in common."""

    beta: float = 0.05
    gamma: float = 1.0
    gae_lambda: float = 0.95
    epsilon: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    iterations: int = 1
    minibatches: int = 1
    batch: int = 3  # prompts of a step
    steps: int = 10
    lr: float = 1e-3
    critic_lr: float = 2e-3
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass
class Rollout:
    """A completion: token ids of prompt and answer, and its score; then numbers of each of its tokens."""

    prompt: list
    answer: list
    score: float
    numbers: dict = field(default_factory=dict)


def ten_steps(policy_folder, critic_folder, groups, settings, adapter=None):
    """Return the rows of all steps, the rollouts of each set, and both models after the last step.

    ``groups``: ``[(prompt ids, [(answer ids, score), ...]), ...]`` in the order in which prompts are trained on.
    ``adapter``: PEFT folder that is trained in place of the policy's weights; the reference is the policy without it.
    """
    load = {"dtype": torch.float64}
    policy = AutoModelForCausalLM.from_pretrained(policy_folder, **load)
    if adapter is not None:
        from peft import PeftModel

        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=True).double()
    reference = AutoModelForCausalLM.from_pretrained(policy_folder, **load)
    critic = AutoModelForSequenceClassification.from_pretrained(critic_folder, **load)
    optimizers = [
        (policy, adam(policy, settings.lr, settings)),
        (critic, adam(critic, settings.critic_lr, settings)),
    ]
    rows, sets = [], []
    prompts = settings.batch * settings.minibatches
    while len(rows) < settings.steps:
        first = len(sets) * prompts
        parts = [
            [
                Rollout(prompt, answer, score)
                for prompt, answers in groups[first + part * settings.batch :][: settings.batch]
                for answer, score in answers
            ]
            for part in range(settings.minibatches)
        ]
        every = [rollout for part in parts for rollout in part]
        with torch.no_grad():
            for rollout in every:
                prepare(rollout, policy, reference, critic, settings)
        advantages = torch.cat([rollout.numbers["advantages"] for rollout in every])
        for rollout in every:
            rollout.numbers["advantages"] = (rollout.numbers["advantages"] - advantages.mean()) / (
                advantages.std() + 1e-4
            )
        sets.append(every)
        for _ in range(settings.iterations):
            for part in parts:
                if len(rows) < settings.steps:
                    rows.append(step(part, optimizers, settings))
    return rows, sets, policy, critic


def prepare(rollout, policy, reference, critic, settings):
    """Compute log-probs, values, advantages and returns of a completion's tokens, one after the other."""
    old, fixed = logprobs(policy, rollout), logprobs(reference, rollout)
    value = values(critic, rollout)
    reward = -settings.beta * (old - fixed)
    reward[-1] += rollout.score
    advantage, following, running = torch.zeros_like(value), 0.0, 0.0
    for t in reversed(range(len(value))):
        error = reward[t] + settings.gamma * following - value[t]
        running = error + settings.gamma * settings.gae_lambda * running
        advantage[t], following = running, value[t]
    rollout.numbers = {"old": old, "values": value, "advantages": advantage, "returns": advantage + value}


def step(rollouts, optimizers, settings):
    """Make one update of both models; return the row."""
    (policy, adam_of_policy), (critic, adam_of_critic) = optimizers
    joined = {
        name: torch.cat([rollout.numbers[name] for rollout in rollouts]) for name in rollouts[0].numbers
    }
    ratio = (torch.cat([logprobs(policy, rollout) for rollout in rollouts]) - joined["old"]).exp()
    clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    loss = -torch.minimum(ratio * joined["advantages"], clipped * joined["advantages"]).mean()
    value = torch.cat([values(critic, rollout) for rollout in rollouts])
    error = (value - joined["returns"]).square()
    clip_fraction = 0.0
    if settings.cliprange_value is not None:
        near = value.clamp(
            joined["values"] - settings.cliprange_value, joined["values"] + settings.cliprange_value
        )
        other = (near - joined["returns"]).square()
        clip_fraction = (other > error).double().mean().item()
        error = torch.maximum(error, other)
    value_loss = error.mean() / 2
    row = {
        "loss": loss.item(),
        "ratio_max": ratio.max().item(),
        "value_loss": value_loss.item(),
        "value_mean": value.mean().item(),
        "returns": joined["returns"].mean().item(),
        "value_clip_fraction": clip_fraction,
        "explained_variance": (
            1 - (joined["returns"] - value).var(unbiased=False) / joined["returns"].var(unbiased=False)
        ).item(),
    }
    row["grad_norm"] = update(policy, adam_of_policy, loss, settings)
    row["critic_grad_norm"] = update(critic, adam_of_critic, settings.vf_coef * value_loss, settings)
    return row


def update(model, optimizer, loss, settings):
    """Return the norm of the gradients before they are clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    optimizer.step()
    return norm.item()


def adam(model, lr, settings):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def logprobs(model, rollout):
    """Return the log-prob of each token of the answer."""
    ids = torch.tensor([[*rollout.prompt, *rollout.answer]])
    logits = model(ids).logits[0, len(rollout.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.answer)[:, None])[:, 0]


def values(model, rollout):
    """Return the value before each token of the answer: at the position that predicts it."""
    ids = torch.tensor([[*rollout.prompt, *rollout.answer]])
    hidden = model.model(ids).last_hidden_state[0, len(rollout.prompt) - 1 : -1]
    return model.score(hidden)[:, 0]
