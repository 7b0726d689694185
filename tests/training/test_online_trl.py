"""Laws 3 and 9: ten steps on given completions are those of TRL's own GRPOTrainer and RLOOTrainer.

Both get the same prompts, completions and rewards; TRL pads, computes each prompt for every completion and runs its
reference at every step. Losses and gradient norms agree to 1e-4 relative (fp32 sums in another order, ten updates).
"""

import json
import random

import pytest

from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import byte_tokenizer, metrics_of, run_arguments

pytest.importorskip("trl", minversion="1.16", reason="the judge is TRL 1.16, which needs Python 3.11")

from tests.harness.trl import BATCH, LENGTH, STEPS, trl_rows

K, LIMIT = 3, 64
LR = 1e-3  # of so few steps that later ones clip
NAMES = {  # TRL's metric -> ours
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio/region_mean": "clip_fraction",
    "frac_reward_zero_std": "groups_without_signal",
    "completions/mean_length": "completion_length",
}
ALWAYS = ("reward", "reward_std", "entropy", "frac_reward_zero_std", "completions/mean_length")


def case(ours, theirs=None, *, kind="GRPO", **ours_of_rollouts):
    """Return a case: our options of the objective, TRL's where they say it otherwise, ours of rollouts."""
    return {"kind": kind, "ours": ours, "theirs": theirs or {}, "rollout": ours_of_rollouts}


