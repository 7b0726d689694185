"""A checkpoint on any layout has the numbers of lm-eval's own ``hf`` model on the exported folder."""

import json
import math
from datetime import datetime

import pytest

from megatron_align.errors import InputError
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import run_arguments

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'megatron-align[eval]'")

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "birds",
    "that",
    "sang",
    "to",
    "it",
    "all",
    "day",
    "long",
]
DOCS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a), f"{a}{b}"], "answer": b % 3}
    for a, b in ((12, 30), (7, 5), (100, 3), (9, 9), (21, 4), (8, 13))
]
TEXTS = [
    {"text": " ".join(WORDS[i:] + WORDS[:i]) * (1 + 3 * i)} for i in range(5)
]  # the longest needs windows
DATASET = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
TASKS = {
    "sums": """task: sums
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 2
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answers": """task: answers
output_type: generate_until
doc_to_text: "{{question}} 4 apples are"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "last_word": """task: last_word
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Return the YAML files of local tasks, by name."""
    folder = tmp_path_factory.mktemp("lm_eval_tasks")
    files = {}
    for name, content in TASKS.items():
        rows = TEXTS if name == "rolling" else DOCS
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(content + DATASET.format(data=data, cache=folder / "cache"))
    return files


@pytest.fixture(scope="module")
def run_folder(pool, tiny_models, chat_file, tmp_path_factory):
    """Return a run's folder with a checkpoint of two tensor-parallel ranks, and its export."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_models("qwen2_untied")
    options = {"train__steps": 1, "checkpoint__export_hf": True, "parallel__tensor": 2}
    pool.run(2, training_ranks.train, run_arguments(model, chat_file, folder, **options))
    return folder


@pytest.fixture(scope="module")
def expected(run_folder, task_files):
    """Return the numbers of lm-eval's own hf model, and the answers that it generates."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(run_folder / "hf"), dtype="float32", device="cpu", batch_size=1, max_length=256)
    tasks = [str(file) for file in task_files.values()]
    return simple_evaluate(model=lm, tasks=tasks, task_manager=TaskManager(include_defaults=False))


LAYOUTS = {
    "pipeline": (2, {"pipeline": 2}),
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "context_data": (4, {"context": 2}),
    "mixed": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["one", "tensor", "context_data", "mixed"]))
def test_numbers_are_those_of_lm_evals_hf_model(pool, run_folder, task_files, expected, tmp_path, layout):
    ranks, parallel = LAYOUTS[layout]
    tasks = [{"name": name, "kind": "lm_eval", "data": str(file)} for name, file in task_files.items()]
    tasks.append(
        {"name": "both", "kind": "lm_eval", "data": [str(task_files[n]) for n in ("sums", "last_word")]}
    )
    config = {"model": str(run_folder), "precision": "fp32", "out": str(tmp_path), "sequence_length": 256}
    results = pool.run(ranks, training_ranks.evaluate, {**config, "parallel": parallel, "tasks": tasks})
    assert all(other == results[0] for other in results)
    directions = results[0]["higher_is_better"]  # lm-eval's own
    assert directions["rolling"] == {"word_perplexity": False, "bits_per_byte": False}
    assert directions["both"] == {"acc": True, "acc_norm": True, "perplexity": False}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results[0]))
    for name in TASKS:
        entry, theirs = results[0]["tasks"][name], expected["results"][name]
        metrics = {key.removesuffix(",none"): value for key, value in theirs.items() if key.endswith(",none")}
        metrics = {key: value for key, value in metrics.items() if "_stderr" not in key}
        assert metrics
        for metric, value in metrics.items():
            assert entry[metric] == pytest.approx(value, rel=1e-5), (name, metric)
        primary = results[0]["primary"][name]
        assert primary == ("acc" if name == "last_word" else next(iter(metrics))), name
        assert entry["n"] == len(expected["samples"][name])
        assert entry["ci95"] is None or entry["ci95"][0] <= entry["ci95"][1]
    for name in (*TASKS, "both"):  # what a row has is a number whose mean is the metric
        file = tmp_path / "items" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        shared = set.intersection(*(set(row) for row in rows))  # of a pooled task: the metrics that all have
        for metric in (key for key in shared if isinstance(rows[0][key], float)):
            mean = sum(row[metric] for row in rows) / len(rows)
            assert results[0]["tasks"][name][metric] == pytest.approx(mean)
    rows = [json.loads(line) for line in (tmp_path / "items" / "answers.jsonl").read_text().splitlines()]
    theirs = [sample["filtered_resps"] for sample in expected["samples"]["answers"]]
    assert [row["answers"] for row in rows] == theirs
    assert any(answer for [answer] in theirs)
    both = results[0]["tasks"]["both"]
    assert set(both["sources"]) == {"sums", "last_word"}
    assert both["acc"] == pytest.approx(
        (results[0]["tasks"]["sums"]["acc"] + results[0]["tasks"]["last_word"]["acc"]) / 2
    )


