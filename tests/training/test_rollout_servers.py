"""A vLLM server that holds another model or does not answer is refused before training, in one clear line."""

import json
import re
import time

import pytest

from megatron_align.config.rollout import RolloutConfig
from megatron_align.errors import InputError
from megatron_align.model.families import read_shape
from megatron_align.rollout.endpoint import Endpoint, RequestFailed
from megatron_align.train import main
from megatron_align.training.rollout_servers import endpoint_of, require_servers
from tests.harness.http_server import VLLMScript, serving
from tests.harness.tiny import byte_tokenizer, make_model, run_arguments


def config(url, **options):
    return RolloutConfig(engine="vllm", url=url, **{"request_retries": 0, **options})


def shifted(text, **options):
    """A tokenizer of as many tokens, in another order."""
    encoded = byte_tokenizer()(text, **options)
    encoded["input_ids"] = [(token + 1) % 256 for token in encoded.input_ids]
    return encoded


def without_special(text, **options):
    """The tokenizer of the base model: the tokens that the tuned model added are text to it."""
    encoded = byte_tokenizer()(text, **options)
    if text.startswith("<|"):
        encoded["input_ids"] = [token for piece in text for token in byte_tokenizer()(piece).input_ids]
    return encoded


def test_the_models_own_server_is_taken(tiny_models):
    model = tiny_models()
    with serving(VLLMScript(tokenizer=byte_tokenizer(), root=model)) as url:
        assert require_servers(config([url, url]), model, read_shape(model)) == []
    assert require_servers(RolloutConfig(), model, read_shape(model)) == []


@pytest.mark.parametrize("tokenizer", [shifted, without_special])
def test_another_tokenizer_is_refused(tokenizer, tiny_models):
    model = tiny_models()
    refusal = (
        r"the vllm server http://\S+ has another tokenizer .+: '.+' is tokens \[.+\] there and \[.+\] here"
    )
    with serving(VLLMScript(tokenizer=tokenizer)) as url, pytest.raises(InputError, match=refusal) as error:
        require_servers(config(url), model, read_shape(model))
    assert "\n" not in str(error.value)


def test_a_model_of_another_shape_is_refused(tiny_models, tmp_path):
    model, other = tiny_models(), make_model(tmp_path / "other", num_hidden_layers=1)
    refusal = f"serves another model than model.path, got num_layers 1 for .* in {other}"
    script = VLLMScript(tokenizer=byte_tokenizer(), root=other)
    with serving(script) as url, pytest.raises(InputError, match=refusal):
        require_servers(config(url), model, read_shape(model))


def test_a_server_that_does_not_tokenise_is_named(tiny_models):
    model = tiny_models()
    with serving(VLLMScript()) as url:
        [note] = require_servers(config(url), model, read_shape(model))
    assert note == f"{url} has no route /tokenize: its tokenizer is not compared with the model's"


def test_a_run_without_its_server_ends_before_the_ranks_meet(tiny_models, tmp_path, capsys):
    data, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
    data.write_text(json.dumps({"prompt": "one?"}))
    options = {"objective__name": "grpo", "rewards": "[{kind: length, min: 2}]", "rollout__max_tokens": 8}
    options |= {
        "rollout__engine": "vllm",
        "rollout__url": "http://127.0.0.1:9",
        "rollout__request_retries": 0,
    }
    capsys.readouterr()
    code = main(run_arguments(tiny_models(), data, folder, train__global_batch_size=1, **options))
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.fullmatch(
        "error: rollout.url needs a running vllm server: http://127.0.0.1:9/v1/models failed .*\n", error
    )


def test_a_server_that_hangs_is_named_with_its_limit():
    def hang(path, body):
        time.sleep(0.6)
        return 200, {}

    with serving(hang) as url:
        server = endpoint_of(config(url, request_timeout=0.1), Endpoint(url, first_wait=0.01))
        refusal = r"/v1/completions failed .*: timed out: no answer within 0.1 s \(rollout.request_timeout\)"
        with pytest.raises(RequestFailed, match=refusal):
            server.post("/v1/completions", {})
