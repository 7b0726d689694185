"""Law 13 of the reference's cache: an option on which the cached numbers depend is a part of their key.

The options are the declared ones: one that is added fails here until it is in one of the lists.
"""

import dataclasses
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_align.config import DataConfig, DataSource, Fp8Config, TrainConfig
from megatron_align.data.batching.sampler import step_order
from megatron_align.hf.load import weights_hash
from megatron_align.model.families import read_shape
from megatron_align.objectives.registry import OBJECTIVES
from megatron_align.training.reference import cache, top_k
from megatron_align.training.reference.cache import ReferenceColumns
from megatron_align.training.reference.top_k import TopKColumns
from tests.harness.sizes import write_config

COMPLETIONS, STEPS = "completions", "mismatched"  # a number of each completion; of each step (KTO)
DECIDES = {
    "train.precision": {COMPLETIONS, STEPS},
    "train.fp8": {COMPLETIONS, STEPS},
    "train.seed": {STEPS},
    "train.global_batch_size": {STEPS},
    "train.global_batch_tokens": {STEPS},
    "train.steps": {STEPS},
    "train.epochs": {STEPS},
    "data.train": {STEPS},  # the weights of its sources; what they hold is in the store's name
    "data.shuffle": {STEPS},
    "data.sequence_length": {STEPS},
}
FREE = {
    "in the name of the store": "data.shape data.columns data.chat_template data.template_date data.train_turns "
    "data.drop_fields data.on_bad_record data.too_long",
    "law 1: changes no number": "data.packing data.share_prefix train.recompute_layers train.recompute_modules",
    "no forward pass": "train.gradient_accumulation_fusion",
    "no number of training data": "data.validation data.cache train.validate_every train.early_stopping "
    "train.on_nonfinite train.self_check",
}
OFF = {
    "fp8": Fp8Config(),
    "seed": 7,
    "global_batch_size": 2,
    "global_batch_tokens": 40,
    "steps": 5,
    "epochs": 3,
    "shuffle": False,
    "train": [DataSource(path="d", weight=2.0)],
}
TABLE = SimpleNamespace(
    path=SimpleNamespace(name="data"),
    completion_offsets=np.arange(13),
    completion_scored=np.arange(1, 13),
    sources=np.zeros(12, np.int64),
    lengths=np.arange(5, 17),
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Keep the columns on this rank, without collectives."""
    for module in (cache, top_k):
        monkeypatch.setattr(module, "broadcast", lambda _: None)
    monkeypatch.setattr(top_k.TopKColumns, "_check_or_start", lambda self: self.file.touch())
    monkeypatch.setattr(top_k, "all_reduce_sum", lambda values: values)
    monkeypatch.setattr(top_k, "failing_together", nullcontext)
    monkeypatch.setattr(top_k.dist, "get_rank", lambda: 0)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    return read_shape(write_config(tmp_path_factory.mktemp("model"), "llama3_8b"))


def settings(tmp_path, **changed):
    """Return the sections of a run that the key reads; ``changed``: ``section__option``."""
    sections = {
        "train": {**vars(TrainConfig(epochs=2, global_batch_size=4))},
        "data": {**vars(DataConfig(train="d", cache=str(tmp_path)))},
    }
    for name, value in changed.items():
        section, option = name.split("__")
        sections[section][option] = value
    train, data = (SimpleNamespace(**options) for options in sections.values())
    train.arithmetic = TrainConfig.arithmetic.fget(train)
    return SimpleNamespace(train=train, data=data)


def files(config, shape, weights="w", data="data", **options):
    """Return the files of the numbers of each completion and of each step."""
    table = SimpleNamespace(**{**vars(TABLE), "path": SimpleNamespace(name=data)})
    setup = SimpleNamespace(config=config, train=table, validation=None)
    setup.reference = SimpleNamespace(shape=shape)
    kind = OBJECTIVES["dpo"]
    objective = SimpleNamespace(
        needs={"mismatched_logprobs"}, scoring_options=kind(kind.Options(**options)).scoring_options
    )
    found = ReferenceColumns.open_all(setup, config, objective, weights)["train"]
    return {COMPLETIONS: found.completions.file, STEPS: found.mismatched.file}


def changed(one, other):
    return {name for name in one if one[name] != other[name]}


def steps_of(config):
    order = step_order(TABLE, config.data, config.train, config.data.train)
    return [order.samples(step).tolist() for step in range(order.steps)]


def test_every_option_on_which_the_numbers_depend_is_in_the_key(tmp_path, shape):
    free = {name for names in FREE.values() for name in names.split()}
    declared = {
        f"{section}.{field.name}"
        for section, kind in (("train", TrainConfig), ("data", DataConfig))
        for field in dataclasses.fields(kind)
    }
    assert free | DECIDES.keys() == declared
    assert not free & DECIDES.keys()
    plain = settings(tmp_path)
    for name in sorted(declared - {"data.cache"}):
        option = name.partition(".")[2]
        other = settings(tmp_path, **{name.replace(".", "__"): OFF.get(option, "another")})
        assert changed(files(plain, shape), files(other, shape)) == DECIDES.get(name, set()), name
        if steps_of(other) != steps_of(plain):  # other samples meet in a step
            assert STEPS in DECIDES[name], name


def test_so_are_weights_data_the_models_config_and_options_of_the_sums(tmp_path, shape):
    config, both = settings(tmp_path), {COMPLETIONS, STEPS}
    plain = files(config, shape)
    assert changed(plain, files(config, shape)) == set()
    assert changed(plain, files(config, shape, weights="v")) == both
    assert changed(plain, files(config, shape, data="other")) == both
    for options in ({"ld_alpha": 0.5}, {"beta": 0.4}):
        assert changed(plain, files(config, shape, **options)) == (both if "ld_alpha" in options else set())
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        other = dataclasses.replace(
            shape, **{field.name: "another" if isinstance(value, str) else value is not True}
        )
        assert changed(plain, files(config, other)) == (
            both if getattr(other, field.name) != value else set()
        ), field


def test_the_likeliest_tokens_have_a_key_of_their_own(tmp_path, shape):
    def file(k=5, weights="w", data="data", shape=shape, shared=None, **options):
        table = SimpleNamespace(**{**vars(TABLE), "path": SimpleNamespace(name=data)})
        reference = SimpleNamespace(shape=shape, shared_tokens=shared)
        return TopKColumns.open(table, settings(tmp_path, **options), k, weights, reference).file

    others = [{"k": 6}, {"weights": "v"}, {"data": "other"}, {"shared": 100}, {"train__precision": "fp32"}]
    others.append({"train__fp8": Fp8Config()})
    others.append({"shape": dataclasses.replace(shape, rope_theta=5e5)})
    assert file() == file(train__seed=7)
    assert len({file(), *(file(**options) for options in others)}) == 1 + len(others)


@pytest.mark.parametrize("kind", ["hugging_face", "checkpoint"])
def test_the_hash_of_weights_is_of_every_file(tmp_path, kind):
    folder = tmp_path if kind == "hugging_face" else tmp_path / "state"
    folder.mkdir(exist_ok=True)
    end = "safetensors" if kind == "hugging_face" else "distcp"
    names = [f"part-{i}.{end}" for i in range(3)]
    for name in names:
        (folder / name).write_text(name)
    hashes = [weights_hash(tmp_path)]
    for name in names:
        (folder / name).write_text(f"changed {name}")
        hashes.append(weights_hash(tmp_path))
    (folder / names[0]).rename(folder / f"other.{end}")
    hashes.append(weights_hash(tmp_path))
    (folder / names[1]).unlink()
    hashes.append(weights_hash(tmp_path))
    assert len(set(hashes)) == len(hashes)


def test_a_key_is_read_back_as_it_was_written(tmp_path, shape):
    """Nested values too: a file is compared with the key, not only named by it."""
    key = {"shape": cache.shape_key(shape), "passes": [1.0, 0.5]}
    column = cache.Column.open(tmp_path, key, 2)
    column.save()
    assert json.loads(column.file.read_bytes().split(b"\n")[0])["facts"] == column.key
    assert np.isnan(cache.Column.open(tmp_path, key, 2).values_K).all()
