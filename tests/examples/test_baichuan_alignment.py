"""The small recipe of the report: every stage's output is valid input of the next, and each stage is run once.

Nothing is trained here but in the slow test, which kills the recipe and lets the same command continue.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.baichuan_alignment import cluster, compare, compare_data, page, results, run, runner, scripted
from examples.baichuan_alignment.plan import METHODS, TRAINED, Stage, keys, stages
from examples.baichuan_alignment.questions import FIELDS, GROUPS, make, write
from megatron_align import train
from megatron_align.cost.memory import GIB
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.work import full_packs, mean
from megatron_align.errors import InputError
from megatron_align.evaluation.config import parse as parse_evaluation
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import trained_shape
from tests.harness.sizes import write_config

ROOT = Path(__file__).parents[2]


# Questions


@pytest.fixture(scope="module")
def questions():
    return make(seed=3, held_out=64)


def expected(prompt):
    """Answer a clear prompt by other means than the generators."""
    text, _, complement = prompt.partition("\n")
    if match := re.fullmatch(r"(\d+)\+(\d+)=", text):
        return str(int(match[1]) + int(match[2]))
    order, word = text.split(" ")
    order = {"Use brackets.": "Brackets", "Use dashes.": "Dashes"}[complement] if order == "Write" else order
    return {
        "Sort": lambda: "".join(map(str, sorted(map(int, word)))),
        "Reverse": lambda: "".join(reversed(word)),
        "Capitals": lambda: "".join(chr(ord(letter) - 32) for letter in word),
        "Double": lambda: re.sub("(.)", r"\1\1", word),
        "Brackets": lambda: "[" + word + "]",
        "Dashes": lambda: re.sub("(?<=.)(?=.)", "-", word),
    }[order]()


def test_answers_are_right_and_mistakes_are_wrong(questions):
    for part in (questions.train, questions.held_out):
        for field, found in part.items():
            assert len(found) >= 64, field
            for question in found:
                assert question.answer == expected(question.clear), question
                assert question.mistake != question.answer, question


def test_no_held_out_question_is_trained(questions):
    def content(question):
        """What would give a held-out answer away: addends, digits or word in any order of the question's parts."""
        if question.field == "sums":
            return frozenset(question.prompt[:-1].split("+"))
        word = question.prompt.split(" ")[1]
        return "".join(sorted(word)) if question.field == "sorting" else word

    for field in FIELDS:
        trained = {content(q) for other in FIELDS for q in questions.train[other]}
        assert not trained & {content(q) for q in questions.held_out[field]}, field


def test_only_the_complement_decides_what_is_open(questions):
    trained, held = questions.train["open"], questions.held_out["open"]
    right = sum(q.complement == scripted.complement(q.prompt) for q in trained) / len(trained)
    assert 0.4 < right < 0.6  # drawn, so that the word says nothing of the format
    assert all(q.complement == scripted.complement(q.prompt) for q in held)


# The plan


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a recipe's folder with its data, and the untrained model in place of every trained one."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    out = tmp_path_factory.mktemp("recipe") / "out"
    out.mkdir()
    write(out / "data", 0, 8, 0.01)
    for name in (*TRAINED, *(f"merge_{method}" for method in METHODS)):
        (out / name).mkdir()
        if name != "reward":
            (out / name / "hf").symlink_to(out / "data" / "untrained")
    config = Qwen2Config.from_pretrained(out / "data" / "untrained")
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(out / "reward" / "hf")
    AutoTokenizer.from_pretrained(out / "data" / "untrained").save_pretrained(out / "reward" / "hf")
    chats = (out / "data" / "chats.jsonl").read_text()
    (out / "pas_build").mkdir()
    (out / "pas_build" / "data.jsonl").write_text(chats)
    (out / "sampled").mkdir()
    (out / "sampled" / "data.jsonl").write_text((out / "data" / "pairs.jsonl").read_text())
    for name in ("base", "prompts", *GROUPS):
        (out / f"mix_{name}").mkdir()
        data = "prompts" if name == "prompts" else "chats"
        mixture = [{"path": str(out / "data" / f"{data}.jsonl"), "weight": 1.0}]
        (out / f"mix_{name}" / "mixture.json").write_text(json.dumps(mixture))
    by_field = [
        {"path": str(out / "mix_prompts" / f"{f}.jsonl"), "weight": 1 + i} for i, f in enumerate(FIELDS)
    ]
    for line in (out / "data" / "prompts.jsonl").read_text().splitlines():
        with open(out / "mix_prompts" / f"{json.loads(line)['field']}.jsonl", "a") as file:
            file.write(line + "\n")
    (out / "mix_prompts" / "mixture.json").write_text(json.dumps(by_field))
    return out


