"""Keep a run's data the same when it resumes on another day, or with another version of this program."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from megatron_align.config import RunConfig
from megatron_align.data.sample_table import TrainingData
from megatron_align.data.store import MANIFEST, read_manifest
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.rollout.prompt_table import PromptTable
from megatron_align.training.resume import ResumePoint


def fix_template_date(config: RunConfig, assets: Path, resume: ResumePoint | None) -> RunConfig:
    """Return the configuration with ``data.template_date`` set, if the chat template reads the clock and it is not.

    A new run gets today's date, a resumed one the date of its first start: it trains on the same samples.
    """
    spec = StoreSpec.of_run(config, "train", str(assets))
    if config.data.template_date or spec is None or not spec.clock():
        return config
    saved = resume and resume.metadata.get("config")
    before = saved["data"].get("template_date") if saved else None
    return replace(config, data=replace(config.data, template_date=before or date.today().isoformat()))


def key_of_same_data(store: TrainingData, resume: ResumePoint | None) -> str:
    """Return the key of the training data: the resumed run's, if its store is still cached and holds the same samples.

    A key also names rules of reading and tokenisation, whose newer versions leave most data as they were. Another
    ``data.sequence_length`` keeps its own key even where no sample is cut or dropped: it makes other packs.
    """
    key = store.path.name
    if isinstance(store, PromptTable):
        return key
    before = resume.metadata.get("data") if resume else None
    if before is None or before["key"] == key:
        return key
    old = store.path.with_name(before["key"])
    if not (old / MANIFEST).is_file():
        return key
    manifest = read_manifest(old)
    same = all(manifest.get(name) == store.manifest.get(name) for name in ("sha256", "sequence_length"))
    return before["key"] if same else key
