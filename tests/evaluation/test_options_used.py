"""Law 13 for an evaluation: every option of its file changes what the evaluation does, or is refused there.

Options are those that the evaluation's sections and the kinds of tasks declare. What an option changes is looked at
where the model would begin to work: what is built and read, the prompts and requests that leave, the scores of answers.
"""

import json
import sys
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation import answers, engines, judge, run
from megatron_align.evaluation.config import (
    KINDS,
    AnsweredTask,
    EvaluationConfig,
    load_evaluation,
)
from megatron_align.evaluation.task_data import numbers_of, read_tasks, scored_items
from megatron_align.model.families import read_shape
from megatron_align.model.parallel import RankInfo
from megatron_align.rollout.endpoint import RequestFailed
from megatron_align.training import likelihood
from megatron_align.training.likelihood import CompletionScorer
from tests.harness.options import options_of, without_one_entry
from tests.harness.tiny import make_adapter, make_model, write_chat, write_pairs

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
URL = "http://127.0.0.1:1"
# A task of each kind, with which its options are compared.
TASKS = {
    "loss": {"data": "chat.jsonl"},
    "preference": {"data": "pairs.jsonl"},
    "choice": {"data": "choices.jsonl"},
    "generate": {"data": "asked.jsonl"},
    "judge": {"data": "asked.jsonl", "url": URL, "judge": "j"},
    "lm_eval": {"data": "sums"},
}


def evaluation(options, kind="loss", **task):
    """Return an evaluation of one task."""
    given = {"name": "t", "kind": kind, **TASKS[kind], **task}
    return load_evaluation({"model": "model", "out": "out", "tasks": [given], **options})


def prepared(options, kind="loss"):
    ranks = RankInfo(0, 0, options.get("ranks", 1))
    return run._prepare(evaluation({k: v for k, v in options.items() if k != "ranks"}, kind), ranks)


def built(options):
    """The policy that is built, where its assets and results lie, and with what the tasks are read."""
    setup = prepared(options)
    shape = sorted((name, str(value)) for name, value in vars(setup.megatron).items())
    return shape, setup.tasks.context, setup.adapter and setup.adapter.adapter


def packed(options):
    """How this rank's packs are made."""
    setup = prepared(options)
    chunk = SimpleNamespace(shape=setup.shape, config=setup.megatron)
    sizes = {name: mock.MagicMock(size=lambda: 2, rank=lambda: 1) for name in ("dp", "cp")}
    with (
        mock.patch.object(run, "build_policy", return_value=[chunk]),
        mock.patch.object(run, "_load"),
        mock.patch.object(run.parallel, "groups", return_value=SimpleNamespace(**sizes)),
        mock.patch.object(likelihood, "StepBatches", side_effect=ConnectionError) as batches,
    ):
        pytest.raises(ConnectionError, run._score, setup, mock.MagicMock())
    return batches.call_args.args[2:4]


def joined(options):
    """How the ranks meet."""
    with mock.patch.object(run, "join_watched", side_effect=ConnectionError) as join:
        pytest.raises(ConnectionError, run.evaluate, evaluation(options), RankInfo(0, 0, 1))
    return join.call_args.args[1].timeout_seconds


