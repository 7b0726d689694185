"""The vllm engine asks servers for exactly the sampling that it was given, and new weights reach every server.

The servers are scripted, with the routes and fields of vLLM's API; the model itself is no part of this test.
"""

import resource

import pytest
import torch

from megatron_align.errors import InputError, TrainingFault
from megatron_align.hf.adapter import read_adapter, read_tensors
from megatron_align.model.families import read_shape
from megatron_align.rollout.endpoint import Endpoint
from megatron_align.rollout.engine import UNKNOWN_VERSION, LiveAdapter
from megatron_align.rollout.types import Prompt, Sampling
from megatron_align.rollout.vllm_engine import VLLMEngine, request_seed
from tests.harness.http_server import VLLMScript as Server
from tests.harness.http_server import serving
from tests.harness.tiny import byte_tokenizer, make_adapter


def engine_of(*urls, adapters=False):
    servers = [Endpoint(url, first_wait=0.01, tries=2) for url in urls]
    return VLLMEngine(servers, byte_tokenizer(), adapters=adapters)


def live_adapter(model, folder, **options):
    make_adapter(folder, model, **options)
    shape = read_shape(model)
    return LiveAdapter(read_adapter(folder, shape), read_tensors(folder), shape)


PROMPTS = [Prompt([5, 6], key=10), Prompt([7] * 62, key=11)]


# What vLLM takes from the model's generation_config.json, or from --override-generation-config, where it is not sent;
# temperature, top_p, top_k and max_tokens are sent as sampling says.
NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def test_a_server_gets_its_own_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    monkeypatch.setenv("VLLM_API_KEY", "of the server")
    received = []
    with serving(Server(), received=received) as url:
        VLLMEngine([url], byte_tokenizer()).generate(PROMPTS[:1], Sampling(max_tokens=1))
    assert [headers["Authorization"] for headers in received] == ["Bearer of the server"] * 2


def test_requests_and_completions():
    one, other = Server(), Server()
    with serving(one) as first, serving(other) as second:
        engine = engine_of(first, second)
        sampling = Sampling(completions=3, max_tokens=9, temperature=0.5, stop=("x",), seed=4)
        seen = []
        answers = engine.generate(PROMPTS, sampling, lambda i, k, token: seen.append((i, k, token)))
    assert len(one.requests) == len(other.requests) == 3
    by_seed = {body["seed"]: body for body in one.requests + other.requests}
    assert len(by_seed) == 6
    for i, prompt in enumerate(PROMPTS):
        for k in range(3):
            seed = request_seed(4, prompt.key, k)
            body = by_seed[seed]
            assert body["prompt"] == list(prompt.token_ids)
            assert body["max_tokens"] == (9, 2)[i]  # what the context leaves
            assert (body["temperature"], body["top_p"], body["top_k"], body["stop"]) == (0.5, 1.0, -1, ["x"])
            assert {name: body[name] for name in NEUTRAL} == NEUTRAL
            assert set(answers[i][k].token_ids) == {seed % 7}
            assert answers[i][k].finish_reason == ("stop", "length")[i]
            assert answers[i][k].logprobs == (-0.5,) * len(answers[i][k].token_ids)
    assert seen == [
        (i, k, t) for i, some in enumerate(answers) for k, a in enumerate(some) for t in a.token_ids
    ]


def test_log_probs_of_a_truncated_distribution_are_not_given():
    with serving(Server()) as url:
        [[answer], _] = engine_of(url).generate(PROMPTS, Sampling(max_tokens=2, top_p=0.9))
    assert all(value != value for value in answer.logprobs)


def test_new_weights_reach_every_server_and_clear_its_cache():
    one, other = Server(), Server()
    with serving(one) as first, serving(other) as second:
        engine = engine_of(first, second)
        engine.update_weights([("a", torch.arange(3.0)), ("b", torch.ones(2, 2).T)], version=7)
        [[answer], _] = engine.generate(PROMPTS, Sampling(max_tokens=2))
    assert answer.weight_version == 7
    assert {body["cache_salt"] for body in one.requests + other.requests} == {"weights of version 7"}
    for server in (one, other):
        [weights] = server.weights
        assert weights["a"].tolist() == [0, 1, 2]
        assert server.resets == 1


