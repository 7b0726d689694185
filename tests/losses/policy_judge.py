"""A step of TRL's own GRPOTrainer and RLOOTrainer on a bigram table, and the same completions as our flat tokens.

TRL generates nothing here: completions and rewards are given, everything after that is its code, in float64.
"""

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from types import SimpleNamespace

import torch
import trl

from megatron_align.losses.policy_gradient import PolicyTokens
from tests.objectives.trl_judge import VOCAB, Bigram, bare

EOS, PAD = VOCAB - 1, 0
GROUPS, K = 3, 3
NONE = float("nan")  # a completion that no reward function scores
REWARDS = [1.0, 0.0, 0.5, 0.25, 0.25, -2.0, 3.0, 1.0, 0.0]
PROMPTS = [[3, 5], [1], [7, 2, 4]]


def completions() -> list[list[int]]:
    """Draw nine completions of 2 to 8 tokens, of three groups; some end with EOS, the others are truncated."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 9, (GROUPS * K,), generator=generator).tolist()
    drawn = [torch.randint(1, EOS, (length,), generator=generator).tolist() for length in lengths]
    return [[*ids[:-1], EOS] if i % 3 != 1 else ids for i, ids in enumerate(drawn)]


COMPLETIONS = completions()


@dataclass
class Judged:
    """What TRL computed: its loss, with the gradient of the policy's table, and the rollout with its advantages."""

    loss: torch.Tensor
    gradient_VV: torch.Tensor
    rollout: dict


def defaults(config: type) -> dict:
    """Return the defaults of a TRL configuration without building one."""
    values = {}
    for field in fields(config):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        values[field.name] = None if made is MISSING else made
    return values


def judge(trainer_class: type, policies, *, rewards=REWARDS, samples=None, **options) -> Judged:
    """Return a step of a TRL trainer.

    Args:
        trainer_class: GRPOTrainer or RLOOTrainer.
        policies: the one that sampled, the one that is trained, the reference.
        rewards: of each completion; NaN: no function scored it.
        samples: log-probs of an engine, ``[[...], ...]``; None: there is none.
        options: of its configuration; the others have TRL's defaults.
    """
    config = trl.GRPOConfig if trainer_class is trl.GRPOTrainer else trl.RLOOConfig
    given = defaults(config) | {
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
    }
    given |= {"per_device_train_batch_size": GROUPS * K, "num_generations": K, **options}
    args = SimpleNamespace(**given)
    old, policy, reference = policies
    trainer = bare(trainer_class, **vars(args))
    vars(trainer).update(
        args=args,
        model=old,
        ref_model=reference,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        current_gradient_accumulation_steps=1,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["given"],
        reward_funcs=[None],
        environment_factories=None,
        environments=None,
        tools=None,
        tool_mask=None,
        _entropy_bonus_enabled=False,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        pad_to_multiple_of=None,
        log_multimodal=False,
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    vars(trainer.accelerator).update(
        num_processes=1,
        process_index=0,
        is_main_process=True,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, **_: x,
        autocast=nullcontext,
    )
    prompts = [ids for ids in PROMPTS for _ in range(K)]
    text = [""] * len(prompts)
    more = (None, text, samples, {}, None, []) if trainer_class is trl.GRPOTrainer else (text,)
    trainer._generate = lambda _: (prompts, COMPLETIONS, *more)
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards, dtype=torch.float64)[:, None]
    torch.set_default_dtype(torch.float64)  # some of TRL's constants become tensors of the default dtype
    try:
        rollout = trainer._generate_and_score_completions([{"prompt": one} for one in text])
        trainer.model = policy
        loss = trainer._compute_loss(policy, rollout)
    finally:
        torch.set_default_dtype(torch.float32)
    return Judged(loss, torch.autograd.grad(loss, policy.table_VV)[0], rollout)


LENGTH_C = torch.tensor([len(ids) for ids in COMPLETIONS])
SIZE_G = torch.full((GROUPS,), K)


def flat(padded) -> torch.Tensor:
    """Return the tokens' values of TRL's padded ``[C, L]``, or of ``[C, 1]`` repeated, as ``[N]``."""
    rows = [row[: len(ids)].expand(len(ids)) for row, ids in zip(padded, COMPLETIONS, strict=True)]
    return torch.cat(rows)


def logprobs(model: Bigram) -> torch.Tensor:
    """Return the log-prob of each completion token, ``[N]``."""
    before, targets = [], []
    for prompt, ids in zip([p for p in PROMPTS for _ in range(K)], COMPLETIONS, strict=True):
        before += [prompt[-1], *ids[:-1]]
        targets += ids
    logprobs_NV = model.table_VV[torch.tensor(before)].log_softmax(-1)
    return logprobs_NV.gather(1, torch.tensor(targets)[:, None])[:, 0]


def tokens(policies, advantage_N, *, beta=0.0, **more) -> PolicyTokens:
    """Return our tokens under the policies, as :func:`judge` has them."""
    old, policy, reference = policies
    return PolicyTokens(
        policy_N=logprobs(policy),
        advantage_N=advantage_N,
        length_C=LENGTH_C,
        old_N=logprobs(old).detach(),
        reference_N=logprobs(reference).detach() if beta else None,
        **more,
    )
