"""Load the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_align.errors import InputError, one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tokenization_*.py",
)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; nothing is ever downloaded.

    Raises:
        InputError: if the folder or its tokenizer is missing or malformed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: must be a Hugging Face folder with a tokenizer, found none")
    if not any(next(path.glob(name), None) for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: must hold a tokenizer (one of {', '.join(TOKENIZER_FILES)}), found none")
    try:
        # trust_remote_code: left unset, transformers prompts on the terminal and a job would hang
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except RecursionError as error:
        raise InputError(
            f"{folder}: tokenizer could not be loaded: a JSON file is nested too deeply"
        ) from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise InputError(f"{folder}: tokenizer could not be loaded: {one_line(error)}") from error
    except Exception as error:
        # The tokenizers library raises bare Exception; subclasses not listed above are bugs.
        if type(error) is not Exception:
            raise
        raise InputError(f"{folder}: tokenizer could not be loaded: {one_line(error)}") from error