def loaded(options):
    """The engine that is opened: of which model, or of which servers."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(run, "vllm_command"))
        stack.enter_context(mock.patch.object(run.parallel, "failing_together", nullcontext))
        own, servers = (
            stack.enter_context(mock.patch.object(run, name)) for name in ("open_engine", "VLLMEngine")
        )
        started = stack.enter_context(mock.patch.object(engines, "shared_server"))
        started.return_value.__enter__.return_value = "started"
        stack.enter_context(run._engine(prepared(options, "generate"), mock.MagicMock()))
        urls = [call.args[0] for call in servers.call_args_list]
        return own.call_args_list, urls, started.call_args_list


def complemented(options):
    """The augmenter of the prompts."""
    with (
        mock.patch.object(run.parallel, "failing_together", nullcontext),
        mock.patch.object(run.megatron_align, "augmenter", create=True) as augmenter,
    ):
        augmenter.return_value.__enter__.return_value.augmented = list
        run._augmented(prepared(options, "generate"), mock.MagicMock())
    return augmenter.call_args.args


def read(kind, task):
    """A task with its data, as an evaluation reads it."""
    config = evaluation({}, kind, **task)
    context = run.TaskContext(
        assets=Path("model"),
        out=Path("out"),
        cache=Path("cache"),
        rank_info=RankInfo(0, 0, 1),
        sequence_length=256,
        template_date="2020-02-29",
        shown=False,
    )
    return read_tasks(config.tasks, read_shape("model"), context)


def scored(kind, task):
    """The tokens that are scored, under which model besides; results of drawn log-probs by the name of the task."""
    tasks = read(kind, task)
    [one] = tasks.scored
    samples = [one.table.sample(i) for i in range(len(one.table))]
    tokens = [(s.tokens_L.tolist(), s.scored_L.tolist(), s.completion_lengths) for s in samples]
    count = sum(max(1, len(s.completion_lengths)) for s in samples)
    draw = np.random.default_rng(0)
    numbers, references = (
        numbers_of(tasks.scored, lambda *_: draw.normal(size=count), tasks.context) for _ in range(2)
    )
    found = scored_items(tasks.scored, numbers, references)
    values = [
        (name, {metric: values.tolist() for metric, values in items.values.items()})
        for name, items in found.items()
    ]
    return tokens, one.reference, values


def answered(kind, task):
    """What the engine is called with, and the scores of its answers; of a judged task what these are compared with."""
    tasks = read(kind, task)
    [one] = tasks.answered
    engine = mock.MagicMock()
    engine.generate.side_effect = lambda prompts, *_: [None] * len(prompts)
    answers._generate(one, engine, mock.MagicMock(), (range(len(one.prompts)), False))
    calls = [call.args[:2] for call in engine.generate.call_args_list]
    if kind == "judge":
        return calls, one.expected
    with answers._scoring(one.task, tasks.context, 1) as scoring:
        return calls, scoring([("so 12", one.expected[0]), ("7", one.expected[1])])


def compared(kind, task):
    """The requests to a judge that gives no verdict at first, or never answers; how many at once, and the scores."""
    bodies, workers, replies = [], [], iter(["hm", "hm", "[[A]]", "hm", "hm", "hm", "hm", "[[B]]"])
    silent = task.get("failures") is not None

    def reply(endpoint, body):
        bodies.append((endpoint.url, body))
        if silent:
            raise RequestFailed("down")
        return next(replies), "stop"

    def in_order(function, items, at_once):
        workers.append(at_once)
        return map(function, items)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(judge, "chat_reply", reply),
        mock.patch.object(judge, "concurrently", in_order),
    ):
        [config] = evaluation({}, kind, **task).tasks
        scores = judge.Judge(config, Path(folder), 0).scores([("a", judge.Comparison("q", "b"))])
    return bodies, workers, scores


@contextmanager
def stand_in_for_lm_eval():
    """Give lm-eval's task manager and its evaluation, which only note how they are called."""
    names = ("", ".api", ".api.instance", ".api.model", ".models", ".models.utils", ".tasks", ".utils")
    modules = {f"lm_eval{name}": mock.MagicMock() for name in names}
    modules["lm_eval"] = ModuleType("lm_eval")
    modules["lm_eval"].__spec__ = ModuleSpec("lm_eval", None)
    modules["lm_eval"].simple_evaluate = mock.MagicMock(side_effect=ConnectionError)
    modules["lm_eval.api.model"].TemplateLM = object
    a_task = SimpleNamespace(task_name="sums", higher_is_better=dict)
    manager = modules["lm_eval.tasks"].TaskManager
    manager.return_value.load.return_value = {"tasks": {"sums": a_task}, "groups": {}, "group_map": {}}
    ours = ("lm_eval", "lm_eval_results")
    package = sys.modules["megatron_align.evaluation"]
    before = {name: vars(package)[name] for name in ours if name in vars(package)}
    with mock.patch.dict(sys.modules, modules):
        for name in ours:
            sys.modules.pop(f"megatron_align.evaluation.{name}", None)
        try:
            yield manager, modules["lm_eval"].simple_evaluate
        finally:
            for name in ours:
                vars(package).pop(name, None)
            vars(package).update(before)


def run_by_lm_eval(kind, task):
    """How lm-eval loads its tasks, and how it runs them."""
    with stand_in_for_lm_eval() as (manager, evaluate):
        tasks = read(kind, task)
        from megatron_align.evaluation.lm_eval_results import run_lm_eval

        score = CompletionScorer(
            chunks=[], parallel=None, groups=None, watchdog=mock.MagicMock(), sequence_length=8
        )
        pytest.raises(ConnectionError, run_lm_eval, tasks.lm_eval, score, tasks.context)
        [call] = evaluate.call_args_list
        options = {
            name: value for name, value in call.kwargs.items() if name not in ("model", "task_manager")
        }
        loads = manager.return_value.load.call_args_list
        return manager.call_args.kwargs, loads, {**options, "tasks": None}


