"""Law 3 for preferences: ten steps have the losses, margins and accuracies of TRL's trainers, for every loss type.

Same data, model, order and schedule. TRL pads, computes prompts twice and runs its reference at every step; we pack,
share prompts and read the reference's log-probs from a column. Losses agree to 1e-4 relative (fp32 sums in another
order, ten updates long), rewards to 1e-4 absolute.
"""

import json

import pytest
import torch

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments, write_labelled, write_pairs
from tests.harness.trl import BATCH, LENGTH, LR, STEPS, trl_rows

# Ours under objective.*, TRL's configuration if it says it otherwise.
SMOOTH = {"label_smoothing": 0.1}
DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": SMOOTH,
    "nca_pair": {},
    "robust": SMOOTH,
    "bco_pair": {},
    "sppo_hard": {},
    "aot": SMOOTH,
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
DPO_OPTIONS = {
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
CPO = {"sigmoid": {}, "hinge": {}, "ipo": {}, "simpo": {"cpo_alpha": 0.5}, "alphapo": {"alpha": 0.1}}
TPO = {"sigmoid": {"beta": 0.1}, "hinge": {}, "ipo": {}, "tpo-l": {"tpo_alpha": 0.5, "tpo_l_gamma": 0.3}}
NAMES = {  # TRL's metric -> ours
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
}


def quick_first(names, *quick):
    """Mark all but the quick ones as slow: every loss type is held against TRL's code in tests/losses as well."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", samples=STEPS * BATCH)


@pytest.fixture(scope="module")
def text_pairs(tmp_path_factory):
    """Plain text: TRL's experimental trainers put a second end token after a chat template's own."""
    return write_pairs(tmp_path_factory.mktemp("text") / "pairs.jsonl", samples=STEPS * BATCH, text=True)


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    gold = {"reference": lambda draw: [{"role": "assistant", "content": f"It is {draw.randrange(10**6)}."}]}
    file = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    return write_pairs(file, samples=STEPS * BATCH, **gold)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled") / "labelled.jsonl", samples=STEPS * BATCH)


def our_rows(pool, model, data, folder, **options):
    arguments = run_arguments(
        model,
        data,
        folder,
        data__sequence_length=LENGTH,
        data__shuffle=False,
        train__steps=STEPS,
        train__global_batch_size=BATCH,
        optimizer__lr=LR,
        **{f"objective__{name}": value for name, value in options.items()},
    )
    pool.run(1, training_ranks.train, arguments)
    return metrics_of(folder)


def records_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same(ours, theirs, names=NAMES):
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4, abs=1e-6)
    for name, own in names.items():
        assert [row[own] for row in ours] == pytest.approx([row[name] for row in theirs], abs=1e-4), name
    moved = [row["loss"] for row in ours]
    assert max(moved) - min(moved) > 1e-3  # ten equal losses of a model that stands still prove nothing


@pytest.mark.parametrize("name", quick_first([*DPO, *DPO_OPTIONS], "sigmoid", "aot", "wpo", "ld", "mpo"))
def test_dpo(name, pool, tiny_models, pairs, tmp_path):
    options = {"loss_type": name, **DPO[name]} if name in DPO else DPO_OPTIONS[name]
    ours = our_rows(pool, tiny_models(), pairs, tmp_path / "ours", name="dpo", **options)
    theirs = trl_rows("trl", "DPO", tiny_models(), records_of(pairs), tmp_path / "trl", **options)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", quick_first(CPO, "sigmoid"))
def test_cpo(name, pool, tiny_models, text_pairs, tmp_path):
    options = {"loss_type": name, **CPO[name]}
    ours = our_rows(pool, tiny_models(), text_pairs, tmp_path / "ours", name="cpo", **options)
    theirs = trl_rows(
        "trl.experimental.cpo", "CPO", tiny_models(), records_of(text_pairs), tmp_path / "trl", **options
    )
    # TRL's rewards with alpha are of another scale; the loss is what both share.
    assert_same(ours, theirs, NAMES if "alpha" not in options else {})


def test_simpo_is_trls_cpo_without_likelihood(pool, tiny_models, text_pairs, tmp_path):
    ours = our_rows(pool, tiny_models(), text_pairs, tmp_path / "ours", name="simpo", beta=2.0)
    theirs = trl_rows(
        "trl.experimental.cpo",
        "CPO",
        tiny_models(),
        records_of(text_pairs),
        tmp_path / "trl",
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", quick_first(TPO, "tpo-l"))
def test_tpo(name, pool, tiny_models, triples, tmp_path):
    options = {"loss_type": name, **TPO[name]}
    ours = our_rows(pool, tiny_models(), triples, tmp_path / "ours", name="tpo", **options)
    theirs = trl_rows(
        "trl.experimental.tpo", "TPO", tiny_models(), records_of(triples), tmp_path / "trl", **options
    )
    assert_same(ours, theirs)


def test_orpo(pool, tiny_models, text_pairs, tmp_path):
    ours = our_rows(pool, tiny_models(), text_pairs, tmp_path / "ours", name="orpo")
    theirs = trl_rows(
        "trl.experimental.orpo", "ORPO", tiny_models(), records_of(text_pairs), tmp_path / "trl"
    )
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_models):
    """The tiny model with a drawn reward head, as a Hugging Face folder of its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_models(), num_labels=1, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_models())
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", quick_first(["plain", "centred", "margin"], "centred", "margin"))
def test_reward(name, pool, reward_model, tmp_path):
    extra = {"margin": lambda draw: draw.uniform(0.1, 2.0)} if name == "margin" else {}
    pairs = write_pairs(tmp_path / "pairs.jsonl", samples=STEPS * BATCH, **extra)
    options = {"center_rewards_coefficient": 0.1} if name == "centred" else {}
    ours = our_rows(pool, reward_model, pairs, tmp_path / "ours", name="reward", **options)
    theirs = trl_rows("trl", "Reward", reward_model, records_of(pairs), tmp_path / "trl", **options)
    assert_same(ours, theirs, {"accuracy": "accuracy", "margin": "reward_margin"})
    assert sum(ours[0]["reward_histogram"]["counts"]) == 2 * BATCH


@pytest.mark.parametrize("name", quick_first(["kto", "apo_zero_unpaired"], "kto"))
def test_kto(name, pool, tiny_models, labelled, tmp_path):
    options = {"loss_type": name, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    ours = our_rows(pool, tiny_models(), labelled, tmp_path / "ours", name="kto", **options)
    theirs = trl_rows("trl", "KTO", tiny_models(), records_of(labelled), tmp_path / "trl", **options)
    names = {"kl": "baseline"} if name == "kto" else {}
    assert_same(ours, theirs, names)
    if name == "kto":
        assert max(row["baseline"] for row in ours) > 0.1  # a baseline that stays 0 is no test of it
