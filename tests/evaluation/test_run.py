"""Law 12: every score equals a loop over transformers, on every layout, of a folder and of a checkpoint."""

import hashlib
import json
from datetime import date

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_align.errors import InputError
from megatron_align.evaluation.compare import compare
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_model, run_arguments, write_pairs

CHOICES = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a), f"{a}{b}", str(a * b + 7)], "answer": answer}
    for a, b, answer in ((12, 30, 0), (7, 5, "A"), (100, 3, "1003"), (9, 9, 3), (21, 4, "D"))
]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def logprobs_after(model, prompt, ids):
    """Return the log-prob of every token of ``ids`` after the first ``prompt``."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids)[1:, None])[prompt - 1 :, 0]


class Judge:
    """transformers' model, one unpadded sequence at a time."""

    def __init__(self, folder):
        self.model, self.tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )

    def chat(self, messages, prompt=False):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

    def loss(self, chats):
        total = count = 0
        for chat in chats:
            full = self.chat(chat["messages"])
            for i, message in enumerate(chat["messages"]):
                if message["role"] == "assistant":
                    start, end = (
                        len(self.chat(chat["messages"][:i], True)),
                        len(self.chat(chat["messages"][: i + 1])),
                    )
                    values = logprobs_after(self.model, start, full)[: end - start]
                    total, count = total - values.sum().item(), count + len(values)
        return total / count

    def pair_scores(self, pair):
        prompt = len(self.chat(pair["prompt"], True))
        both = (self.chat(pair["prompt"] + pair[side]) for side in ("chosen", "rejected"))
        return [logprobs_after(self.model, prompt, ids) for ids in both]

    def choice(self, item):
        prompt = self.tokenizer(item["question"])["input_ids"]
        sums = []
        for choice in item["choices"]:
            ids = self.tokenizer(f"{item['question']} {choice}")["input_ids"]
            sums.append(logprobs_after(self.model, len(prompt), ids).sum().item())
        right = item["answer"]
        right = item["choices"].index(right) if right in item["choices"] else right
        return sums, "ABCD".index(right) if isinstance(right, str) else right

    def answer(self, chat, tokens):
        ids = self.chat(chat["messages"][:-1], True)
        made = self.model.generate(
            torch.tensor([ids]),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=0,
        )
        return self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory, chat_file, tiny_models):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in CHOICES))
    pairs = (write_pairs(folder / "pairs.jsonl", 20), write_pairs(folder / "more.jsonl", 7, seed=9))
    reference = make_model(folder / "reference", initializer_range=0.05)  # another random draw
    chats = lines(chat_file)[:12]
    judge = Judge(tiny_models())
    for i, chat in enumerate(
        chats
    ):  # answers that the model gives to some of the prompts, so that some are right
        if i % 3 == 0:
            chat["answer"] = judge.answer(chat, 8)
    (folder / "asked.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return {
        "folder": folder,
        "chat": chat_file,
        "pairs": pairs,
        "reference": reference,
        "asked": folder / "asked.jsonl",
    }


@pytest.fixture(scope="module")
def tasks(files):
    pairs = [str(file) for file in files["pairs"]]
    preference = {"kind": "preference", "data": pairs}
    return [
        {"name": "chat", "kind": "loss", "data": str(files["chat"])},
        {"name": "pairs", **preference},
        {"name": "per_token", **preference, "score": "per_token"},
        {"name": "implicit", **preference, "score": "implicit_reward", "reference": str(files["reference"])},
        {"name": "choice", "kind": "choice", "data": str(files["folder"] / "choices.jsonl")},
        {"name": "answers", "kind": "generate", "data": str(files["asked"]), "max_tokens": 8},
    ]


@pytest.fixture(scope="module")
def expected(files, tiny_models):
    """Return the results of the loop over transformers."""
    judge, reference = Judge(tiny_models()), Judge(files["reference"])
    pairs = [pair for file in files["pairs"] for pair in lines(file)]
    scored, compared = [judge.pair_scores(p) for p in pairs], [reference.pair_scores(p) for p in pairs]
    margins = {
        "pairs": [(c.sum() - r.sum()).item() for c, r in scored],
        "per_token": [(c.mean() - r.mean()).item() for c, r in scored],
        "implicit": [
            (c.sum() - r.sum() - a.sum() + b.sum()).item()
            for (c, r), (a, b) in zip(scored, compared, strict=True)
        ],
    }
    choices = [judge.choice(item) for item in CHOICES]
    norm = [
        [s / len(c) for s, c in zip(sums, item["choices"], strict=True)]
        for (sums, _), item in zip(choices, CHOICES, strict=True)
    ]
    asked = lines(files["asked"])
    right = [
        " ".join(judge.answer(c, 8).split())
        == " ".join(c.get("answer", c["messages"][-1]["content"]).split())
        for c in asked
    ]
    return {
        "loss": judge.loss(lines(files["chat"])),
        "margins": margins,
        "choice": sum(sums.index(max(sums)) == answer for sums, answer in choices) / len(choices),
        "choice_sums": [sums for sums, _ in choices],
        "choice_norm": sum(n.index(max(n)) == answer for n, (_, answer) in zip(norm, choices, strict=True))
        / len(norm),
        "answers": sum(right) / len(right),
    }


