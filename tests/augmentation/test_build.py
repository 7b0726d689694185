"""A build counts what every step drops, its pairs are chat data, and no request is sent twice, also after a kill."""

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from megatron_align.augmentation import build as build_module
from megatron_align.augmentation.build import BuildOptions, build
from megatron_align.augmentation.pairs import WriterOptions
from megatron_align.augmentation.texts import TEMPLATE, filled
from megatron_align.curation.chat_models import ChatOptions
from megatron_align.data.formats.files import read_file
from megatron_align.errors import InputError
from megatron_align.tools.main import main
from tests.augmentation import scripted
from tests.harness.http_server import serving

SCRIPT = f"{scripted.__file__}:reply"
LENGTH, KIND, FIRST_WORD, QUESTIONS = (
    f"{scripted.__file__}:{name}" for name in ("length", "kind", "first_word", "questions")
)
POEM = "Plain: write a poem about the sea"
PROMPTS = [
    {"prompt": "Stubborn 1: what is 2 + 2?"},
    {"prompt": "Answered 2: how much is three times seven?"},
    {"prompt": "Corrected 3: explain the rainbow to somebody"},
    {"messages": [{"role": "user", "content": POEM}, {"role": "assistant", "content": "No."}]},
    {"prompt": "plain:  write a poem about the SEA"},
    {"prompt": "Plain: write a poem about the sea"},
    {"question": " "},
    {"prompt": "Unlabelled Ω"},
    {"text": "no prompt"},
]  # fmt: skip
EXAMPLES = [
    {"prompt": "What is 3 + 3?", "complement": "Show the steps.", "category": "maths"},
    {"prompt": "Write a song", "ape": "Two verses are enough.", "category": "writing"},
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def options(tmp_path):
    return {
        "prompts": write(tmp_path / "prompts.jsonl", PROMPTS),
        "examples": write(tmp_path / "examples.jsonl", EXAMPLES),
        "out": str(tmp_path / "out"),
        "generator": SCRIPT,
        "quality": LENGTH,
        "min_quality": 1.5,
        "labels": KIND,
    }


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]


def test_every_step_is_counted_and_the_pairs_are_chat_data(options, tmp_path):
    counts = build(BuildOptions(**options)).to_dict()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == counts
    assert counts["records"] == 9
    dropped = {name: count for name, count in counts["dropped"].items() if count}
    assert dropped == {"malformed": 1, "empty": 1, "equal": 1, "near_duplicate": 1, "low_quality": 1}
    assert counts["prompts"] == 4
    assert counts["pairs"] == 3
    assert counts["given_up"] == {"faulty": 1}
    faults = {name: count for name, count in counts["faults"].items() if count}
    assert faults == {"excess": 3, "answering": 1, "unnamed": 1}
    assert (counts["complements"], counts["regenerated"], counts["corrected"]) == (4 + 4, 3, 1)
    assert counts["categories"] == {
        "maths": {"prompts": 3, "pairs": 2},
        "writing": {"prompts": 1, "pairs": 1},
    }
    shape, records = read_file(str(tmp_path / "out" / "data.jsonl"))
    assert (shape.name, len(list(records))) == ("messages", 3)
    data = rows_of(tmp_path / "out" / "data.jsonl")
    assert [row["messages"][1]["content"] for row in data] == [
        "Keep it short. (1)",
        "For a child.",
        "Keep it short. (0)",
    ]
    assert data[2]["messages"][0]["content"] == filled(TEMPLATE, "Plain: write a poem about the sea")
    assert data[0]["category"] == "maths"
    rejected = rows_of(tmp_path / "out" / "rejected.jsonl")
    assert [row["complement"] for row in rejected if row.get("faults") == ["answering"]] == [
        "The answer is 4."
    ]
    assert Counter(row["step"] for row in rejected)["critique"] == 5
    assert all(row["where"].startswith(str(tmp_path)) for row in rejected)