def words_of(command):
    """Return a command's words, with $(cat FILE) as the file's content."""
    text = re.sub(r'"\$\(cat (\S+)\)"', lambda found: shlex.quote(Path(found[1]).read_text()), command)
    return shlex.split(text)


def test_each_stage_reads_only_what_the_stages_before_it_wrote(tmp_path):
    planned = stages(tmp_path / "out")
    assert len({stage.name for stage in planned}) == len(planned)
    before = {}
    for stage in planned:
        known = set()  # outputs of all stages that it waits for
        waiting = list(stage.after)
        while waiting:
            name = waiting.pop()
            assert name in before, f"{stage.name} comes before {name}"
            known.add(before[name].output)
            waiting += before[name].after
        before[stage.name] = stage
        for path in map(Path, re.findall(rf"{tmp_path}/out/[\w./]+", stage.command)):
            own = path in (stage.output, stage.output.parent)
            written = any(path == each or each in path.parents or path == each.parent for each in known)
            assert own or written, f"{stage.name} reads {path}"


@pytest.mark.parametrize(
    "name", ("pas", "base", "sft_text", "reward", "grpo")
)  # of one field: as of the others
def test_every_training_passes_the_checks_of_a_run(small, name, capsys):
    stage = {stage.name: stage for stage in stages(small, scale=0.05)}[name]
    assert words_of(stage.command)[:3] == ["python", "-m", "megatron_align.train"]
    assert train.main([*words_of(stage.command)[3:], "--dry_run"]) == 0
    assert "GiB per rank" in capsys.readouterr().out


def test_every_other_command_is_understood(small, monkeypatch):
    from megatron_align.tools import command, main

    whole, seen = command.Parser.parse, []

    class Parsed(BaseException):
        pass

    def parse_only(self, arguments):
        whole(self, arguments)
        seen.append(self.prog)
        raise Parsed

    monkeypatch.setattr(command.Parser, "parse", parse_only)
    for stage in stages(small):
        words = words_of(stage.command)
        if words[0] == "megatron-align" and words[1] != "evaluate":
            with pytest.raises(Parsed):
                main.main(words[1:])
        elif words[1] == "evaluate":
            config = parse_evaluation(words[2:], "evaluate")
            assert [task.name for task in config.tasks] == list(FIELDS)
    assert len(seen) == 10  # pas build, data mix x 5, merge x 3, sample


def test_the_comparisons_train_on_what_the_recipe_wrote(small, tmp_path):
    planned = compare.stages(small, tmp_path, (1, 2), more={"--train.steps": 7})
    assert len({stage.name for stage in planned}) == len(planned) == 1 + 2 * (2 * 8 + 1)
    steps = set()
    for stage in planned:
        assert stage.name == compare.DATA or stage.after or "grpo" in stage.name or "ppo" in stage.name
        if stage.config:
            parsed = parse(words_of(stage.command)[3:])
            assert Path(parsed.model.path).is_dir()
            assert parsed.train.seed in (1, 2)
            steps.add((parsed.objective.name == "reward", parsed.train.steps))
    assert steps == {(True, compare.REWARD_STEPS), (False, 7)}


def test_ppo_has_the_rollouts_rewards_and_kl_of_grpo(small, tmp_path):
    planned = {stage.name: stage for stage in compare.stages(small, tmp_path, (1,))}
    grpo, ppo = (parse(words_of(planned[name].command)[3:]) for name in ("grpo_PTX-KL_1", "ppo_PTX-KL_1"))
    assert (grpo.rollout, grpo.rewards, grpo.reference) == (ppo.rollout, ppo.rewards, ppo.reference)
    assert (grpo.optimizer, grpo.train, grpo.data) == (ppo.optimizer, ppo.train, ppo.data)
    for name in ("beta", "kl_place", "ptx"):
        assert getattr(grpo.objective, name) == getattr(ppo.objective, name)


