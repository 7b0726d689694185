"""Law 1 for preferences: loss, gradient norm and metrics of three steps are the same on every layout (1e-5, fp32).

A layout here includes shared or repeated prompts, packing, and the mode of the reference.
"""

import json
import math

import pytest

from tests.harness.marks import mark_slow
from tests.harness.runs import remembered_runs
from tests.harness.tiny import run_arguments, write_labelled, write_pairs

ULYSSES, ALLGATHER = ({"parallel__context_kind": kind} for kind in ("ulysses", "allgather"))
LAYOUTS = {
    "tp2_sp": (2, {"parallel__tensor": 2}),
    "tp2": (2, {"parallel__tensor": 2, "parallel__sequence": False}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "pp2_dp2": (4, {"parallel__pipeline": 2}),
    "unpacked": (1, {"data__packing": False}),
    "repeated_prompts": (1, {"data__share_prefix": False}),
    "repeated_prompts_tp2_dp2": (4, {"parallel__tensor": 2, "data__share_prefix": False}),
    "recompute": (1, {"train__recompute_layers": 2}),
    "ulysses2": (2, {**ULYSSES, "parallel__context": 2}),
    "allgather2": (2, {**ALLGATHER, "parallel__context": 2}),
    "ulysses4": (4, {**ULYSSES, "parallel__context": 4}),
    "allgather4": (4, {**ALLGATHER, "parallel__context": 4}),
    "ulysses2_tp2": (4, {**ULYSSES, "parallel__context": 2, "parallel__tensor": 2}),
    "allgather2_pp2": (4, {**ALLGATHER, "parallel__context": 2, "parallel__pipeline": 2}),
    "unpacked_allgather2": (2, {**ALLGATHER, "parallel__context": 2, "data__packing": False}),
    "repeated_prompts_ulysses2_dp2": (4, {**ULYSSES, "parallel__context": 2, "data__share_prefix": False}),
    "repeated_prompts_allgather2": (2, {**ALLGATHER, "parallel__context": 2, "data__share_prefix": False}),
}
LIVE = {
    "live": (1, {"reference__mode": "live"}),
    "live_tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "reference__mode": "live"}),
    "live_ulysses2_pp2": (
        4,
        {**ULYSSES, "parallel__context": 2, "parallel__pipeline": 2, "reference__mode": "live"},
    ),
    "live_allgather2": (2, {**ALLGATHER, "parallel__context": 2, "reference__mode": "live"}),
}
STEPS = 3  # at the second the optimizer's moments are no longer 0
FEW = ("tp2_pp2", "pp2_dp2", "repeated_prompts_tp2_dp2")
# Over context-parallel ranks: each objective on one of the first two always, on all of them where slow tests run.
SPREAD = (
    "ulysses2",
    "allgather4",
    "allgather2",
    "ulysses4",
    "ulysses2_tp2",
    "allgather2_pp2",
    "repeated_prompts_ulysses2_dp2",
)
OBJECTIVES = {
    "dpo": {"name": "dpo"},
    "aot": {"name": "dpo", "loss_type": "aot"},
    "mixed": {"name": "dpo", "loss_type": ["ipo", "sft"], "loss_weights": [0.5, 1.0], "ld_alpha": 0.5},
    "wpo": {"name": "dpo", "use_weighting": True},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo"},
    "kto": {"name": "kto"},
    "bco": {"name": "bco"},
    "reward": {"name": "reward", "alpha": 0.1, "score_normalization": "standard"},
    "ranked": {"name": "reward", "ranked_loss": "plackett_luce"},
    "all_pairs": {"name": "reward", "ranked_loss": "all_pairs"},
    "tpo": {"name": "tpo"},
}
# The other objectives each on one mix or one spread, in turn; DPO on what these leave, so that all together cover each
# pair of two kinds of ranks. The rest is among the slow tests.
DPO = ("vpp2", "unpacked", "ulysses2_tp2", "allgather2_pp2", "repeated_prompts_ulysses2_dp2", "live_tp2_pp2")
CASES = [("dpo", layout) for layout in DPO]
for i, objective in enumerate(OBJECTIVES):
    if objective != "dpo":
        CASES.append((objective, (*FEW, *SPREAD)[i % (len(FEW) + 2)]))
CASES += [("kto", "live_allgather2"), ("reward", "tp2_sp")]
SLOW = [
    (objective, layout)
    for objective in OBJECTIVES
    for layout in ([*LAYOUTS, *LIVE] if objective == "dpo" else (*FEW, *SPREAD))
    if (objective, layout) not in CASES
]
SLOW += [("reward", "tp2"), ("aot", "live"), ("kto", "live_tp2_pp2")]


def write_ranked(file, pairs):
    """Turn pairs into ranked lists of two and three."""
    lines = []
    for i, line in enumerate(pairs.read_text().splitlines()):
        record = json.loads(line)
        contents = [record["chosen"], record["rejected"], [{"role": "assistant", "content": f"no idea {i}"}]]
        scored = [{"content": c, "score": float(-n)} for n, c in enumerate(contents[: 2 + i % 2])]
        lines.append(json.dumps({"prompt": record["prompt"], "completions": scored}) + "\n")
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    # Some pairs have absolute scores, some have none: the report's alpha counts for the first only.
    pairs = write_pairs(
        folder / "pairs.jsonl",
        chosen_score=lambda draw: draw.choice([None, draw.uniform(3, 5)]),
        rejected_score=lambda draw: draw.choice([None, draw.uniform(0, 3)]),
    )
    labelled = write_labelled(folder / "labelled.jsonl")
    ranked = write_ranked(folder / "ranked.jsonl", pairs)
    gold = {"reference": lambda draw: [{"role": "assistant", "content": f"It is {draw.randrange(10**6)}."}]}
    return {
        "kto": labelled,
        "bco": labelled,
        "ranked": ranked,
        "all_pairs": ranked,
        "tpo": write_pairs(folder / "triples.jsonl", **gold),
        None: pairs,
    }


@pytest.fixture(scope="module")
def train(pool, tiny_models, data, tmp_path_factory):
    def arguments(folder, objective, **options):
        given = {f"objective__{name}": value for name, value in OBJECTIVES[objective].items()}
        return run_arguments(
            tiny_models(),
            data.get(objective, data[None]),
            folder,
            train__global_batch_size=8,
            train__steps=STEPS,
            # At the harness's 1e-3 this run diverges: by step 4 its gradient norm has grown from 0.6 to 12, and
            # rounding from 1e-7 to 1e-5, on one rank with other packs too.
            **({"optimizer__lr": 2e-4} if objective == "ranked" else {}),
            **given,
            **options,
        )

    return remembered_runs(pool, tmp_path_factory, arguments)


@pytest.mark.parametrize("objective, layout", mark_slow([*CASES, *SLOW], SLOW))
def test_layouts_agree(objective, layout, train):
    world, options = {**LAYOUTS, **LIVE}[layout]
    rows = train(objective, world, **options)
    assert len(rows) == STEPS
    for row, want in zip(rows, train(objective), strict=True):
        for key, value in want.items():
            if isinstance(value, float) and key not in ("padding", "tokens_per_second", "step_seconds"):
                # Rewards are differences of log-probs of about 100: rounding of 1e-5 is absolute there.
                assert row[key] == pytest.approx(value, rel=1e-5, abs=3e-5), (row["step"], key)
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_repeating_prompts_costs_what_sharing_saves(train):
    for shared, repeated in zip(train("dpo"), train("dpo", data__share_prefix=False), strict=True):
        assert shared["tokens_saved"] > 0
        assert shared["tokens"] + shared["tokens_saved"] == repeated["tokens"]
        assert repeated["tokens_saved"] == 0


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_the_first_step_knows_no_difference(mode, train):
    """Law 8: the policy is its reference, bit by bit, so margins are 0 and the loss is ln 2."""
    first = train("dpo", **({"reference__mode": mode} if mode == "live" else {}))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["reward_margin"] == first["chosen_reward"] == first["rejected_reward"] == 0.0


def test_without_a_reference_the_rewards_are_log_probs(train):
    row = train("dpo", reference__mode="none")[0]
    assert row["chosen_reward"] == pytest.approx(0.1 * row["chosen_logps"], rel=1e-6)
    assert row["rejected_reward"] == pytest.approx(0.1 * row["rejected_logps"], rel=1e-6)