VLLM = {"rollout": {"engine": "vllm", "url": URL}}
STARTED = {"engine": "vllm", "vllm_python": "python"}
PIPELINE = {"pipeline": 2}
# How it is seen: what is looked at, the option's value off its default, and the options beside it.
OFF = {
    "model": (built, {"model": "other"}, {}),
    "out": (built, {"out": "elsewhere"}, {}),
    "adapter": (built, {"adapter": "adapter"}, {}),
    "precision": (built, {"precision": "fp32"}, {}),
    "sequence_length": (built, {"sequence_length": 99}, {}),
    "template_date": (built, {"template_date": "2001-01-01"}, {}),
    "augment": (complemented, {"augment": "other"}, {"augment": "writer"}),
    "augment_template": (complemented, {"augment_template": "plain.jinja"}, {"augment": "writer"}),
    "rollout": (loaded, VLLM, {}),
    "rollout.engine": (loaded, VLLM, {}),
    "rollout.url": (loaded, {"rollout": {"engine": "vllm", "url": [URL, "http://127.0.0.1:2"]}}, VLLM),
    "rollout.vllm_python": (
        loaded,
        {"rollout": {**STARTED, "vllm_python": "other"}},
        {"rollout": STARTED},
    ),
    "rollout.vllm_options": (
        loaded,
        {"rollout": {**STARTED, "vllm_options": ["--max-model-len", "9"]}},
        {"rollout": STARTED},
    ),
    "parallel": (built, {"parallel": PIPELINE}, {"ranks": 2}),
    "parallel.context_kind": (
        packed,
        {"parallel": {"context": 2, "context_kind": "allgather"}},
        {"parallel": {"context": 2, "context_kind": "ulysses"}, "ranks": 2},
    ),
    "parallel.timeout_seconds": (joined, {"parallel": {"timeout_seconds": 9}}, {}),
    **{
        f"parallel.{name}": (built, {"parallel": {**beside, name: value}}, {"parallel": beside, "ranks": 2})
        for name, value, beside in (
            ("tensor", 2, {}),
            ("pipeline", 2, {}),
            ("context", 2, {}),
            ("virtual_pipeline", 2, PIPELINE),
            ("first_stage_layers", 1, PIPELINE),
            ("last_stage_layers", 1, PIPELINE),
            ("count_embedding", True, {**PIPELINE, "count_loss": True}),
            ("count_loss", True, {**PIPELINE, "count_embedding": True}),
            ("sequence", False, {"tensor": 2}),
            ("overlap_p2p", True, {**PIPELINE, "virtual_pipeline": 2}),
        )
    },
}
STORED = (
    ("shape", "prompt_completion", {"data": "both.jsonl"}, "loss"),
    ("shape", "pair", {"data": "triples.jsonl"}, "preference"),
    ("chat_template", "plain.jinja", {}, "loss"),
    ("chat_template", "plain.jinja", {}, "preference"),
    ("too_long", "drop", {"data": "long.jsonl"}, "loss"),
    ("too_long", "drop", {"data": "long_pairs.jsonl"}, "preference"),
)
ANSWERED = (
    ("as_chat", True, {}),
    ("chat_template", "plain.jinja", {"as_chat": True}),
    ("limit", 2, {}),
    ("completions", 2, {"temperature": 0.5}),
    ("max_tokens", 7, {}),
    ("temperature", 0.5, {}),
    ("top_p", 0.5, {"temperature": 0.5}),
    ("top_k", 9, {"temperature": 0.5}),
    ("stop", ["."], {}),
    ("seed", 7, {}),
)
OF_TASKS = {
    "name": (scored, "loss", {"name": "other"}, {}),
    "data": (scored, "loss", {"data": ["chat.jsonl", "more.jsonl"]}, {}),
    **{f"{kind}.{name}": (scored, kind, {name: value}, beside) for name, value, beside, kind in STORED},
    "preference.score": (scored, "preference", {"score": "per_token"}, {}),
    "preference.reference": (scored, "preference", {"reference": "model"}, {}),
    "choice.delimiter": (scored, "choice", {"delimiter": ": "}, {}),
    "choice.chat_template": (scored, "choice", {"chat_template": "plain.jinja"}, {}),
    "choice.limit": (scored, "choice", {"limit": 1}, {}),
    **{
        f"{kind}.{name}": (answered, kind, {name: value}, beside)
        for kind in ("generate", "judge")
        for name, value, beside in ANSWERED
    },
    "generate.check": (answered, "generate", {"check": "contains"}, {}),
    "generate.extract": (answered, "generate", {"extract": r"\d+"}, {}),
    "judge.baseline": (answered, "judge", {"baseline": "baseline.jsonl"}, {}),
    "judge.url": (compared, "judge", {"url": "http://127.0.0.1:2"}, {}),
    "judge.judge": (compared, "judge", {"judge": "k"}, {}),
    "judge.judge_tokens": (compared, "judge", {"judge_tokens": 9}, {}),
    "judge.tries": (compared, "judge", {"tries": 2}, {}),
    "judge.workers": (compared, "judge", {"workers": 2}, {}),
    "judge.failures": (compared, "judge", {"failures": 2}, {"failures": 0}),
    **{
        f"lm_eval.{name}": (run_by_lm_eval, "lm_eval", {name: value}, {})
        for name, value in {
            "include_path": "model",
            "num_fewshot": 2,
            "limit": 3,
            "apply_chat_template": True,
            "system_instruction": "s",
            "fewshot_as_multiturn": False,
            "gen_kwargs": {"max_gen_toks": 9},
        }.items()
    },
}
# Why nothing is to be seen.
EXCEPT = {
    "tasks": "it has no default, and a table of its own",
    "kind": "it has no default: each kind has entries of its own",
    "parallel.overlap_grad_reduce": "there is no gradient: the section is a run's, which may be copied",
    "parallel.overlap_param_gather": "there is no update: the section is a run's, which may be copied",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, data and templates that the options above name."""
    folder = tmp_path_factory.mktemp("evaluation_options")
    make_model(folder / "model", max_position_embeddings=512)
    make_model(folder / "other", num_hidden_layers=2)
    make_adapter(folder / "adapter", folder / "model")
    write_chat(folder / "chat.jsonl", samples=3)
    write_pairs(folder / "pairs.jsonl", samples=3)
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    long = [{"role": "user", "content": "7" * 300}]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, records in {
        "both": [{"messages": chat, "prompt": "p", "completion": "c"}],
        "more": [{"messages": chat}],
        "triples": [{**pair, "reference": chat[1:]}],
        "long": [{"messages": long + chat[1:]}, {"messages": chat}],
        "long_pairs": [{**pair, "prompt": long}, pair],
        "choices": [
            {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
            {"prompt": chat[:1], "choices": ["a", "b"], "answer": 1},
        ],
        "asked": [{"prompt": f"{i} + 12 =", "answer": str(12 + i)} for i in range(3)],
        "baseline": [{"completions": [{"content": str(i)}]} for i in range(3)],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "plain.jinja").write_text(PLAIN)
    return folder


def declared():
    """Return every option of an evaluation, and of every kind of task."""
    names = [name.removeprefix("e.") for name in options_of(EvaluationConfig, "e")]
    common = [name for name in names if name.startswith("tasks.")]
    names = [name for name in names if name not in common]
    of_tasks = [name.removeprefix("tasks.") for name in common]
    for kind, options in KINDS.items():
        own = (name.removeprefix("t.") for name in options_of(options, "t"))
        of_tasks += [f"{kind}.{name}" for name in own if name not in of_tasks]
    return names, of_tasks


def outcome(probe, *given):
    try:
        return probe(*given)
    except InputError as error:
        return f"refused: {error}"


def assert_changed(plain, off):
    assert not (isinstance(off, str) and off.startswith("refused")), off
    assert off != plain


def test_every_option_has_an_entry():
    names, of_tasks = declared()
    assert without_one_entry([*names, *of_tasks], OFF, OF_TASKS, EXCEPT) == []


@pytest.mark.parametrize("option", OFF)
def test_an_option_of_the_evaluation_changes_what_it_should(option, place, monkeypatch):
    monkeypatch.chdir(place)
    probe, changed, beside = OFF[option]
    assert_changed(outcome(probe, beside), outcome(probe, {**beside, **changed}))


@pytest.mark.parametrize("option", OF_TASKS)
def test_an_option_of_a_task_changes_what_it_should(option, place, monkeypatch):
    monkeypatch.chdir(place)
    probe, kind, changed, beside = OF_TASKS[option]
    plain = outcome(probe, kind, beside)
    assert plain == outcome(probe, kind, beside)
    assert_changed(plain, outcome(probe, kind, {**beside, **changed}))


def test_a_dropped_option_is_found(place, monkeypatch):
    """Without it no test above could fail: an option that is read and not used, and one without an entry."""
    monkeypatch.chdir(place)
    probe, kind, changed, beside = OF_TASKS["generate.stop"]
    kept = AnsweredTask.sampling
    monkeypatch.setattr(
        AnsweredTask, "sampling", lambda task: kept(SimpleNamespace(**{**vars(task), "stop": []}))
    )
    with pytest.raises(AssertionError):
        assert_changed(outcome(probe, kind, beside), outcome(probe, kind, {**beside, **changed}))
    names, of_tasks = declared()
    found = without_one_entry([*names, *of_tasks, "judge.new"], OFF, OF_TASKS, EXCEPT)
    assert found == ["judge.new needs an entry"]
