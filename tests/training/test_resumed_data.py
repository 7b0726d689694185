"""A run trains on the same samples when it resumes on another day, or where newer rules give its data another key."""

import json
import shutil
from datetime import date, timedelta
from types import SimpleNamespace

import pytest

from megatron_align.config import to_dict
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training import resumed_data
from megatron_align.training.resumed_data import key_of_same_data
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments

ALONE = RankInfo(rank=0, local_rank=0, world_size=1)
DATED = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tomorrow(monkeypatch):
    day = date.today() + timedelta(days=1)
    monkeypatch.setattr(resumed_data, "date", SimpleNamespace(today=lambda: day))


def test_the_date_is_that_of_the_first_start(pool, tiny_models, chat_file, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text(DATED)

    def arguments(**options):
        return run_arguments(
            tiny_models(),
            chat_file,
            tmp_path / "run",
            data__chat_template=str(tmp_path / "dated.jinja"),
            **options,
        )

    pool.run(1, training_ranks.train, arguments(train__steps=1))
    today = date.today()
    day = today + timedelta(days=1)
    monkeypatch.setattr(resumed_data, "date", SimpleNamespace(today=lambda: day))
    again = prepare_run(parse(arguments(train__steps=2)), ALONE)
    assert again.config.data.template_date == today.isoformat()
    assert ("template date", f"{today}, for the entire run (data.template_date)") in again.notes
    with pytest.raises(InputError, match=r"the tokenised data was .*resume_allow \[data\]"):
        prepare_run(parse(arguments(train__steps=2, data__template_date=day.isoformat())), ALONE)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]


def test_a_template_that_reads_no_date_fixes_none(tiny_models, chat_file, tmp_path, tomorrow):
    setup = prepare_run(parse(run_arguments(tiny_models(), chat_file, tmp_path / "run")), ALONE)
    assert setup.config.data.template_date is None


def test_the_same_samples_under_another_key_are_the_same_data(tiny_models, chat_file, tmp_path):
    config = parse(run_arguments(tiny_models(), chat_file, tmp_path / "run"))
    store = prepare_run(config, ALONE).train
    old = store.path.with_name("0123456789abcdef")
    shutil.copytree(store.path, old)
    resumed = SimpleNamespace(metadata={"config": to_dict(config), "data": {"key": old.name}})
    assert key_of_same_data(TokenStore(store.path), resumed) == old.name
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["sha256"]["tokens"] = "0" * 64
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert key_of_same_data(store, resumed) == store.path.name
    shutil.rmtree(old)
    assert key_of_same_data(store, resumed) == store.path.name
    assert key_of_same_data(store, None) == store.path.name