REUSED, KL = {"iterations": 2}, {"beta": 0.05}
SEQUENCE = {"importance_sampling_level": "sequence"}
CASES = {
    "dapo": case({}),
    "dapo_kl": case({**KL, "use_bias_correction_kl": True, **REUSED}),
    # At a low temperature: the entropies of a new model are all the vocabulary's but for rounding.
    "entropy": case(
        {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, **KL, "use_bias_correction_kl": True, **REUSED},
        temperature=0.1,
    ),
    "entropy_bonus": case({"loss_type": "grpo", "entropy_coef": 0.05}, temperature=0.8),
    "grpo_batch": case({"loss_type": "grpo", "scale_rewards": "batch"}),
    "rloo": case({"beta": 0.05}, kind="RLOO"),
    **{name: case({"loss_type": name, **REUSED}) for name in ("grpo", "bnpo", "sapo", "luspo", "vespo")},
    "cispo": case({"loss_type": "cispo", "epsilon_high": 5.0, **REUSED}),
    "dr_grpo": case({"loss_type": "dr_grpo", "scale_rewards": "none", **REUSED}),
    "delta": case({"delta": 1.5, "epsilon": 0.1, "epsilon_high": 0.28, **REUSED}),
    "gspo": case({"loss_type": "grpo", **SEQUENCE, **KL, **REUSED}),
    "luspo_sequence": case({"loss_type": "luspo", **SEQUENCE, **REUSED}),
    "kl_unweighted": case({**KL, "use_bias_correction_kl": False, **REUSED}),
    "off_policy_mask": case({"off_policy_mask_threshold": 0.05, **REUSED}),
    "temperature": case({**KL, **REUSED}, temperature=0.8),
    "rloo_reused": case({"beta": 0.05, "normalize_advantages": True, **REUSED}, kind="RLOO"),
    "rloo_plain": case({"beta": 0.0, "reward_clip_range": [-0.5, 0.5], **REUSED}, kind="RLOO"),
}
FAST = ("entropy", "rloo")
TRL_NAMES = {"iterations": "num_iterations"}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Plain text, so that the tokens of both are those of the bytes; four prompts a step, with a reward each answer."""
    draw, file = random.Random(0), tmp_path_factory.mktemp("ranked") / "ranked.jsonl"
    with open(file, "w") as out:
        for i in range(STEPS * BATCH):
            completions = [
                {"content": f" {i + k}" + "x" * draw.randrange(30), "score": draw.uniform(-1, 1)}
                for k in range(K)
            ]
            prompt = f"What is {i} + {'1' * draw.randrange(1, 9)}?"
            out.write(json.dumps({"prompt": prompt, "completions": completions}) + "\n")
    return file


def our_rows(pool, model, data, folder, objective, rewards=None, **rollout):
    arguments = run_arguments(
        model,
        data,
        folder,
        data__sequence_length=LENGTH,
        data__shuffle=False,
        train__steps=STEPS,
        train__global_batch_size=BATCH,
        optimizer__lr=LR,
        **({} if rewards is None else {"rewards": rewards}),
        **{f"objective__{name}": value for name, value in objective.items()},
        **{f"rollout__{name}": value for name, value in {"max_tokens": LIMIT, **rollout}.items()},
    )
    pool.run(1, training_ranks.train, arguments)
    return metrics_of(folder)


def their_rows(kind, model, groups, folder, **options):
    """Return the rows of TRL's trainer, given ``groups`` of (prompt's ids, [(completion's ids, reward)])."""
    answers = [(ids, answer, reward) for ids, of_prompt in groups for answer, reward in of_prompt]
    size, rewards = BATCH * K, []

    def take():
        """Return the next completions, whose rewards are asked for next."""
        taken, answers[:] = answers[:size], answers[size:]
        rewards[:] = [reward for _, _, reward in taken]
        return [ids for ids, _, _ in taken], [answer for _, answer, _ in taken]

    def rollout_func(prompts, trainer):
        prompt_ids, completion_ids = take()
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    given = {"reward_funcs": [lambda completions, **columns: list(rewards)]}
    methods = {}
    if kind == "GRPO":
        given["rollout_func"] = rollout_func
    else:  # it has no rollout_func
        methods = {
            "_tokenize_prompts": lambda self, prompts: ([ids for ids, _, _ in answers[:size]], None, {}),
            "_generate_single_turn": lambda self, *_: take()[1],
        }
    records = [{"prompt": byte_tokenizer().decode(ids)} for ids, _ in groups]
    return trl_rows(
        "trl",
        kind,
        model,
        records,
        folder,
        given=given,
        methods=methods,
        learning_rate=LR,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=K,
        max_completion_length=LIMIT,
        **{TRL_NAMES.get(name, name): value for name, value in options.items()},
    )


def assert_same(ours, theirs, names):
    assert len(ours) == len(theirs) == STEPS
    # The loss of the policy itself is 0 where advantages are centred: compared absolutely there.
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4, abs=2e-6)
    norms = [row["grad_norm"] for row in theirs]
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 1e-2
    for name, own in names.items():
        rows = [(row[own], theirs[name]) for row, theirs in zip(ours, theirs, strict=True) if name in theirs]
        assert rows or name not in ALWAYS, name  # TRL gives those of rollouts in the first of their steps
        assert [a for a, _ in rows] == pytest.approx([b for _, b in rows], rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize("name", mark_slow(CASES, [name for name in CASES if name not in FAST]))
def test_ten_steps_on_given_completions(name, pool, tiny_models, ranked, tmp_path):
    chosen = CASES[name]
    objective = {"name": chosen["kind"].lower(), **chosen["ours"]}
    ours = our_rows(
        pool, tiny_models(), ranked, tmp_path / "ours", objective, engine="data", **chosen["rollout"]
    )
    ids = lambda text: byte_tokenizer()(text).input_ids  # noqa: E731
    end = byte_tokenizer().eos_token_id
    groups = [
        (ids(record["prompt"]), [([*ids(a["content"]), end], a["score"]) for a in record["completions"]])
        for record in map(json.loads, ranked.read_text().splitlines())
    ]
    theirs = their_rows(
        chosen["kind"],
        tiny_models(),
        groups,
        tmp_path / "trl",
        **{**chosen["ours"], **chosen["theirs"], **chosen["rollout"]},
    )
    names = dict(NAMES)
    if chosen["ours"].get("importance_sampling_level") == "sequence" or chosen["kind"] == "RLOO":
        del names["clip_ratio/region_mean"]  # TRL's is of completions, ours of tokens
    assert_same(ours, theirs, names)
    if "iterations" in chosen["ours"]:
        assert max(row["ratio_max"] for row in ours) > 1.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_ten_steps_on_our_own_rollouts(kind, pool, tiny_models, tmp_path):
    """Completions that the policy samples, most of them cut off: these are out of the loss, in TRL as here."""
    from pyarrow import parquet

    data, folder = tmp_path / "prompts.jsonl", tmp_path / "ours"
    data.write_text("\n".join(json.dumps({"prompt": f"What is {i} + 1?"}) for i in range(STEPS * BATCH)))
    options = {"mask_truncated_completions": True} if kind == "GRPO" else {"beta": 0.05}
    ours = our_rows(
        pool,
        tiny_models(),
        data,
        folder,
        {"name": kind.lower(), **options},
        rewards='[{kind: regex, pattern: "[a-e]"}, {kind: length, min: 40, weight: 0.3}]',
        correction="null",
        temperature=0.9,
    )
    groups = []
    for file in sorted((folder / "rollouts").glob("*/*.parquet")):
        columns = parquet.read_table(file).to_pydict()
        answers = list(zip(columns["token_ids"], columns["reward"], strict=True))
        prompts = columns["prompt_token_ids"][::K]
        groups += [(ids, answers[i * K : (i + 1) * K]) for i, ids in enumerate(prompts)]
    theirs = their_rows(kind, tiny_models(), groups, tmp_path / "trl", temperature=0.9, **options)
    names = {"completions/clipped_ratio": "truncated", "completions/mean_length": "completion_length"}
    assert_same(ours, theirs, names)
    assert min(row["truncated"] for row in ours) < 1
