"""An objective in a user's file is one like the built-in ones: options typed and checked, trained, resumed, exported.

The example is the one of docs/objectives.md, word for word.
"""

import re
from pathlib import Path

import pytest
import yaml

from megatron_align.cost.work import scoring_passes
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config, parse
from megatron_align.objectives.registry import build_objective
from tests.harness import training_ranks
from tests.harness.pool import RankFailed
from tests.harness.tiny import metrics_of, numbers, run_arguments, write_pairs

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
[EXAMPLE] = re.findall(r'```python\n("""my_objectives\.py"""\n.*?)```', PAGE, re.DOTALL)
[YAML] = re.findall(r"```yaml\n(objective: .*?)```", PAGE, re.DOTALL)
RUN = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 1}, "checkpoint": {"dir": "c"}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_objectives.py"
    path.write_text(EXAMPLE)
    return path


@pytest.fixture
def name(file):
    return f"{file}:Capped"


def test_the_documented_configuration_is_read(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    config = load_config({**RUN, **yaml.safe_load(YAML)})
    assert (config.objective.name, config.objective.cap, config.objective.beta) == (
        "my_objectives.py:Capped",
        1.5,
        0.1,
    )
    objective = build_objective(config.objective)
    assert objective.compares
    assert scoring_passes(load_config({**RUN, **yaml.safe_load(YAML)}, ["reference.mode=live"])) == 1


def test_the_command_line_takes_it_too(name):
    config = parse(run_arguments("m", "d", "c", objective__name=name, objective__cap=3))
    assert (config.objective.name, config.objective.cap) == (name, 3.0)


def test_help_and_print_config_show_its_options(name, capsys):
    for flag in ("--help", "--print_config"):
        with pytest.raises(SystemExit):
            parse([*run_arguments("m", "d", "c", objective__name=name), flag])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "--objective.cap CAP pairs with a larger reward margin add no gradient (type: float, default: 2.0)"
        in shown
    )
    assert f"objective: name: {name} beta: 0.1 cap: 2.0" in shown


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective.capp": 1}, "unknown configuration key 'objective.capp'; did you mean 'objective.cap'?"),
        ({"objective.cap": 0}, "objective.cap must be positive, got 0.0"),
        ({"objective.cap": "much"}, "objective.cap"),
    ],
)
def test_its_options_are_checked(name, options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_config(RUN, {"objective.name": name, **options})
    assert "\n" not in str(error.value)


WRONG = {
    "no file": (None, "absent.py:Capped", "needs a Python file, found none at 'absent.py' in "),
    "no Python file": ("x = 1", "my_objectives:Capped", "found none at 'my_objectives'"),
    "no class": (
        EXAMPLE,
        "Caped",
        "no class 'Caped' in .*whose objectives are Capped; did you mean 'Capped'",
    ),
    "another class": (EXAMPLE, "CappedOptions", "CappedOptions in .* must be a subclass of .*Objective"),
    "no class at all": ("Capped = 3", "Capped", "Capped in .* must be a subclass of"),
    "broken": (
        "import nonsense_that_is_absent",
        "Capped",
        "raised ModuleNotFoundError when imported: No module",
    ),
    "no Python": ("def", "Capped", "raised SyntaxError when imported"),
    "no options": (
        "from megatron_align.objectives.base import Objective\nclass Capped(Objective): data = ('chat',)",
        "Capped",
        "Capped.Options in .* must be a dataclass derived from",
    ),
    "no weights": (
        EXAMPLE.replace("PairObjective", "Objective").replace("objectives.preference", "objectives.base"),
        "Capped",
        "Capped in .* must set data and normalization",
    ),
}


@pytest.mark.parametrize("text, given, message", WRONG.values(), ids=list(WRONG))
def test_what_is_no_objective_is_one_line(text, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "my_objectives.py").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(RUN, {"objective.name": given if ":" in given else f"my_objectives.py:{given}"})
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("objective.name: ")


@pytest.mark.parametrize(
    "need, message",
    [
        ("reference_logprob", "must need only reference_logprobs, .*; got reference_logprob$"),
        (
            "mismatched_logprobs",
            "needs mismatched_logprobs, which only unpaired data have; its data are pair",
        ),
    ],
)
def test_needs_that_no_pre_pass_can_meet_are_refused(need, message, tmp_path):
    file = tmp_path / "my_objectives.py"
    file.write_text(EXAMPLE.replace('"reference_logprobs"', f'"{need}"'))
    with pytest.raises(InputError, match=message):
        load_config(RUN, {"objective.name": f"{file}:Capped"})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", samples=24)


def test_it_trains_as_the_built_in_one_on_any_layout_and_resumes(pool, tiny_models, pairs, file, tmp_path):
    """Without a reached cap it is DPO, bit by bit; with one it is not; a resumed run continues it."""
    rows = {}
    for case, world, options in (
        ("dpo", 1, {"objective__name": "dpo"}),
        ("uncapped", 1, {"objective__name": f"{file}:Capped", "objective__cap": 1e9}),
        ("capped", 1, {"objective__name": f"{file}:Capped", "objective__cap": 0.05}),
        (
            "capped tp2",
            2,
            {"objective__name": f"{file}:Capped", "objective__cap": 0.05, "parallel__tensor": 2},
        ),
    ):
        folder = tmp_path / case
        arguments = run_arguments(
            tiny_models(),
            pairs,
            folder,
            train__steps=2,
            train__global_batch_size=8,
            checkpoint__save_every=1,
            **options,
        )
        pool.run(world, training_ranks.train, arguments)
        rows[case] = numbers(folder)
    assert rows["uncapped"] == rows["dpo"]
    assert rows["capped"] != rows["dpo"]
    want = pytest.approx([row["loss"] for row in rows["capped"]], rel=1e-5)
    assert [row["loss"] for row in rows["capped tp2"]] == want

    folder = tmp_path / "capped"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["objective"]["name"] == f"{file}:Capped"
    options = {"objective__name": f"{file}:Capped", "train__steps": 3, "train__global_batch_size": 8}
    other, same = (
        run_arguments(tiny_models(), pairs, folder, objective__cap=cap, **options) for cap in (0.07, 0.05)
    )
    with pytest.raises(RankFailed, match="objective.cap was 0.05 and is 0.07"):
        pool.run(1, training_ranks.train, other)
    pool.run(1, training_ranks.train, same)
    assert numbers(folder)[:2] == rows["capped"]
    assert len(metrics_of(folder)) == 3
