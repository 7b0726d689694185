"""The term on supervised data in steps on rollouts (PTX): its gradient is added to the rollouts' in one update, on
every layout (1e-5); KL to a reference that is the policy is 0 with gradient 0; cross-entropy is that of an SFT run.
"""

import json
import shutil

import pytest

from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.runs import remembered_runs
from tests.harness.tiny import metrics_of, run_arguments, write_chat
from tests.training.test_preference_layout import LAYOUTS

KL = {"coefficient": 0.5, "top_k": 20, "samples": 5}
NLL = {"coefficient": 0.2, "kind": "nll", "samples": 5}
CASES = [(0, "pp2_dp2"), (1, "vpp2")]
SLOW = [(i, layout) for i in range(2) for layout in LAYOUTS if (i, layout) not in CASES]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Prompts with two completions; the scores of the second file are equal, so that rollouts have no gradient."""
    folder = tmp_path_factory.mktemp("data")
    for name, scores in (("ranked", (1.0, 0.0)), ("equal", (0.0, 0.0))):
        lines = []
        for i in range(16):
            contents = [f"{i}: " + "x" * (1 + i % 5), f"{2 * i}?"]
            completions = [
                {"content": [{"role": "assistant", "content": content}], "score": score}
                for content, score in zip(contents, scores, strict=True)
            ]
            prompt = [{"role": "user", "content": f"What is {i} + {i}?"}]
            lines.append(json.dumps({"prompt": prompt, "completions": completions}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    write_chat(folder / "chat.jsonl", samples=12, seed=3)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_models, ranked):
    def of(folder, ptx, data="ranked", **options):
        given = {"objective__ptx": json.dumps({"data": str(ranked / "chat.jsonl"), **ptx})} if ptx else {}
        return run_arguments(
            tiny_models(),
            ranked / f"{data}.jsonl",
            folder,
            **{
                "objective__name": "grpo",
                "rollout__engine": "data",
                "train__global_batch_size": 8,
                "optimizer__lr": 2e-4,
                "optimizer__weight_decay": 0,
                "train__steps": 3,
                **given,
                **options,
            },
        )

    return of


@pytest.fixture(scope="module")
def train(pool, arguments, tmp_path_factory):
    return remembered_runs(pool, tmp_path_factory, arguments)


@pytest.mark.parametrize("kind, layout", mark_slow([*CASES, *SLOW], SLOW))
def test_layouts_agree(kind, layout, train):
    world, options = LAYOUTS[layout]
    ptx = (KL, NLL)[kind]
    for row, want in zip(train(ptx, world, **options), train(ptx), strict=True):
        for name in (
            "loss",
            "ptx_loss",
        ):  # a policy gradient's loss is a difference, at first 0 but for rounding
            assert row[name] == pytest.approx(want[name], rel=1e-5, abs=2e-6), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_a_reference_that_is_the_policy_changes_nothing_at_first(train):
    plain, with_kl = train(None), train(KL)
    assert with_kl[0]["ptx_loss"] == 0.0
    assert with_kl[0]["grad_norm"] == plain[0]["grad_norm"]
    assert with_kl[0]["loss"] == plain[0]["loss"]
    assert "ptx_loss" not in plain[0]
    assert all(row["ptx_loss"] > 0 for row in with_kl[1:])


def test_cross_entropy_alone_is_supervised_training(train, pool, ranked, tiny_models, tmp_path):
    """Rollouts with equal scores have no gradient: what remains is the coefficient times that of an SFT run."""
    rows = train({**NLL, "samples": 12}, data="equal")
    sft = run_arguments(
        tiny_models(), ranked / "chat.jsonl", tmp_path, train__steps=1, train__global_batch_size=12
    )
    pool.run(1, training_ranks.train, sft)
    [want] = metrics_of(tmp_path)
    assert rows[0]["ptx_loss"] == pytest.approx(want["loss"], rel=1e-6)
    assert rows[0]["loss"] == pytest.approx(0.2 * want["loss"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(0.2 * want["grad_norm"], rel=1e-5)


def test_a_resumed_run_has_the_same_samples(train, pool, arguments, tmp_path):
    whole = train(KL)
    for _ in range(2):
        options = {"checkpoint__save_every": 2, "train__steps": 3}
        pool.run(1, training_ranks.train, arguments(tmp_path, KL, **options))
        rows = metrics_of(tmp_path)
        for row, want in zip(rows, whole, strict=True):
            assert (row["loss"], row["ptx_loss"]) == (want["loss"], want["ptx_loss"])
        shutil.rmtree(tmp_path / "step_000003")  # the next start continues from step 2


@pytest.mark.parametrize(
    "ptx, message",
    [
        ({"top_k": 260, "samples": 5}, "objective.ptx.top_k must be at most the vocabulary of 259, got 260"),
        ({"kind": "nll", "top_k": 3}, "objective.ptx.top_k belongs to kind topk_kl; got 3 with kind nll"),
        ({"coefficient": 0}, "objective.ptx.coefficient must be positive, got 0"),
        ({"top_k": 9, "samples": 13}, "samples must be at most the 12 samples of objective.ptx.data, got 13"),
        ({"top_k": 9, "samples": 0}, "objective.ptx.samples must be at least 1, got 0"),
        ({"top_k": 9, "data": "absent.jsonl"}, "absent.jsonl"),
        ({"kind": "ce"}, "objective.ptx.kind"),
    ],
)
def test_what_does_not_fit_is_refused(ptx, message, arguments, tmp_path):
    with pytest.raises(InputError, match=message):
        prepare_run(parse(arguments(tmp_path / "run", ptx)), RankInfo(0, 0, 1), tmp_path / "scratch")