def test_log_probs_and_greedy_flags_are_those_of_lm_evals_hf_model(pool, run_folder, expected):
    """Continuations of shared, short, empty and too long contexts, of which some are what greedy decoding writes."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(run_folder / "hf"), dtype="float32", device="cpu", batch_size=1, max_length=64)
    shared = "one two three four five six seven"
    contexts = [shared, shared, "x", "", "word " * 40, shared, "y", shared]
    pairs = [(context, f" {WORDS[i]} {WORDS[i + 1]}") for i, context in enumerate(contexts)]
    pairs += [(shared, text) for text in _greedy(lm, shared)]
    theirs = lm.loglikelihood([_request(pair) for pair in pairs], disable_tqdm=True)
    ours = pool.run(2, training_ranks.lm_eval_loglikelihood, run_folder, {"pipeline": 2}, 64, pairs)
    assert ours[0] == ours[1]
    assert [logprob for logprob, _ in ours[0]] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours[0]] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in theirs} == {True, False}


def _request(pair):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, pair, 0)


def _greedy(lm, context):
    """Return what greedy decoding writes after a context, up to 1 and 3 tokens, where it is text."""
    import torch

    ids = lm.tok_encode(context)
    made = lm.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0]
    texts = [lm.tok_decode(made[len(ids) : len(ids) + count].tolist()) for count in (1, 3)]
    return [text for text in texts if text.strip() and lm.tok_encode(context + text)[: len(ids)] == ids]


def test_a_log_likelihood_that_lm_eval_calls_perplexity_is_no_item_of_it():
    """Neither a row nor the mean over several tasks has it, and the primary metric is one that rows have."""
    from megatron_align.evaluation import lm_eval_results
    from megatron_align.evaluation.lm_eval_results import _items

    samples = [
        {"doc_id": i, "arguments": [["q", "a"]], "target": "a", "filter": "none", "resps": [], "acc": i % 2,
         "metrics": ["perplexity", "acc"], "perplexity": -1.0 - i, "doc_hash": "", "prompt_hash": "", "target_hash": ""}
        for i in range(4)
    ]  # fmt: skip
    metrics = {"perplexity,none": math.exp(2.5), "acc,none": 0.5, "perplexity_stderr,none": 1.0}
    found = {"results": dict.fromkeys("ab", metrics), "samples": dict.fromkeys("ab", samples)}
    for names in ("a", "ab"):
        items = _items(found, lm_eval_results.LoadedTask(None, [], list(names), None, None))
        assert (items.primary, items.entry["acc"]) == ("acc", 0.5)
        assert items.entry["ci95"][1] <= 1
        assert not any("perplexity" in row for row in items.rows)
    assert "perplexity" not in items.entry
    assert items.entry["sources"]["a"]["perplexity"] == math.exp(2.5)


def test_chat_templates_read_the_date_of_the_evaluation(tiny_models):
    """Text is that of the tokenizer's own method in all else, of a message that is continued too."""
    from megatron_align.evaluation.lm_eval import PolicyLM
    from megatron_align.training.likelihood import CompletionScorer

    score = CompletionScorer(chunks=[], parallel=None, groups=None, watchdog=None, sequence_length=8)
    lm = PolicyLM(score, tiny_models(), now=datetime(2020, 2, 29))
    turns = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "The answer: "}]
    for content in ("m.content", "m.content | trim"):
        body = "{% for m in messages %}[{{ m.role }}]{{ " + content + " }}<|im_end|>{% endfor %}"
        body += "{% if add_generation_prompt %}[assistant]{% endif %}"
        for count, prompt in ((1, True), (2, False)):
            lm.tokenizer.chat_template = body
            wanted = lm.tokenizer.apply_chat_template(
                turns[:count], tokenize=False, add_generation_prompt=prompt, continue_final_message=not prompt
            )
            lm.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + body
            assert lm.apply_chat_template(turns[:count], prompt) == f"29 Feb 2020{wanted}"


def test_what_lm_eval_cannot_load_is_one_line(tmp_path):
    from megatron_align.evaluation.config import load_evaluation
    from megatron_align.evaluation.lm_eval_results import load_lm_eval

    def load(**options):
        task = {"name": "t", "kind": "lm_eval", "data": str(tmp_path / "broken.yaml"), **options}
        return load_lm_eval(load_evaluation({"model": "m", "out": "o", "tasks": [task]}).tasks[0])

    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: [")
    with pytest.raises(InputError, match="task t: lm-eval could not load .*broken.yaml"):
        load()
    (tmp_path / "broken.yaml").write_text(
        f"task: broken\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.json}}\n"
    )
    with pytest.raises(InputError, match="task t: lm-eval could not load .*none.json"):
        load()
    (tmp_path / "docs.json").write_text(json.dumps(DOCS[0]))
    (tmp_path / "broken.yaml").write_text(
        TASKS["sums"].replace("{{question}}", "{{nope}}")
        + DATASET.format(data=tmp_path / "docs.json", cache=tmp_path / "cache")
    )
    with pytest.raises(InputError, match="task t: lm-eval could not load .*broken.yaml: 'nope' is undefined"):
        load()
    for options, line in (
        ({"num_fewshot": -1}, "num_fewshot must not be negative"),
        ({"include_path": str(tmp_path / "none")}, "include_path must be a folder"),
    ):
        with pytest.raises(InputError, match=line):
            load(**options)


def test_options_of_generation_are_read_or_refused():
    from megatron_align.evaluation.lm_eval import _sampling

    greedy = _sampling(
        {"until": ["a", ""], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0, "top_p": 0.9}, 3
    )
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens, greedy.stop) == (0, 1, 7, ("a",))
    drawn = _sampling({"until": "x", "do_sample": True, "temperature": 0.7, "top_k": 5}, 3)
    assert (drawn.temperature, drawn.top_k, drawn.max_tokens, drawn.stop, drawn.seed) == (
        0.7,
        5,
        256,
        ("x",),
        3,
    )
    with pytest.raises(InputError, match="got num_beams"):
        _sampling({"num_beams": 4}, 3)
