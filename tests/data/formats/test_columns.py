"""Columns may have other names; fields that mean something in other tools are refused, the rest is named."""

import pytest

from megatron_align.data.formats.columns import FieldUse, fields_text
from megatron_align.data.formats.files import read_file
from megatron_align.data.store import read_manifest
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.errors import InputError
from megatron_align.records import Completion

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [ASK, ANSWER]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_columns_are_read_by_other_names(jsonl):
    path = jsonl([{"question": "q", "answer": "a", "completion": "x", "id": 1, "importance": 2}])
    fields = FieldUse()
    columns = {"prompt": "question", "completion": "answer", "weight": "importance"}
    shape, records = read_file(path, columns=columns, fields=fields)
    assert (shape.name, list(records)) == ("prompt_completion", [Completion("q", "a", f"{path}:1", 2.0)])
    assert fields_text({"fields": fields.in_manifest()}) == (
        "prompt (column question), completion (column answer), weight (column importance) used; id left alone"
    )
    swapped = {"prompt": "completion", "completion": "prompt"}
    (record,) = read_file(jsonl([{"prompt": "a", "completion": "q"}]), columns=swapped)[1]
    assert (record.prompt, record.completion) == ("q", "a")


REFUSED = {
    "images": ({**CHAT, "images": ["a.png"]}, "field 'images' cannot be trained, as only text is"),
    "image": ({**PAIR, "image": {"bytes": "x"}}, "field 'image' cannot be trained"),
    "videos": ({**CHAT, "videos": "v.mp4"}, "field 'videos' cannot be trained"),
    "audios": ({**CHAT, "audios": [["a.wav"]]}, "field 'audios' cannot be trained"),
    "images of a turn": (
        {"messages": [{**ASK, "images": ["a.png"]}, ANSWER]},
        "field 'messages\\[0\\].images' cannot be trained",
    ),
    "image part": (
        {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        "'messages\\[0\\].content\\[0\\].type' must be text, as only text is trained, got 'image_url'",
    ),
    "rejected_response": (
        {**CHAT, "rejected_response": "b"},
        "field 'rejected_response' is of a preference pair",
    ),
    "rejected_messages": ({**CHAT, "rejected_messages": [ANSWER]}, "'rejected_messages' is of a preference"),
    "rejected": ({"instruction": "q", "output": "a", "rejected": "b"}, "'rejected' is of a preference pair"),
    "answer_rejected": (
        {"prompt": "q", "completion": "a", "answer_rejected": "b"},
        "'answer_rejected' is of a preference pair",
    ),
    "labelled": (
        {"prompt": "q", "completion": "a", "label": True, "rejected": "b"},
        "'rejected' is of a preference",
    ),
    "sample_weight": ({**PAIR, "sample_weight": 2}, "field 'sample_weight' is not read: 'weight' is"),
    "margins": ({**PAIR, "margins": 2}, "field 'margins' is not read: 'margin' is"),
    "reference": ({**PAIR, "ref_chosen_logps": -3.0}, "'ref_chosen_logps' is not read: the run computes"),
    "loss_scale": (
        {"messages": [ASK, {**ANSWER, "loss_scale": 2}]},
        "'messages\\[1\\].loss_scale' is not read: the chat template decides",
    ),
    "masked": ({"messages": [ASK, {**ANSWER, "masked": True}]}, "'messages\\[1\\].masked' is not read"),
}


@pytest.mark.parametrize("record, expected", REFUSED.values(), ids=list(REFUSED))
def test_fields_with_a_meaning_are_refused_in_any_record(record, expected, jsonl):
    plain = {name: value for name, value in record.items() if name in (*CHAT, *PAIR, "instruction", "output")}
    plain = {**plain, **({"completion": "a"} if "completion" in record else {})}
    if record.get("instruction") or record.get("completion"):
        plain.pop("rejected", None)
    lines = [record] if "messages" in expected or "label" in record else [plain, record]
    path = jsonl(lines)
    with pytest.raises(InputError, match=expected) as error:
        list(read_file(path)[1])
    assert str(error.value).startswith(f"{path}:{len(lines)}: ")


def test_empty_fields_and_those_left_alone_by_name_are_no_error(jsonl):
    empty = {"images": [], "videos": None, "audio": "", "rejected_response": None}
    assert len(list(read_file(jsonl([{**CHAT, **empty}, CHAT]))[1])) == 2
    path = jsonl([{**CHAT, "images": ["a.png"], "rejected_response": "b"}])
    (record,) = read_file(path, columns={"images": None, "rejected_response": None})[1]
    assert [message.content for message in record.messages] == ["q", "a"]
    named = jsonl([{**CHAT, **PAIR}])  # as UltraFeedback has it: its messages are the chosen conversation
    assert read_file(named, "messages")[0].kind == "chat"


def test_loss_of_a_turn_is_its_train_flag(jsonl):
    turns = [ASK, {**ANSWER, "loss": False}, {**ASK, "loss": False}, {**ANSWER, "loss": True}]
    (record,) = read_file(jsonl([{"messages": turns}]))[1]
    assert [m.train for m in record.messages] == [True, False, False, True]
    assert not any(m.extra for m in record.messages)
    for bad, expected in (
        ({**ANSWER, "loss": 1}, "loss' must be true or false, got 1"),
        ({**ANSWER, "loss": False, "train": True}, "loss' must agree with 'train', got False, True"),
        ({**ASK, "loss": True}, "loss' must belong to an assistant turn"),
    ):
        with pytest.raises(InputError, match=expected):
            list(read_file(jsonl([{"messages": [bad, ANSWER]}]))[1])


def test_the_store_notes_what_was_used(make):
    store = prepare(make([{**CHAT, "id": 1}, {**CHAT, "source": "x", "weight": 2}]))
    manifest = read_manifest(store)
    assert manifest["fields"] == {"used": ["messages", "weight"], "left": ["id", "source"]}
    many = {"fields": {"used": ["messages"], "left": [f"c{i}" for i in range(12)]}}
    assert fields_text(many).endswith("c8, c9 and 2 more left alone")
    assert "earlier version" in fields_text({})


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"promt": "question"}, "got 'promt'; did you mean 'prompt'"),
        ({"prompt": "x", "completion": "x"}, "must read each column once, got 'x' twice"),
        (
            {"messages": "mesages"},
            "must have the column 'mesages' of data.columns, .*; did you mean 'messages'",
        ),
        ({"weight": "wait"}, "must have the column 'wait' of data.columns"),
    ],
)
def test_bad_columns_are_named(columns, expected, make):
    with pytest.raises(InputError, match=expected):
        prepare(make([CHAT], columns=columns))
