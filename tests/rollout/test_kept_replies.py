"""Kept replies survive a kill at any byte: those of complete lines are read again, and none that follows is lost."""

from megatron_align.rollout.kept_replies import KeptReplies, content_key


def test_a_cut_line_costs_itself_only(tmp_path):
    file = tmp_path / "replies.jsonl"
    kept = KeptReplies(file)
    for text in ("one", "zwei", "三"):
        kept.add(content_key("prompt", text), text)
    kept.add(content_key("prompt", "one"), "again")
    kept.close()
    complete = file.read_bytes()
    assert KeptReplies(file).of(content_key("prompt", "one")) == ["one", "again"]
    for length in range(0, len(complete), 3):
        file.write_bytes(complete[:length])
        continued = KeptReplies(file)
        before = complete[:length].count(b"\n")
        found = [text for text in ("one", "zwei", "三") if continued.of(content_key("prompt", text))]
        assert found == ["one", "zwei", "三"][:before]
        continued.add("key", "new")
        continued.close()
        assert KeptReplies(file).of("key") == ["new"]