def check(out, results, expected):
    tasks = results["tasks"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    # fp32 forward passes whose sums differ in order: as the layout law
    assert tasks["chat"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert tasks["chat"]["n"] == 64
    for name, margins in expected["margins"].items():
        got = [row["margin"] for row in lines(out / "items" / f"{name}.jsonl")]
        assert got == pytest.approx(margins, abs=1e-3 if name != "per_token" else 1e-5)
        assert tasks[name]["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 27)
        of_sources = list(tasks[name]["sources"].values())
        assert [s["n"] for s in of_sources] == [20, 7]
        assert sum(s["accuracy"] * s["n"] for s in of_sources) == pytest.approx(tasks[name]["accuracy"] * 27)
    sums = [row["logprobs"] for row in lines(out / "items" / "choice.jsonl")]
    for got, want in zip(sums, expected["choice_sums"], strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert tasks["choice"]["accuracy"] == pytest.approx(expected["choice"])
    assert tasks["choice"]["accuracy_norm"] == pytest.approx(expected["choice_norm"])
    assert tasks["answers"]["exact_match"] == pytest.approx(expected["answers"])
    assert 0 < expected["answers"] < 1
    for task in tasks.values():
        low, high = task["ci95"]
        assert low <= high


LAYOUTS = {
    "one": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "context": {"context": 2},
    "data": {},
    "mixed": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
}
RANKS = {"one": 1, "mixed": 4}


# The mixed one has tensor and pipeline ranks too.
@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["tensor", "pipeline", "data"]))
def test_scores_equal_transformers_on_every_layout(pool, tiny_models, tasks, expected, tmp_path, layout):
    config = {
        "model": str(tiny_models()),
        "precision": "fp32",
        "out": str(tmp_path),
        "parallel": LAYOUTS[layout],
    }
    results = pool.run(RANKS.get(layout, 2), training_ranks.evaluate, {**config, "tasks": tasks})
    assert all(other == results[0] for other in results)
    check(tmp_path, results[0], expected)


def test_the_date_that_templates_read_is_fixed_and_recorded(pool, tiny_models, files, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    )
    data = {"chat_template": str(template), "limit": 2}
    asked = {"name": "asked", "kind": "generate", "data": str(files["asked"]), "max_tokens": 2, **data}
    chat = {"name": "chat", "kind": "loss", "data": str(files["chat"]), "chat_template": str(template)}
    plain = {"name": "plain", "kind": "loss", "data": str(files["chat"])}
    text = {"name": "text", "kind": "choice", "data": str(files["folder"] / "choices.jsonl"), **data}
    config = {"model": str(tiny_models()), "precision": "fp32", "tasks": [asked, chat, plain, text]}
    results = {}
    for day in ("2024-02-28", "2024-02-29", None):
        given = {**config, "out": str(tmp_path / str(day)), "template_date": day}
        [results[day]] = pool.run(1, training_ranks.evaluate, given)
    one, other, today = results.values()
    assert one["template_date"] == "2024-02-28"
    assert one["clock"] == {"asked": {"%d %b": "28 Feb"}, "chat": {"%d %b": "28 Feb"}}
    assert {name: len(hashes) for name, hashes in one["data"].items()} == dict.fromkeys(one["tasks"], 1)
    assert one["files"]["asked"] == {"chat_template": hashlib.sha256(template.read_bytes()).hexdigest()}
    assert one["tasks"]["plain"] == other["tasks"]["plain"]
    assert one["tasks"]["chat"]["loss"] != other["tasks"]["chat"]["loss"]
    assert date.fromisoformat(today["template_date"]) >= date(2026, 1, 1)
    with pytest.raises(
        InputError, match="asked must be defined identically .* template_date 2024-02-28 and 2024-02-29"
    ):
        compare(tmp_path / "2024-02-28", tmp_path / "2024-02-29")


def test_a_sharded_checkpoint_is_evaluated_without_export(pool, tiny_models, chat_file, tasks, tmp_path):
    arguments = run_arguments(
        tiny_models(),
        chat_file,
        tmp_path / "run",
        train__steps=1,
        checkpoint__export_hf=True,
        parallel__tensor=2,
    )
    pool.run(2, training_ranks.train, arguments)
    results = {}
    for name, model in (("sharded", tmp_path / "run"), ("exported", tmp_path / "run" / "hf")):
        config = {
            "model": str(model),
            "precision": "fp32",
            "out": str(tmp_path / name),
            "parallel": {"pipeline": 2},
        }
        results[name] = pool.run(2, training_ranks.evaluate, {**config, "tasks": tasks})[0]["tasks"]
    assert results["sharded"] == results["exported"]


def test_a_reward_model_scores_pairs_as_transformers(pool, files, tmp_path):
    folder = make_model(tmp_path / "reward", "qwen2_reward")
    task = {"name": "pairs", "kind": "preference", "data": str(files["pairs"][0])}
    config = {
        "model": str(folder),
        "precision": "fp32",
        "out": str(tmp_path / "out"),
        "parallel": {"tensor": 2},
    }
    [result, _] = pool.run(2, training_ranks.evaluate, {**config, "tasks": [task]})
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    margins = []
    for pair in lines(files["pairs"][0]):
        rewards = []
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            with torch.no_grad():
                rewards.append(model(torch.tensor([ids])).logits[0, 0].item())
        margins.append(rewards[0] - rewards[1])
    assert [row["margin"] for row in lines(tmp_path / "out" / "items" / "pairs.jsonl")] == pytest.approx(
        margins, abs=1e-4
    )
    assert result["tasks"]["pairs"]["accuracy"] == sum(m > 0 for m in margins) / 20
