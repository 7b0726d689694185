"""A step whose numbers are not finite moves no bit of the run; its samples are named; outliers are counted.

The same on every rank, in any layout, and across a resume.
"""

import json
import math
import random
import re
import shutil

import pytest

from megatron_align.errors import TrainingFault
from megatron_align.monitoring.health import MAX_CONSECUTIVE_NONFINITE, MIN_HISTORY, WINDOW, Health
from tests.harness import sick
from tests.harness.tiny import metrics_of, run_arguments, write_labelled

NAN, FINE = math.nan, (1.0, 1.0)
SICK = 14  # with 12 samples a step in file order: of step 2


def history(health, steps=WINDOW, seed=0):
    """Feed a noisy curve that falls from 3 to 2, with gradient norms of 1 or so."""
    draw = random.Random(seed)
    return [
        health.record(2 + 1 / (1 + 0.1 * step) + draw.gauss(0, 0.05), math.exp(draw.gauss(0, 0.3)))
        for step in range(steps)
    ]


def test_a_noisy_curve_is_healthy():
    health = Health("stop")
    assert not any(history(health, 500))
    assert health.counts == {"skipped_steps": 0, "loss_spikes": 0, "grad_norm_outliers": 0}


def test_outliers_are_counted_each_and_do_not_become_normal():
    health = Health("stop")
    history(health)
    for _ in range(WINDOW):
        [problem] = health.record(4.0, 1.0)
        assert problem.startswith("loss 4 is far above the 2.")
    [problem] = health.record(2.1, 100.0)
    assert problem.startswith("grad_norm 100 is far above")
    assert health.counts == {"skipped_steps": 0, "loss_spikes": WINDOW, "grad_norm_outliers": 1}


def test_nothing_is_an_outlier_of_too_few_steps():
    health = Health("stop")
    assert [health.record(1.0, 1.0) for _ in range(MIN_HISTORY - 1)] == [[]] * (MIN_HISTORY - 1)
    assert health.record(99.0, 1.0) == []
    assert health.record(99.0, 1.0)  # the one before made them enough


def test_a_curve_without_noise_may_move_a_little():
    health = Health("stop")
    for _ in range(WINDOW):
        health.record(1.0, 1.0)
    assert health.record(1.04, 1.0) == []
    assert health.record(1.06, 1.0)


@pytest.mark.parametrize("numbers", [(NAN, 1.0), (math.inf, 1.0), (1.0, NAN), (1.0, -math.inf)])
def test_what_is_not_finite_stops_or_is_skipped(numbers):
    for policy, skipped in (("stop", 0), ("skip", 1)):
        health = Health(policy)
        problems = health.record(*numbers)
        assert health.counts["skipped_steps"] == skipped
        if policy == "skip":
            health.require_can_continue(7, problems, "sample 3")
            continue
        with pytest.raises(TrainingFault, match="at step 7: loss .*; sample 3. Weights and optimizer are as"):
            health.require_can_continue(7, problems, "sample 3")


def test_skipping_for_ever_is_no_training():
    health = Health("skip")
    for _ in range(MAX_CONSECUTIVE_NONFINITE - 1):
        health.require_can_continue(1, health.record(NAN, NAN), "")
    health.require_can_continue(1, health.record(*FINE), "")  # which starts the count again
    for _ in range(MAX_CONSECUTIVE_NONFINITE - 1):
        health.require_can_continue(1, health.record(NAN, NAN), "")
    with pytest.raises(TrainingFault, match="10 consecutive non-finite steps, stopping at step 30"):
        health.require_can_continue(30, health.record(NAN, NAN), "sample 1")


def test_a_loaded_state_judges_as_the_saved_one():
    one, other = Health("skip"), Health("skip")
    history(one, 100)
    one.record(NAN, NAN)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert [other.record(*x) for x in ((2.2, 9.0), (NAN, 1.0))] == [
        one.record(*x) for x in ((2.2, 9.0), (NAN, 1.0))
    ]
    assert other.counts == one.counts


@pytest.fixture
def arguments(tiny_models, tmp_path):
    """``arguments(folder, **options)`` of a run whose step 2 meets the sick sample, without shuffling."""
    data = sick.write_sick_chat(tmp_path / "sick.jsonl", SICK)

    def make(folder, **options):
        settings = {"train__on_nonfinite": "skip", "data__shuffle": False, "train__steps": 4, **options}
        return run_arguments(
            settings.pop("model", tiny_models("qwen2_untied")), settings.pop("data", data), folder, **settings
        )

    return make


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"parallel__tensor": 2, "train__precision": "bf16"}),
    "pp2_dp2": (4, {"parallel__pipeline": 2}),
}


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_skipped_step_moves_nothing_and_names_the_sample(pool, arguments, tmp_path, world, layout):
    seen = pool.run(world, sick.train_watched, arguments(tmp_path / "run", **layout))
    assert seen == [[(True, True), (False, False), (True, True), (True, True)]] * world
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row.get("suspects") for row in rows] == [None, [SICK], None, None]
    assert rows[1]["loss"] is None
    assert all(math.isfinite(rows[step]["loss"]) for step in (0, 2, 3))


