"""A file that is not a Jinja chat template is refused, with its line."""

import pytest

from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.errors import InputError

CHAT_TEMPLATES = {
    "nothing": (None, ": data.chat_template must be a file with a Jinja chat template, found nothing"),
    "empty": (b" \n", ": data.chat_template must hold a Jinja chat template, got an empty file"),
    "not text": (b"\xff", ": data.chat_template could not be read: "),
    "not Jinja": (b"{% for m in messages %}\n{% endif %}", ":2: data.chat_template must be Jinja, got: "),
}


@pytest.mark.parametrize("content, expected", CHAT_TEMPLATES.values(), ids=list(CHAT_TEMPLATES))
def test_bad_chat_templates_are_named(content, expected, tmp_path):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}{expected}") as error:
        load_chat_template(str(file))
    assert "\n" not in str(error.value)