class Served:
    """The script as an OpenAI-compatible endpoint that notes its requests, and may die after some of them."""

    def __init__(self, dies_after=None, answer=None):
        self.bodies, self.dies_after, self.answer = [], dies_after, answer
        self.lock = threading.Lock()

    def __call__(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "big"}]}
        assert path == "/v1/chat/completions"
        with self.lock:
            if self.dies_after is not None and len(self.bodies) >= self.dies_after:
                return 400, "gone"
            self.bodies.append(json.dumps(body, sort_keys=True))
        if self.answer:
            return self.answer(body)
        text = body["messages"][0]["content"]
        prompt = text.rpartition("<User prompt>: ")[2].partition("\n")[0]
        task = "quality" if text.startswith("Rate") else "label" if text.startswith("Choose") else "generate"
        complement = ""
        if text.startswith("Review"):
            task = "critique"
            complement = text.rpartition("<Complementary information>: ")[2].partition("\n\nDo not answer")[0]
        if task == "quality":
            made = {"score": scripted.length([prompt])[0]}
        elif task == "label":
            made = {"category": scripted.kind([prompt])[0]}
        else:
            made = scripted.reply(
                task, prompt, complement, ["x"] * text.count("An earlier attempt was refused")
            )
        content = made if isinstance(made, str) else json.dumps(made)
        return 200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


@pytest.fixture
def of(options):
    def with_url(url, **more):
        roles = {"generator": url, "quality": url, "labels": url}
        chat = ChatOptions(workers=2, timeout=60, tries=1)
        return BuildOptions(**{**options, **roles, "chat": chat, **more})

    return with_url


def test_a_build_that_stops_sends_no_request_twice_and_ends_in_the_same_files(of, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "CHUNK", 2)
    served = Served()
    with serving(served) as url:
        build(of(url, out=str(tmp_path / "whole")))
        every = sorted(served.bodies)
        assert len(every) == len(set(every)) > 15
        served.bodies.clear()
        for dies_after in (3, 9, 14):
            served.dies_after = dies_after
            line = (
                r"requests failed, 1 are allowed; the last: .*refused.*; replies are kept: the same command"
            )
            with pytest.raises(InputError, match=line):
                build(of(url, failures=1))
            assert not (tmp_path / "out" / "data.jsonl").exists()
        served.dies_after = None
        replies = tmp_path / "out" / "replies" / "generate.jsonl"
        replies.write_bytes(replies.read_bytes() + b'{"key": "cut')  # killed within a line
        counts = build(of(url))
        assert counts.reused > 0
        assert sorted(served.bodies) == every
        for name in ("data.jsonl", "report.json", "rejected.jsonl"):
            first, second = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "out"))
            assert first == second
        (tmp_path / "out" / "data.jsonl").unlink()
        served.bodies.clear()
        assert build(of(url, min_quality=0.5)).made > 0  # another threshold uses the same replies
        assert all("Unlabelled" in body for body in served.bodies)


def test_replies_that_are_no_json_are_requested_again_and_then_counted(of):
    def answer(body):
        text = body["messages"][0]["content"]
        content = {"Rate": '{"score": "7"}', "Choo": '{"category": " MATHS"}', "Revi": "I think it is fine."}
        return 200, {"choices": [{"message": {"content": content.get(text[:4], "Be brief.")}}]}

    served = Served(answer=answer)
    with serving(served) as url, pytest.raises(InputError, match="no pair is left of 9 records"):
        build(of(url, writer=WriterOptions(tries=2)))
    report = json.loads((Path(of(url).out) / "report.json").read_text())
    assert report["given_up"] == {"unjudged": 5}
    critiques = [json.loads(body) for body in served.bodies if "Review complementary" in body]
    assert [body["temperature"] for body in critiques].count(0) == 5
    assert len(critiques) == 10


def test_prompts_that_the_endpoint_has_no_room_for_are_counted(of, tmp_path):
    def answer(body):
        text = body["messages"][0]["content"]
        if "Corrected" in text and text.startswith("Write"):
            return 400, {"error": "This model's maximum context length is 64 tokens, you requested 99."}
        content = {"Rate": '{"score": 7}', "Choo": '{"category": "maths"}', "Revi": '{"Is_correct": "Yes"}'}
        return 200, {"choices": [{"message": {"content": content.get(text[:4], "Be brief.")}}]}

    with serving(Served(answer=answer)) as url:
        counts = build(of(url, failures=0))
    assert (dict(counts.writer.given_up), counts.pairs.total()) == ({"too_long": 1}, 4)


