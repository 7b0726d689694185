"""A folder without a usable tokenizer is named in one line."""

import pytest

from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError

TOKENIZERS = {
    "nothing": {},
    "model only": {"config.json": '{"model_type": "qwen2"}'},
    "broken": {"tokenizer.json": "{"},
    "empty": {"tokenizer.json": "{}"},
    "no such model": {"tokenizer.json": '{"added_tokens": [], "model": {"type": "Nope"}}'},
    "100,000 brackets": {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": ' * 100_000},
    "5,000 digits": {"tokenizer.json": "{}", "tokenizer_config.json": f'{{"a": {"9" * 5_000}}}'},
    "own code": {
        "tokenization_x.py": "",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}',
    },
}


@pytest.mark.parametrize("files", TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_bad_tokenizers_are_named(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}: ") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="must be a Hugging Face folder"):
        load_tokenizer(str(tmp_path / "no"))