def test_stopping_says_what_and_where(pool, arguments, tmp_path):
    options = arguments(tmp_path / "run", train__on_nonfinite="stop")
    [said] = pool.run(1, sick.train_to_the_fault, options)
    assert re.search(rf"at step 2: loss nan, .*; .* sample {SICK} \(.*sick.jsonl\)", said), said
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_resumed_run_keeps_its_counts_and_its_bits(pool, arguments, tmp_path):
    """Adam counts updates, not steps: a resumed run must not count the skipped one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"checkpoint__save_every": 3, "checkpoint__keep": 9, "train__steps": 5}
    pool.run(1, sick.train, arguments(whole, **options))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000005")
    pool.run(1, sick.train, arguments(cut, **options))
    untimed = [
        [{k: v for k, v in row.items() if "second" not in k} for row in metrics_of(folder)]
        for folder in (whole, cut)
    ]
    assert untimed[0] == untimed[1]
    assert untimed[1][-1]["skipped_steps"] == 1


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (4, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2})],
    ids=["one", "vpp2_dp2"],
)
def test_gradients_that_are_not_finite_name_their_pack(pool, arguments, tiny_models, tmp_path, world, layout):
    """The loss is fine, so only the packs' own gradients can tell; a pack holds few of the step's samples."""
    data = sick.write_sick_chat(tmp_path / "answers.jsonl", SICK, in_answer=True)
    options = arguments(tmp_path / "run", model=tiny_models("qwen2_untied"), data=data, **layout)
    pool.run(world, sick.train_with_sick_loss, options, "gradient")
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert math.isfinite(rows[1]["loss"])
    assert rows[1]["grad_norm"] is None
    assert SICK in rows[1]["suspects"]
    assert len(rows[1]["suspects"]) < 12


def test_an_objective_forgets_a_skipped_step(pool, tiny_models, tmp_path):
    """BCO's running mean would stay NaN for ever."""
    data = write_labelled(tmp_path / "labelled.jsonl")
    records = [json.loads(line) for line in data.read_text().splitlines()]
    records[SICK]["prompt"][0]["content"] += sick.MARK
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"objective__name": "bco", "reference__mode": "none", "data__shuffle": False}
    options |= {"train__on_nonfinite": "skip", "train__steps": 3}
    pool.run(1, sick.train, run_arguments(tiny_models("qwen2_untied"), data, tmp_path / "run", **options))
    rows = metrics_of(tmp_path / "run")
    assert [row["suspects"] for row in rows if "suspects" in row] == [[SICK]]
    assert [math.isfinite(row["delta"]) for row in (rows[0], rows[2])] == [True, True]


def test_a_spike_names_the_pack_behind_it(pool, arguments, tiny_models, tmp_path):
    """The step is taken, the spike counted; packs of one sample name it exactly, also from another rank."""
    data, sample = tmp_path / "spike.jsonl", 2 * MIN_HISTORY + 1
    sick.write_sick_chat(data, sample, in_answer=True)
    options = {"train__global_batch_size": 2, "train__steps": MIN_HISTORY + 1, "optimizer__lr": 1e-9}
    run = arguments(tmp_path / "run", model=tiny_models(), data=data, data__packing=False, **options)
    pool.run(2, sick.train_with_sick_loss, run, "value")
    last = metrics_of(tmp_path / "run")[-1]
    assert (last["step"], last["loss_spikes"], last["grad_norm_outliers"]) == (MIN_HISTORY + 1, 1, 1)
    assert last["suspects"] == [sample]


@pytest.mark.parametrize(
    "world, layout", [(1, {}), (4, {"parallel__pipeline": 2, "parallel__tensor": 2})], ids=["one", "tp2_pp2"]
)
def test_weights_that_are_not_finite_are_named_rather_than_samples(pool, arguments, tmp_path, world, layout):
    name = "decoder.layers.1.input_layernorm.weight"
    options = arguments(tmp_path / "run", **layout)
    for said in pool.run(world, sick.train_with_bad_weights, options, name, 3):
        assert said.startswith("step 4: the weights are not finite since the update of an earlier step: ")
        assert "model.layers.1.input_layernorm.weight holds 1 NaN;" in said


def test_further_numbers_must_be_finite_too():
    """Those of a critic: its step is then skipped with the policy's, and the message says whose they are."""
    health = Health("skip")
    assert health.record(1.0, 1.0, {"loss of the critic": 2.0}) == []
    [problem] = health.record(1.0, 1.0, {"loss of the critic": float("nan")})
    assert problem == "loss 1.0, gradient norm 1.0, loss of the critic nan"
    assert health.counts["skipped_steps"] == 1