def test_an_adapter_alone_reaches_every_server(tiny_models, tmp_path):
    """Each version has a name of its own, which requests ask for; the one before is unloaded, the base stays."""
    live = live_adapter(tiny_models(), tmp_path / "adapter")
    one, other = Server(), Server()
    with serving(one) as url, serving(other) as other_url:
        engine = engine_of(url, other_url, adapters=True)
        assert engine.refuses_adapter(live.adapter) is None
        names = []
        for version in (3, 4):
            engine.update_adapter(live, version)
            [[answer]] = engine.generate(PROMPTS[:1], Sampling(max_tokens=2))
            assert answer.weight_version == version
            names.append(engine.served)
        assert len(set(names)) == 2
        assert list(one.adapters) == list(other.adapters) == names[1:]
        assert [request["model"] for request in one.requests + other.requests] == names
        for server in (one, other):
            assert server.weights == []
            for (name, tensors), wanted in zip(server.loaded, names, strict=True):
                assert name == wanted
                assert tensors.keys() == live.tensors.keys()
                assert all(torch.equal(tensors[key], live.tensors[key]) for key in tensors)
        other.adapters.clear()  # restarted
        with pytest.raises(TrainingFault, match=rf"{other_url} must have the adapter {names[1]}, it has m"):
            engine.generate(PROMPTS[:1], Sampling(max_tokens=2))
        other.adapters[names[1]] = {}
        engine.close()
        assert not one.adapters
        assert not other.adapters


@pytest.mark.parametrize(
    ("options", "adapters", "line"),
    [
        ({}, False, "not said to load adapters"),
        ({"dora": True}, True, "vllm loads no DoRA adapters"),
        (
            {"targets": ["q_proj", "lm_head"]},
            True,
            "linear layers of the transformer only, this one has lm_head",
        ),
    ],
)
def test_which_adapters_are_merged_instead(options, adapters, line, tiny_models, tmp_path):
    live = live_adapter(tiny_models("qwen2_untied"), tmp_path / "adapter", **options)
    with serving(Server()) as url:
        assert line in engine_of(url, adapters=adapters).refuses_adapter(live.adapter)


def test_a_server_that_cannot_load_the_adapter_is_one_line(tiny_models, tmp_path):
    live = live_adapter(tiny_models(), tmp_path / "adapter")
    with serving(Server(most_rank=2)) as url:
        engine = engine_of(url, adapters=True)
        with pytest.raises(
            InputError, match=r"--max-lora-rank .*LoRA rank 3 is greater than max_lora_rank 2"
        ):
            engine.update_adapter(live, 1)
        assert engine.weight_version == UNKNOWN_VERSION


def test_weights_that_cannot_be_written_are_an_os_error_with_their_file():
    """safetensors has an error of its own for a full disk; here: for a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(Server()) as url:
        engine = engine_of(url)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(
                OSError, match=r"writing the weights for the vllm servers failed at .*model-00000"
            ):
                engine.update_weights([("a", torch.zeros(1 << 16))], version=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_server_with_other_weights_is_found_before_and_after_its_answers():
    server = Server()
    with serving(server) as url:
        engine = engine_of(url)
        engine.update_weights([("a", torch.zeros(1))], version=3)
        engine.generate(PROMPTS, Sampling(max_tokens=2))
        server.version = "default"  # it was restarted
        asked = len(server.requests)
        with pytest.raises(TrainingFault, match="weights of version 3, it has version default"):
            engine.generate(PROMPTS, Sampling(max_tokens=2))
        assert len(server.requests) == asked
        server.version = "3"

        def changed(path, body):
            if path == "/v1/completions":
                server.version = "4"  # another run updates it meanwhile
            return server(path, body)

        with serving(changed) as shared_url:
            engine.servers = [Endpoint(shared_url)]
            with pytest.raises(TrainingFault, match="weights of version 3, it has version 4"):
                engine.generate(PROMPTS, Sampling(max_tokens=2))


def test_what_a_server_lacks_is_one_line():
    with serving(Server(rl=False)) as url:
        engine = engine_of(url)
        with pytest.raises(InputError, match="VLLM_SERVER_DEV_MODE=1"):
            engine.update_weights([("a", torch.zeros(1))], version=1)
        assert engine.weight_version == UNKNOWN_VERSION
    with pytest.raises(InputError, match="needs a running server"):
        engine_of(url)
    with (
        serving(lambda path, body: (200, {"data": []})) as url,
        pytest.raises(InputError, match="must name a model"),
    ):
        engine_of(url)
    differ = pytest.raises(InputError, match="must hold one model")
    with serving(Server()) as url, serving(Server(context=32)) as other, differ:
        engine_of(url, other)
    with pytest.raises(InputError, match="needs the url of a server"):
        engine_of()


def test_answers_without_tokens_are_refused():
    def script(path, body):
        good = Server()(path, body)
        return good if path == "/v1/models" else (200, {"choices": [{"text": "x", "finish_reason": "stop"}]})

    with serving(script) as url, pytest.raises(InputError, match="return_token_ids"):
        engine_of(url).generate(PROMPTS, Sampling())
