"""The exported folder is the model that was trained to talk: it has that template only, and stops where turns end."""

import json
import re

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_align.checkpoint.card import read_checkpoint_metadata
from megatron_align.hf.assets import AssetChanges, copy_assets, write_assets
from megatron_align.hf.model_card import model_card
from megatron_align.model.families import read_shape
from tests.harness import cli, training_ranks
from tests.harness.tiny import make_model, metrics_of, run_arguments

MINE = (
    "{% for m in messages %}<|im_start|>[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>[assistant] {% endif %}"
)
QUESTION = [{"role": "user", "content": "1 + 1"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model: it stops at <|endoftext|> only, and has another template in both places and a third beside them."""
    folder = make_model(tmp_path_factory.mktemp("base") / "base", "qwen2_untied")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "chat_template": "{{ 'old' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "eos_token_id": end}))
    return folder


@pytest.fixture(scope="module")
def trained(pool, base, chat_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    (folder / "mine.jinja").write_text(MINE)
    options = {"data__chat_template": folder / "mine.jinja", "data__validation": chat_file, "train__steps": 2}
    arguments = run_arguments(base, chat_file, folder / "run", checkpoint__export_hf=True, **options)
    pool.run(1, training_ranks.train, arguments)
    return folder / "run"


def require_trained_to_talk(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>[user] 1 + 1<|im_end|><|im_start|>[assistant] "
    )
    assert (folder / "chat_template.jinja").read_text() == MINE
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not (folder / "additional_chat_templates").exists()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_checkpoints_hf_and_convert_export_have_the_template_and_the_stop_tokens(pool, trained, tmp_path):
    require_trained_to_talk(trained / "hf")
    require_trained_to_talk(trained / "step_000002" / "hf_assets")
    arguments = ["convert", "export", "--checkpoint", str(trained), "--out", str(tmp_path / "out")]
    [answer] = pool.run(1, cli.call, arguments)
    assert answer.code == 0, answer
    assert re.search(
        r"chat template in chat_template.jinja, generation stops at eos_token_id <\|im_end\|> \(\d+\)",
        answer.out,
    )
    require_trained_to_talk(tmp_path / "out")


def test_the_next_stage_needs_no_option(pool, trained, chat_file, tmp_path):
    """It tokenises as the first stage did, from the exported folder and from the checkpoint."""
    for start in (trained / "hf", trained):
        run = tmp_path / start.name
        arguments = run_arguments(start, chat_file, run, train__steps=1, checkpoint__export_hf=True)
        pool.run(1, training_ranks.train, arguments)
        require_trained_to_talk(run / "hf")
        stores = [
            next((folder / "data_cache").glob("*/tokens.bin")).read_bytes() for folder in (trained, run)
        ]
        assert stores[0] == stores[1]


def test_the_start_says_both(pool, base, chat_file, tmp_path):
    from megatron_align.model.parallel import RankInfo
    from megatron_align.objectives.configuration import parse
    from megatron_align.training.setup import prepare_run

    template = tmp_path / "mine.jinja"
    template.write_text(MINE)
    arguments = run_arguments(base, chat_file, tmp_path / "run", data__chat_template=template)
    notes = dict(prepare_run(parse(arguments), RankInfo(rank=0, local_rank=0, world_size=1)).notes)
    assert notes["template"] == f"{template}, which is exported with the model"
    assert re.fullmatch(
        r"<\|im_end\|> \(\d+\), <\|endoftext\|> \(\d+\); "
        r"the export's generation_config.json gets <\|im_end\|> \(\d+\) as eos_token_id too",
        notes["stops at"],
    )


def test_nothing_changes_where_nothing_has_to(tmp_path):
    source = make_model(tmp_path / "model")
    for name in ("plain", "changed"):
        (tmp_path / name).mkdir()
    copy_assets(source, tmp_path / "plain")
    write_assets(source, tmp_path / "changed", read_shape(source), AssetChanges())
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "changed" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_without_generation_config_gets_one(tmp_path):
    source = make_model(tmp_path / "model", bos_token_id=1, pad_token_id=0, eos_token_id=2)
    (source / "generation_config.json").unlink()
    (tmp_path / "out").mkdir()
    write_assets(source, tmp_path / "out", read_shape(source), AssetChanges(stop_ids=(7, 2)))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [7, 2]}
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_the_model_card(trained, chat_file):
    text = (trained / "hf" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-align", "sft"],
    }
    [row] = [row for row in metrics_of(trained) if row["step"] == 2]
    [validation] = metrics_of(trained, "validation")
    for part in (
        "# Model trained from base by sft",
        f"| files | {chat_file.name} |",
        "| samples | 64 |",
        "| chat template | mine.jinja |",
        f"| loss | {row['loss']:.6g} |",
        f"| loss | {validation['loss']:.6g} |",
        "| transformers | ",
        "| optimizer.lr | 0.001 |",
    ):
        assert part in body, part
    assert str(trained.parent) not in text


def test_only_a_name_on_the_hub_is_linked_as_the_base(trained):
    """A path of two parts looks like one: where the card is written, neither may exist."""
    metadata = read_checkpoint_metadata(trained / "step_000002")
    config = {**metadata["config"], "model": {**metadata["config"]["model"], "path": "models/base"}}
    local = model_card({**metadata, "config": config}, {})
    assert "trained from base by" in local
    assert "base_model" not in local
    on_hub = model_card({**metadata, "config": config, "hub_models": ["models/base"]}, {})
    assert "trained from models/base by" in on_hub
    assert "base_model: models/base" in on_hub