def test_data_of_the_comparisons_are_the_questions_of_grpo(small, tmp_path):
    compare_data.write(small, tmp_path / "data")
    prompts = [json.loads(line) for line in (small / "data" / "prompts.jsonl").read_text().splitlines()]
    for kind, rows_of_a_question in (("dpo", 1), ("kto", 2)):
        sources = json.loads(compare_data.mixture(small, tmp_path / "data", kind))
        assert [source["weight"] for source in sources] == [1, 2, 3, 4, 5]
        for field, source in zip(FIELDS, sources, strict=True):
            rows = [json.loads(line) for line in Path(source["path"]).read_text().splitlines()]
            answers = [p["answer"] for p in prompts if p["field"] == field]
            assert len(rows) == rows_of_a_question * len(answers) > 0
            right = (
                [r["chosen"] for r in rows]
                if kind == "dpo"
                else [r["completion"] for r in rows if r["label"]]
            )
            assert [turns[0]["content"] for turns in right] == answers
    few = (tmp_path / "data" / compare_data.FEW).read_text().splitlines()
    trained, held_out = (
        [line for field in FIELDS for line in (folder / f"{field}.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "data" / "trained", small / "data" / "preferences")
    )
    assert set(trained) <= set(few)
    assert not set(few) & set(held_out)


def test_pairs_of_other_questions_than_the_prompts_are_refused(small, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("prompts", "pairs"):
        lines = (small / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines[::-1] if name == "pairs" else lines))
    assert compare_data.main(["--recipe", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_the_scale_shortens_all_trainings(tmp_path):
    for stage in stages(tmp_path, scale=0.02):
        if stage.config:
            words = shlex.split(re.sub(r'"\$\(cat \S+\)"', "data", stage.command))
            assert int(words[words.index("--train.steps") + 1]) <= 5


# The runner


def fake(out, name, *after, code="pass"):
    output = out / name / "done"
    script = shlex.quote(f"{code}; open({str(output)!r}, 'w').write('x')")
    return Stage(name=name, command=f"python -c {script}", output=output, after=after)


def ran(out, planned, jobs=2):
    found = runner.Runner(out, planned, jobs).run(lambda names: None)
    return {each.stage.name: each.seconds is not None for each in found}


def test_a_finished_stage_is_not_run_again(tmp_path):
    out = tmp_path / "out"
    marks = tmp_path / "marks"
    mark = f"open({str(marks)!r}, 'a').write('one ')"
    fails = "import sys; sys.exit('error: no such thing')"
    good = [fake(out, "a", code=mark), fake(out, "b", "a", code=fails)]
    with pytest.raises(
        runner.StageFailed, match="stage b failed with exit code 1: no such thing; see .*logs/b.log"
    ):
        ran(out, good)
    mended = [good[0], fake(out, "b", "a"), fake(out, "c", "b")]
    assert ran(out, mended) == {"a": False, "b": True, "c": True}
    assert ran(out, mended) == {"a": False, "b": False, "c": False}
    assert marks.read_text() == "one "
    mended[1].output.unlink()  # a lost output is made again
    assert ran(out, mended) == {"a": False, "b": True, "c": False}
    other = [fake(out, "a", code="0"), *mended[1:]]
    with pytest.raises(InputError, match="stage a in .* was made with other options"):
        ran(out, other)


def test_a_stage_that_cannot_continue_starts_with_an_empty_folder(tmp_path):
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / runner.MARK).touch()
    (out / "a" / "half").write_text("x")
    stage = fake(out, "a")
    ran(out, [Stage(name="a", command=stage.command, output=stage.output, starts_anew=True)])
    assert not (out / "a" / "half").exists()


def test_the_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="--out must be a new or empty folder"):
        ran(tmp_path, [fake(tmp_path, "a")])
    assert (tmp_path / "mine.txt").exists()


def test_a_key_follows_all_that_a_stage_depends_on(tmp_path):
    whole = keys(stages(tmp_path / "out"))
    assert keys(stages(tmp_path / "out")) == whole
    assert not set(keys(stages(tmp_path / "out", seed=1)).values()) & set(whole.values())


# The page


@pytest.fixture
def recorded(tmp_path):
    """Return a folder with metrics.jsonl and results.json alone."""
    shares = {"base": 0.5, "sft_numbers": 0.6, "merge_model_stock": 0.7, "grpo": 0.9, "grpo_augmented": 0.4}
    for folder in (
        *("pas", "base", *(f"sft_{group}" for group in GROUPS), *(f"merge_{method}" for method in METHODS)),
        *("grpo", "grpo_augmented", "reward_preferences", "merge_model_stock_preferences"),
    ):
        metric = "accuracy" if "preferences" in folder else "exact_match"
        entries = {f: {metric: shares.get(folder, 0.65), "n": 200, "ci95": [0, 1]} for f in FIELDS}
        out = tmp_path / "evaluations" / folder
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps({"tasks": entries}))
    for name in TRAINED:
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 1 / s, "reward": s / 9, "step_seconds": 1.0} for s in range(1, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_is_made_of_metrics_and_results_alone(recorded, capsys):
    assert run.main(["--page", "--out", str(recorded)]) == 0
    said = capsys.readouterr().out
    html = (recorded / page.PAGE).read_text()
    assert html.count("<svg") == 2 * len(TRAINED)
    for text in (said, html.replace("&gt;", ">")):
        assert "grpo with pas lost sums against grpo: 90.0% -> 40.0% of 200" in text
        assert "sft_text did not clearly improve strings over base" not in text  # 0.5 -> 0.65 of 200
        assert "merge_linear did not clearly improve sums over mean of the three: 63.3%" in text
    (recorded / page.PAGE).unlink()
    assert run.main(["--page", "--out", str(recorded)]) == 0
    assert (recorded / page.PAGE).read_text() == html


def test_a_missing_result_is_an_error_that_names_it(recorded, capsys):
    (recorded / "evaluations" / "grpo" / "results.json").write_text('{"tasks": {"sums": {}}}')
    assert run.main(["--page", "--out", str(recorded)]) == 2
    assert "evaluations/grpo/results.json must have the tasks sums" in capsys.readouterr().err
    (recorded / "evaluations" / "grpo" / "results.json").unlink()
    assert run.main(["--page", "--out", str(recorded)]) == 2
    assert "the page needs" in capsys.readouterr().err


def test_a_difference_within_chance_is_no_gain():
    half = results.Score(0.5, 100)
    assert results.Score(0.63, 100).compared(half) == "no clear change"  # standard error 0.07
    assert results.Score(0.65, 100).compared(half) == "gain"
    assert results.Score(0.35, 100).compared(half) == "loss"


# The cluster


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Run the printed script with a stand-in for sbatch; return each job's number and arguments."""
    folder = tmp_path_factory.mktemp("slurm")
    stub = folder / "sbatch"
    stub.write_text(
        '#!/bin/bash\nn=$(($(cat "$0.n" 2>/dev/null || echo 0) + 1)); echo $n >"$0.n"\n'
        '{ printf "%s\\037" "$n" "$@"; echo; } >>"$0.calls"; echo $n\n'
    )
    stub.chmod(0o755)
    script = "\n".join(cluster.commands(cluster.RECIPES))
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\037")[:-1] for line in (folder / "sbatch.calls").read_text().splitlines()]
    return {int(number): arguments for number, *arguments in calls}


def name_of(arguments):
    return arguments[arguments.index("--job-name") + 1]


def waits_of(arguments):
    if "--dependency" not in arguments:
        return []
    kind, *numbers = arguments[arguments.index("--dependency") + 1].split(":")
    assert kind == "afterok"
    return list(map(int, numbers))


def test_jobs_wait_for_earlier_ones(jobs):
    by_name = {name_of(arguments): (number, arguments) for number, arguments in jobs.items()}
    assert len(by_name) == len(jobs) == 2 + 2 * 18
    for number, arguments in jobs.items():
        assert all(1 <= other < number for other in waits_of(arguments))
    names = {number: name_of(arguments) for number, arguments in jobs.items()}
    for recipe in cluster.RECIPES:
        of = {name: [names[n] for n in waits_of(arguments)] for name, (_, arguments) in by_name.items()}
        assert of[f"{recipe}_merged"] == [f"{recipe}_sft_{field}" for field in cluster.FIELDS]
        assert of[f"{recipe}_reward"] == [f"{recipe}_merged", f"{recipe}_sampled"]
        assert of[f"{recipe}_grpo"] == [f"{recipe}_merged", f"{recipe}_reward"]
        assert of[f"{recipe}_evaluate_grpo_augmented"] == [f"{recipe}_grpo", "pas"]


def test_a_job_reads_what_those_it_waits_for_write(jobs):
    wrote = {}
    for number, arguments in jobs.items():
        text = " ".join(arguments)
        script = next((i for i, word in enumerate(arguments) if word.endswith(".sbatch")), None)
        own = arguments[script + 2] if script else re.search(r"--out (\S+)", text)[1]
        known, waiting = {own}, waits_of(arguments)
        while waiting:
            other = waiting.pop()
            known.add(wrote[other])
            waiting += waits_of(jobs[other])
        wrote[number] = own
        for path in re.findall(r"runs/[\w/]+", text):
            assert any(path == each or path.startswith(f"{each}/") for each in known), (
                name_of(arguments),
                path,
            )


def test_trainings_of_the_cluster_fit_their_gpus(jobs, tmp_path):
    trained = 0
    for arguments in jobs.values():
        script = next((i for i, word in enumerate(arguments) if word.endswith(".sbatch")), None)
        if script is None:
            continue
        nodes = int(arguments[arguments.index("--nodes") + 1])
        config, run_folder, *rest = arguments[script + 1 :]
        online = arguments[script].endswith("slurm_online.sbatch")
        options = rest[1:] if online else rest
        nodes -= online
        family = "qwen2_7b" if "qwen2_7b" in config else ("qwen2_72b" if "qwen2" in config else "llama3_70b")
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        folder = write_config(folder, family)
        at = options.index("--model.path")
        options[at + 1] = str(folder)
        parsed = parse(["--config", str(ROOT / config), *options, "--checkpoint.dir", run_folder])
        shape = trained_shape(read_shape(folder), parsed, folder)
        placement = Placement.of_run(parsed, shape, 8 * nodes)
        micro_batches = mean(full_packs(parsed)(placement)).micro_batches
        assert max(stage.total for stage in memory_of(parsed, placement, micro_batches)) <= 79.0 * GIB, config
        trained += 1
    assert trained == 1 + 2 * 5


def test_other_commands_of_the_cluster_are_understood(jobs, monkeypatch):
    from megatron_align.tools import command, main

    class Parsed(BaseException):
        pass

    whole = command.Parser.parse

    def parse_only(self, arguments):
        whole(self, arguments)
        raise Parsed

    monkeypatch.setattr(command.Parser, "parse", parse_only)
    monkeypatch.chdir(ROOT)
    for arguments in jobs.values():
        if "--wrap" not in arguments:
            continue
        words = shlex.split(arguments[arguments.index("--wrap") + 1])
        if words[0] == "torchrun":
            config = parse_evaluation(words[words.index("megatron_align.evaluate") + 1 :], "evaluate")
            assert config.rollout.vllm_python == "/envs/vllm/bin/python"
        else:
            with pytest.raises(Parsed):
                main.main(words[1:])


def test_it_prints_one_recipe_or_both(capsys):
    assert run.main(["--cluster", "llama3_pbm_nova_70b"]) == 0
    one = capsys.readouterr().out
    assert "examples/llama3_pbm_nova_70b/grpo.yaml" in one
    assert "qwen2_nova_72b" not in one
    assert run.main(["--cluster"]) == 0
    assert "examples/qwen2_nova_72b/sft.yaml" in capsys.readouterr().out


# The recipe itself


def start(out):
    command = [sys.executable, "-m", "examples.baichuan_alignment.run", "--out", str(out), "--scale", "0.02"]
    return subprocess.Popen(
        [*command, "--held-out", "8"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_killed_recipe_continues(tmp_path):
    out = tmp_path / "out"
    planned = [stage.name for stage in stages(out, scale=0.02, held_out=8)]
    for when in ("sft_text", "reward"):
        killed = start(out)
        try:
            while not (out / "logs" / f"{when}.log").exists():  # it has begun
                assert killed.poll() is None, killed.stdout.read()
                time.sleep(0.1)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    done = start(out)
    said, _ = done.communicate(timeout=900)
    assert done.returncode == 0, said
    lines = re.findall(r"^\[ *\d+/\d+\] (\w+) +(before|\d+ s)", said, re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(planned)
    assert {name for name, took in lines if took == "before"} >= {
        "questions",
        "base",
        "sft_numbers",
        "sampled",
    }
    assert (out / page.PAGE).is_file()
    again = start(out)
    said, _ = again.communicate(timeout=60)
    assert said.count(" before") == len(planned)