def test_functions_columns_and_categories_without_examples(options, tmp_path):
    prompts = [
        {"prompt": "Maths is fun, is it?", "grade": 3},
        {"prompt": "Physics is fun too, or is it not?", "grade": 5},
        {"prompt": "Maths is hard sometimes", "grade": 9},
    ]
    options["prompts"] = write(tmp_path / "prompts.jsonl", prompts)
    by_function = {"quality": QUESTIONS, "labels": FIRST_WORD}
    counts = build(BuildOptions(**{**options, **by_function}))
    assert counts.selection.dropped == {"unscored": 1, "without_examples": 1}
    assert counts.selection.without_examples == {"physics": 1}
    write(tmp_path / "examples.jsonl", [*EXAMPLES, {"prompt": "p", "complement": "c"}])  # serves all others
    changes = {"quality": "column:grade", "min_quality": 4, "out": str(tmp_path / "other")}
    counts = build(BuildOptions(**{**options, **by_function, **changes}))
    assert (counts.selection.dropped, counts.pairs) == ({"low_quality": 1}, {"maths": 1, "physics": 1})


def test_a_local_model_writes_and_what_it_wrote_is_kept(options, tiny_models, tmp_path, monkeypatch):
    """An untrained model never ends by itself: everything is cut, counted and logged; a second start loads nothing."""
    model = str(tiny_models())  # 2048 positions, a token is a byte
    room = 2000 - 3 - len(TEMPLATE)
    prompts = [{"prompt": "one"}, {"prompt": "w" * (room + 9)}, {"prompt": "x" * (room - 60)}]
    options |= {"quality": None, "min_quality": None, "labels": None, "generator": model, "critic": "none"}
    options |= {"tokenizer": model, "context": 2000}
    options["prompts"] = write(tmp_path / "prompts.jsonl", prompts)
    options["examples"] = write(tmp_path / "examples.jsonl", [{"prompt": "p" * 99, "complement": "c"}])
    built = BuildOptions(**options, writer=WriterOptions(max_tokens=3, regenerations=1, shots=1))
    with pytest.raises(InputError, match="no pair is left of 3 records"):
        build(built)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped"]["too_long"] == 1
    assert report["faults"]["cut"] + report["faults"]["empty"] == report["complements"] == 2
    assert report["given_up"] == {"faulty": 1, "too_long": 1}  # the request with its example, for the engine
    monkeypatch.setattr("megatron_align.curation.chat_models.open_engine", lambda *_: pytest.fail("kept"))
    options["prompts"] = write(tmp_path / "prompts.jsonl", prompts[:2])
    with pytest.raises(InputError, match="no pair is left of 2 records"):
        build(BuildOptions(**options, writer=WriterOptions(max_tokens=3, regenerations=1, shots=1)))


BAD = {
    "no generator": ({"generator": "nowhere"}, "generator must be http://.*found nothing at nowhere"),
    "no function": ({"generator": SCRIPT.replace(":reply", ":repyl")}, "no function 'repyl' .*did you mean 'reply'"),
    "threshold": ({"quality": None}, "min_quality needs quality"),
    "duplicates": ({"duplicates": 0}, r"duplicates must be in \(0, 1\]"),
    "examples": ({"examples": "none.jsonl"}, "none.jsonl: must be a data file"),
    "endpoint": ({"generator": "http://127.0.0.1:9#m"}, "^[1-4] requests failed, 0 are allowed; the last: http"),
    "embeddings": ({"duplicates": 1.0, "embeddings": "column:e"}, "must be below 1 with embeddings"),
    "no embeddings": ({"embeddings": "column:e"}, "field 'e' must be a list of numbers, got null"),
    "column": ({"labels": "column:"}, "needs the name of a field"),
    "small context": ({"tokenizer": "x", "context": 100}, "must hold a prompt and a complement of 256 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("changes, line", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(options, tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        build(BuildOptions(**{**options, "failures": 0, "chat": ChatOptions(tries=1), **changes}))
    assert not (tmp_path / "out" / "data.jsonl").exists()


def test_the_command_prints_the_counts(options, tmp_path, capsys):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["pas", "build", *arguments]) == 0
    out = capsys.readouterr().out
    assert "         9  records\n" in out
    assert "        -1  near duplicates of an earlier prompt\n" in out
    assert "  maths    2 of 3 prompts\n" in out
    assert out.endswith(f"3 pairs: {tmp_path}/out/data.jsonl\n")
    assert main(["pas", "build", *arguments]) == 2
    assert "out holds data already" in capsys.readouterr().err
