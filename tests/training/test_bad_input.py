"""Bad input ends with exit code 2 and one clear line, and leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.errors import InputError
from megatron_align.train import main
from megatron_align.training.model_checks import require_vocabulary
from tests.harness import crash
from tests.harness.tiny import make_model, run_arguments


@pytest.fixture
def broken_model(tmp_path):
    return make_model(tmp_path / "broken", "qwen2_untied")


@pytest.fixture
def refused(tiny_models, chat_file, tmp_path, capsys):
    """``refused(pattern, model=..., data=..., **options)``: the run is refused with this line, untouched disk."""

    def check(pattern, *more, model=None, data=None, tokens_stay=False, **options):
        folder = tmp_path / "runs" / "new"
        arguments = run_arguments(model or tiny_models(), data or chat_file, folder, **options)
        capsys.readouterr()  # what making the model printed
        assert main([*arguments, *more]) == 2
        output = capsys.readouterr()
        assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", output.err), output.err
        assert (tmp_path / "runs").exists() == tokens_stay
        assert [path.name for path in folder.glob("*")] == ["data_cache"] * tokens_stay
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    return check


CONFIG = {
    "misspelt key": ({"optimizer__lrate": 1}, "key 'optimizer.lrate'; did you mean 'optimizer.lr'"),
    "misspelt section": ({"optimiser__lr": 1}, "unknown configuration key 'optimiser.lr'; did you mean 'optimizer.lr'"),
    "wrong type": ({"train__steps": "many"}, "train.steps must be a whole number or null, got 'many'"),
    "wrong choice": ({"train__precision": "fp8"}, "train.precision must be one of bf16, fp32, got 'fp8'"),
    "unknown objective": ({"objective__name": "sftt"}, "objective.name must be one of.*'sftt'; did you mean 'sft'"),
    "foreign option": ({"objective__beta": 0.1}, "unknown configuration key 'objective.beta'"),
    "both lengths of a run": ({"train__epochs": 1}, "either train.steps or train.epochs"),
    "negative rate": ({"optimizer__lr": -1}, "optimizer.lr must be positive, got -1"),
    "world size": ({"parallel__tensor": 2}, "a multiple of .* = 2, got 1: start torchrun --nproc-per-node 2 -m"),
    "context": ({"parallel__context": 2}, "world size must be a multiple of .* = 1 x 1 x 2 = 2, got 1"),
    "kind of no context": ({"parallel__context_kind": "ulysses"}, "context_kind needs parallel.context of at least 2"),
    "context kind": ({"parallel__context_kind": "ring"}, "parallel.context_kind must be one of auto, .*, got 'ring'"),
    "virtual stages alone": ({"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline needs"),
    "recompute": ({"train__recompute_layers": 5}, "train.recompute_layers must be at most the 4 layers"),
    "positions": ({"data__sequence_length": 4096}, "data.sequence_length must not pass the model's 2048"),
    "too long": ({"data__sequence_length": 64}, r"chat.jsonl:\d+: a sample must fit in data.sequence_length = 64"),
    "warm-up": ({"optimizer__warmup_steps": 6}, "optimizer.warmup_steps must not exceed train.steps = 5, got 6"),
    "unread reference": ({"objective__name": "simpo", "reference__mode": "live"}, "simpo compares with no reference"),
    "still reference": ({"objective__name": "dpo", "reference__sync_steps": 2}, "sync_steps needs reference.mode live"),
    "path of no reference": ({"objective__name": "dpo", "reference__mode": "none", "reference__path": "x"}, "not read"),
    "chats for pairs": ({"objective__name": "dpo"}, "objective dpo needs pairs .*, got chat data"),
    "absent package": ({"logging__wandb": "p"}, "logging.wandb needs the package wandb"),
}  # fmt: skip


@pytest.mark.parametrize("options, pattern", CONFIG.values(), ids=list(CONFIG))
def test_configuration(refused, options, pattern):
    refused(pattern, **options)


def test_missing_files(refused, tmp_path):
    refused("config.json.*none.*/absent", model=tmp_path / "absent")
    refused("absent.jsonl", data=tmp_path / "absent.jsonl")
    refused("--config needs a YAML file", "--config", str(tmp_path / "absent.yaml"))


def test_yaml(refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: [1")
    refused("run.yaml is not valid YAML", "--config", str(file))
    file.write_text("optimizer: null")
    refused("optimizer must be a mapping of options, got null", "--config", str(file))
    file.write_text("logging: {tensorbord: true}")
    refused(
        "unknown configuration key 'logging.tensorbord'; did you mean 'logging.tensorboard'",
        "--config",
        str(file),
    )


RECORDS = {
    "broken line": ('{"messages": [', "data.jsonl:2: must be a line of JSON"),
    "no assistant": ('{"messages": [{"role": "user", "content": "q"}]}', "data.jsonl:2: .*must have an assistant"),
    "unknown role": ('{"messages": [{"role": "bot", "content": "q"}]}', "data.jsonl:2: .*role' must be one of"),
    "empty content": ('{"messages": [{"role": "assistant", "content": ""}]}', "data.jsonl:2: .*must not be empty"),
}  # fmt: skip


@pytest.mark.parametrize("line, pattern", RECORDS.values(), ids=list(RECORDS))
def test_records(refused, tmp_path, chat_file, line, pattern):
    data = tmp_path / "data.jsonl"
    data.write_text(chat_file.read_text().splitlines()[0] + "\n" + line + "\n")
    refused(pattern, data=data)


def test_an_empty_file(refused, tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    refused("data.jsonl", data=tmp_path / "data.jsonl")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unknown_architecture(refused, broken_model):
    edit_config(broken_model, architectures=["MambaForCausalLM"], model_type="mamba")
    refused("MambaForCausalLM", model=broken_model)


def test_tensor_of_a_wrong_shape(refused, broken_model):
    edit_config(broken_model, intermediate_size=128)
    refused(r"model.layers.0.mlp.gate_proj.weight must be \[128, 64\], found \[96, 64\]", model=broken_model)


def test_missing_tensor_and_shard(refused, broken_model):
    file = broken_model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    refused("missing model.norm.weight; unexpected model.extra.weight", model=broken_model)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (broken_model / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    refused("model-00001-of-00002.safetensors", model=broken_model)


def test_pickled_weights_are_refused(refused, broken_model):
    (broken_model / "model.safetensors").unlink()
    torch.save({}, broken_model / "pytorch_model.bin")
    refused("must be safetensors: convert pytorch_model.bin", model=broken_model)


def test_a_vocabulary_smaller_than_the_tokenizer(chat_file, tmp_path, capsys):
    small = make_model(tmp_path / "small", "qwen2_tied", vocab_size=256)
    assert main(run_arguments(small, chat_file, tmp_path / "run")) == 2
    assert "vocabulary of 256, data.train has token 258" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [
        "data_cache"
    ]  # the tokens can be used again


def test_every_token_needs_a_row_of_the_vocabulary():
    """Of 259 rows the last is of token 258: data with it fit, and do not fit 258 rows."""
    stores = {
        f"data.{split}": SimpleNamespace(manifest={"largest_token": token})
        for split, token in (("train", 12), ("validation", 258))
    }
    require_vocabulary(stores, SimpleNamespace(vocab_size=259))
    with pytest.raises(InputError, match="vocabulary of 258, data.validation has token 258"):
        require_vocabulary(stores, SimpleNamespace(vocab_size=258))


@pytest.mark.parametrize("option", ["model.path", "reference.path", "critic.path"])
def test_a_tied_model_with_another_head_is_refused(refused, tiny_models, tmp_path, option):
    """Whatever the folder is read for: transformers would not read its head, or not as tied."""
    untied = make_model(tmp_path / "untied", "qwen2_tied")
    file = untied / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.5
    save_file(weights, file, {"format": "pt"})
    pair, prompt = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, {"prompt": "1 + 1 ="}
    data = lines(tmp_path / "data.jsonl", prompt if option == "critic.path" else pair)
    options = {"objective__name": "dpo", option.replace(".", "__"): untied}
    if option == "critic.path":
        options |= {"objective__name": "ppo", "objective__beta": 0.1, "rewards": "[{kind: length, max: 3}]"}
        options |= {"train__global_batch_size": 1, "rollout__max_tokens": 8}
    model = options.pop("model__path", tiny_models())
    pattern = "lm_head.weight must be absent or equal model.embed_tokens.weight .*differs by .* in .*untied"
    refused(pattern, model=model, data=data, **options)


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(tiny_models, chat_file, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    model = tiny_models()
    capsys.readouterr()
    assert main(run_arguments(model, chat_file, tmp_path / place)) == 2
    assert re.fullmatch("error: checkpoint.dir cannot be written.*\n", capsys.readouterr().err)


@pytest.fixture
def too_few_ranks(tiny_models, chat_file, tmp_path):
    """Arguments of a run that needs four ranks."""
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2}
    return run_arguments(tiny_models(), chat_file, tmp_path / "run", **layout)


def test_ranks_say_it_once(too_few_ranks, tmp_path):
    """The launcher names a file to each rank, in one folder: one line, and each rank's exit code is 2."""
    attempt, log = tmp_path / "attempt_0", tmp_path / "log"
    attempt.mkdir()
    ranks = crash.start(2, too_few_ranks, log, {"TORCHELASTIC_ERROR_FILE": str(attempt / "0" / "error.json")})
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [2, 2], log.read_text()
    [line] = log.read_text().splitlines()
    assert line.startswith("error: world size must be a multiple")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_says_it_once(too_few_ranks, tmp_path):
    """Through the real launcher: rank 0's one line, no traceback of ours, a non-zero exit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "megatron_align.train", *too_few_ranks],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,  # a bound on a hang: how fast a busy machine imports is not what is tested
    )
    assert done.returncode != 0
    assert done.stderr.count("error: world size must be a multiple") == 1
    assert "megatron_align/train.py" not in done.stderr  # the launcher's own traceback is not ours
    assert not (tmp_path / "run").exists()


def lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_preference_data(refused, tmp_path):
    pair = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    pairs = lines(tmp_path / "pairs.jsonl", {**pair, "margin": 1.0}, pair)
    weighted = lines(tmp_path / "weighted.jsonl", pair, {**pair, "prompt": "2 - 0 =", "weight": 2.0})
    same = lines(tmp_path / "same.jsonl", {**pair, "rejected": " 2"})
    level, alone = (
        lines(
            tmp_path / f"{name}.jsonl",
            {"prompt": "a", "completions": [{"content": c, "score": 1} for c in some]},
        )
        for name, some in (("level", "bc"), ("alone", "b"))
    )
    for data, objective, options, pattern in (
        (
            pairs,
            "dpo",
            {"loss_type": "margin"},
            "needs a margin, or both .*; 1 of 2 have none, the first is sample 1",
        ),
        (pairs, "kto", {}, "objective kto needs labelled completions .*, got pair data"),
        (pairs, "sft", {}, "objective sft needs chat data .*, got pair data"),
        (pairs, "reward", {"alpha": 0.1}, "objective.alpha 0.1 reads absolute scores; no sample has one"),
        (pairs, "reward", {"ranked_loss": "all_pairs"}, "ranked_loss needs ranked data, got pair data"),
        (weighted, "dpo", {"loss_type": "aot"}, "aot mixes the pairs of a step, .* got weights from 1 to 2"),
        (same, "dpo", {}, "same.jsonl:1: .*rejected"),
        (level, "reward", {}, "a ranked list needs two different scores, sample 0 has one"),
        (alone, "reward", {}, "alone.jsonl:1: .*completions"),
    ):
        given = {f"objective__{name}": value for name, value in {"name": objective, **options}.items()}
        # What only the whole data can tell is told once they are tokenised, and tokens of valid files stay.
        told_late = any(
            word in pattern for word in ("margin", "absolute", "ranked_loss", "mixes", "ranked list")
        )
        refused(pattern, data=data, tokens_stay=told_late, **given)


def test_reward_models_of_other_families(refused, tmp_path):
    from tests.harness.tiny import VARIANTS

    other = next(name for name in VARIANTS if name.startswith("qwen3"))
    pair = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    refused(
        "a reward model must be one of Qwen2ForSequenceClassification, LlamaForSequenceClassification",
        model=make_model(tmp_path / "model", other),
        data=lines(tmp_path / "pairs.jsonl", pair),
        objective__name="reward",
    )
