"""The key of a token store: a hash of everything that decides its content, files by their content."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import transformers

from megatron_align.config import DataSource, RunConfig
from megatron_align.data.formats.files import expand, read_file
from megatron_align.data.formats.recognise import PLAIN_TEXT
from megatron_align.data.formats.rules_version import may_hold, rules_version
from megatron_align.data.store import VERSION, sha256
from megatron_align.data.tokenize.chat_template import has_marks, load_chat_template
from megatron_align.data.tokenize.plain_text import changed_since_first_version
from megatron_align.data.tokenize.template_clock import parse_date, reads_of_clock, tokenizer_templates
from megatron_align.data.tokenize.turn_options import TurnOptions
from megatron_align.errors import InputError

CACHE_IN_RUN = "data_cache"  # inside checkpoint.dir, where data.cache is not given
HASHES = ".hashes.json"
SETTLED_SECONDS = 3.0  # a file changed this recently may change again within one tick of its clock
_TOKENIZER_PARTS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """The inputs of a store, and where stores are cached.

    Args:
        sources: data files, folders or glob patterns, in order
        tokenizer: Hugging Face folder with the tokenizer
        sequence_length: longest sample, in tokens, a shared prompt counted once
        too_long: error: refuse a longer one; drop: leave it out; truncate: keep its first tokens (chat only)
        cache: folder of stores
        shape: shape of the records; None: recognised per file
        columns: the files' columns of fields with another name there; None: a column that is left alone
        chat_template: file with a Jinja chat template; None: the tokenizer's own
        template_date: ISO date that the chat template reads from the clock; None: the time of :meth:`pinned`
        train_turns: all: every assistant turn is trained; last: those after the last question
        drop_fields: fields of turns (and ``tools``) that are left out
        on_bad_record: error: stop at a malformed record; skip: leave it out and count it
        processes: number of tokenising processes; None: one per core, 1 for little data
    """

    sources: tuple[str, ...]
    tokenizer: str
    sequence_length: int
    too_long: Literal["error", "drop", "truncate"]
    cache: str
    shape: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None
    template_date: str | None = None
    train_turns: Literal["all", "last"] = "all"
    drop_fields: tuple[str, ...] = ()
    on_bad_record: Literal["error", "skip"] = "error"
    processes: int | None = None

    @classmethod
    def of_run(cls, config: RunConfig, split: str, tokenizer: str) -> StoreSpec | None:
        """Return the spec of a run's ``train``, ``validation`` or ``ptx`` data; None: it has no such data."""
        data = config.data
        if split == "ptx":  # chat data of its own: what is said of the prompts' fields is not of these
            ptx = getattr(config.objective, "ptx", None)
            given, data = ptx and ptx.data, replace(data, shape=None, columns={})
        else:
            given = getattr(data, split)
        if given is None:
            return None
        sources = [given] if isinstance(given, str) else given
        return cls(
            sources=tuple(s.path if isinstance(s, DataSource) else s for s in sources),
            tokenizer=tokenizer,
            sequence_length=data.sequence_length,
            too_long=data.too_long,
            cache=data.cache or str(Path(config.checkpoint.dir) / CACHE_IN_RUN),
            shape=data.shape,
            columns=data.columns,
            chat_template=data.chat_template,
            template_date=data.template_date,
            train_turns=data.train_turns,
            drop_fields=tuple(sorted(set(data.drop_fields))),
            on_bad_record=data.on_bad_record,
        )

    def files(self) -> list[list[str]]:
        """Return the files of each source. Raises InputError for a source that has none."""
        if not self.sources:
            raise InputError("data needs at least one file, got an empty list")
        return [expand(source) for source in self.sources]

    def template(self) -> str | None:
        """Return the text of ``chat_template``. Raises InputError for a file that is not a template."""
        return load_chat_template(self.chat_template) if self.chat_template else None

    def turn_options(self) -> TurnOptions:
        """Return how the turns of conversations are rendered and trained."""
        now = None if self.template_date is None else parse_date(self.template_date)
        return TurnOptions(now, self.train_turns == "last", self.drop_fields)

    def pinned(self) -> StoreSpec:
        """Return the spec with the present time as ``template_date``, so that all of it is tokenised at one time."""
        return self if self.template_date else replace(self, template_date=datetime.now().isoformat())

    def clock(self) -> dict[str, str]:
        """Return what the chat template reads from the clock; empty: it does not read it."""
        now = parse_date(self.template_date) if self.template_date else datetime.now()
        return reads_of_clock(self._templates(), now)

    def _templates(self) -> list[str]:
        return [self.template() or ""] if self.chat_template else tokenizer_templates(self.tokenizer)

    def _changed_options(self) -> dict[str, Any]:
        """Return the inputs that older stores did not have, where they change samples: the others keep their keys."""
        options = {
            "train_turns": self.train_turns,
            "drop_fields": list(self.drop_fields),
            "clock": self.clock(),
            # 2: marked stretches are found by character spans, and their tokens are checked
            "marks": 2 if any(map(has_marks, self._templates())) else None,
        }
        return {name: value for name, value in options.items() if value not in ("all", [], {}, None)}

    def inputs(self) -> dict[str, Any]:
        """Return the inputs, files by their hashes. Raises InputError for a file that cannot be read."""
        remembered = _remembered_hashes(self.cache)
        folder, template = Path(self.tokenizer), self.template()
        parts = {part for pattern in _TOKENIZER_PARTS for part in folder.glob(pattern) if part.is_file()}
        tokenizer = {
            str(part.relative_to(folder)): _hash(str(part))
            for part in sorted(parts)
            if not part.name.endswith(".index.json")
        }
        return {
            "version": VERSION,
            "transformers": transformers.__version__,
            "data": [
                [
                    {
                        "file": _name(file, source),
                        **_content(file, remembered),
                        **self._plain_text_rules(file, tokenizer, remembered),
                    }
                    for file in files
                ]
                for source, files in zip(self.sources, self.files(), strict=True)
            ],
            "tokenizer": tokenizer,
            "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
            "shape": self.shape,
            **({"columns": dict(self.columns)} if self.columns else {}),
            "on_bad_record": self.on_bad_record,
            "sequence_length": self.sequence_length,
            "too_long": self.too_long,
            **self._changed_options(),
        }

    def _plain_text_rules(
        self, file: str, tokenizer: dict[str, str], remembered: dict[str, list[Any]]
    ) -> dict[str, int]:
        """Return the version of the rules of plain text, if the file has samples that the first one made otherwise."""
        start, all_changed = self.changed_plain_text(file, tokenizer)
        return {"plain_text": 2} if all_changed or (start and _holds(file, start, remembered)) else {}

    def changed_plain_text(self, file: str, tokenizer: dict[str, str]) -> tuple[str | None, bool]:
        """Return :func:`changed_since_first_version` for the tokenizer with these hashes; no change for other data."""
        on_bad = (lambda error: None) if self.on_bad_record == "skip" else None
        try:
            shape, _ = read_file(file, self.shape, on_bad, columns=self.columns)
        except InputError:  # named when the file is tokenised
            return None, False
        if shape.name not in PLAIN_TEXT:
            return None, False
        return changed_since_first_version(self.tokenizer, json.dumps(tokenizer))

    def path(self, inputs: dict[str, Any]) -> Path:
        """Return the folder of the store with these inputs."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.cache) / key


def remember_hashes(spec: StoreSpec, inputs: dict[str, Any], states: dict[str, str]) -> None:
    """Write the data files' hashes next to the stores, so that the next run need not read the files again.

    Args:
        spec: of the store.
        inputs: with their hashes.
        states: of each file, from :func:`file_states` before it was hashed. A hash is valid only while its
            file's state stays the same; files that changed seconds ago are left out.
    """
    remembered = _remembered_hashes(spec.cache)
    fresh = dict(remembered)
    for files, hashed in zip(spec.files(), inputs["data"], strict=True):
        for file, entry in zip(files, hashed, strict=True):
            changed = max(os.stat(file).st_mtime, os.stat(file).st_ctime)
            if file in states and time.time() - changed > SETTLED_SECONDS:
                fresh[os.path.realpath(file)] = [states[file], entry["sha256"], entry.get("rules", 1)]
                start, all_changed = spec.changed_plain_text(file, inputs["tokenizer"])
                if start and not all_changed:
                    fresh[_place_of_search(file, start)] = [states[file], "plain_text" in entry]
    if fresh == remembered:
        return
    target = Path(spec.cache) / HASHES
    unfinished = target.with_name(f"{HASHES}.{uuid.uuid4().hex[:8]}")
    with suppress(OSError):  # it only saves time
        unfinished.write_text(json.dumps(fresh), encoding="utf-8")
        unfinished.replace(target)


def file_states(spec: StoreSpec) -> dict[str, str]:
    """Return the state of each data file that changes whenever the file does: inode, size and times."""
    return {file: _state(file) for files in spec.files() for file in files}


def _state(file: str) -> str:
    try:
        s = os.stat(file)
    except OSError as error:
        raise InputError(f"{file}: must be a data file: {error.strerror}") from error
    return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"


def _remembered_hashes(cache: str) -> dict[str, list[Any]]:
    try:
        hashes = json.loads((Path(cache) / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _content(file: str, remembered: dict[str, list[Any]]) -> dict[str, Any]:
    """Return what a data file adds to the key: its hash, and the version of its rules if it is not the first."""
    entry = remembered.get(os.path.realpath(file))
    if entry and len(entry) == 3 and entry[0] == _state(file):
        hashed, rules = entry[1], entry[2]
    else:
        hashed = _hash(file)
        try:
            rules = rules_version(file)
        except (OSError, EOFError, zlib.error):  # named when the file is read
            rules = 1
    return {"sha256": hashed, **({"rules": rules} if rules > 1 else {})}


def _holds(file: str, text: str, remembered: dict[str, list[Any]]) -> bool:
    entry = remembered.get(_place_of_search(file, text))
    if entry and len(entry) == 2 and entry[0] == _state(file):
        return bool(entry[1])
    try:
        return may_hold(file, text)
    except (OSError, EOFError, zlib.error):  # named when the file is read
        return False


def _place_of_search(file: str, text: str) -> str:
    """Return under which name the result of a search for a text in a file is remembered."""
    return f"{os.path.realpath(file)} holds {text}"


def _hash(file: str) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise InputError(f"{file}: could not be read: {error.strerror}") from error


def _name(file: str, source: str) -> str:
    """Return the file's path within its source, which does not depend on where the source is."""
    return str(Path(file).relative_to(source)) if Path(source).is_dir() else Path(file).name
