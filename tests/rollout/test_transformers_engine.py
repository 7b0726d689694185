"""Greedy completions equal transformers' token for token, log-probs its logits', and no draw depends on the batch."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align.convert.hf_model import load_hf_model
from megatron_align.errors import InputError
from megatron_align.hf.adapter import read_adapter, read_tensors
from megatron_align.hf.load import open_hf
from megatron_align.merge.adapter import merge_adapter
from megatron_align.model.families import read_shape
from megatron_align.rollout.engine import LiveAdapter
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.rollout.types import Prompt, Sampling
from tests.harness.tiny import make_adapter, make_baichuan, make_model

CPU = torch.device("cpu")
LENGTHS = (3, 40, 1, 17, 90, 5, 5, 33)


def prompts_of(lengths, vocabulary=256):
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(torch.randint(vocabulary, (length,), generator=generator).tolist(), key)
        for key, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module", params=["qwen2_tied", "llama3"])
def engine(request, tiny_models):
    return TransformersEngine.from_folder(tiny_models(request.param), torch.float32, CPU)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


def test_greedy_equals_transformers_token_for_token(engine, prompts):
    answers = engine.generate(prompts, Sampling(temperature=0, max_tokens=24))
    for prompt, [answer] in zip(prompts, answers, strict=True):
        expected = engine.model.generate(
            torch.tensor([prompt.token_ids]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=sorted(engine.end_ids),
            pad_token_id=0,
        )[0, len(prompt.token_ids) :]
        assert list(answer.token_ids) == expected.tolist()
        ended = answer.token_ids[-1] in engine.end_ids
        assert answer.finish_reason == ("stop" if ended else "length")
        assert len(answer.token_ids) == 24 or ended


def test_log_probs_are_those_of_one_forward_pass_at_the_temperature(engine, prompts):
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=100, max_tokens=12, completions=2)
    for prompt, answers in zip(prompts, engine.generate(prompts, sampling), strict=True):
        for answer in answers:
            tokens = torch.tensor([[*prompt.token_ids, *answer.token_ids]])
            with torch.no_grad():
                logits = engine.model(tokens).logits[0, len(prompt.token_ids) - 1 : -1]
            expected = torch.log_softmax(logits.double() / 0.7, -1)
            expected = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert torch.tensor(answer.logprobs) == pytest.approx(expected.numpy(), abs=1e-4)


def test_samples_do_not_depend_on_the_batch(engine, prompts):
    sampling = Sampling(max_tokens=16, completions=3, seed=5)
    together = engine.generate(prompts, sampling)
    alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    backwards = engine.generate(prompts[::-1], sampling)[::-1]
    tight = TransformersEngine(engine.model, engine.tokenizer, batch_tokens=120)  # rows join while others run
    longer = engine.generate(prompts, dataclasses.replace(sampling, max_tokens=20))
    for other in (alone, backwards, tight.generate(prompts, sampling)):
        assert [[a.token_ids for a in some] for some in other] == [
            [a.token_ids for a in some] for some in together
        ]
    for some, more in zip(together, longer, strict=True):
        assert [a.token_ids for a in some] == [a.token_ids[:16] for a in more]
    assert len({a.token_ids for some in together for a in some}) == 3 * len(prompts)
    other_seed = engine.generate(prompts, dataclasses.replace(sampling, seed=6))
    assert other_seed[0][0].token_ids != together[0][0].token_ids


def test_a_stop_text_ends_a_completion_and_is_left_out(engine, prompts):
    prompt = prompts[1:2]
    sampling = Sampling(max_tokens=60, seed=3)
    [[free]] = engine.generate(prompt, sampling)
    at = next(i for i in range(5, len(free.text) - 2) if free.text[i : i + 2].isascii())
    stop = free.text[at : at + 2]
    [[stopped]] = engine.generate(prompt, dataclasses.replace(sampling, stop=(stop, "never written")))
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(free.token_ids)


def test_tokens_are_reported_as_they_are_drawn(engine, prompts):
    seen = {}
    answers = engine.generate(
        prompts,
        Sampling(max_tokens=4, completions=2),
        lambda i, k, token: seen.setdefault((i, k), []).append(token),
    )
    assert seen == {(i, k): list(a.token_ids) for i, some in enumerate(answers) for k, a in enumerate(some)}


def test_the_context_is_never_passed_and_long_prompts_are_counted(tmp_path):
    folder = make_model(tmp_path / "short", max_position_embeddings=32)
    engine = TransformersEngine.from_folder(folder, torch.float32, CPU)
    [[answer]] = engine.generate(prompts_of([30]), Sampling(temperature=0, max_tokens=10))
    assert (len(answer.token_ids), answer.finish_reason) == (2, "length")
    with pytest.raises(
        InputError, match=r"prompt 1: .* context of 32 tokens, got 40; 2 of 3 prompts are too long"
    ):
        engine.generate(prompts_of([5, 40, 32]), Sampling())
    with pytest.raises(InputError, match="must have a token"):
        engine.generate([Prompt([])], Sampling())
    assert engine.generate([], Sampling()) == []


def test_new_weights_replace_the_old_ones(tmp_path, tiny_models, prompts):
    """An engine given another model's tensors is that model; a tensor left out is an error."""
    for variant in ("qwen2_tied", "llama3"):
        folder = tiny_models(variant)
        expected = TransformersEngine.from_folder(folder, torch.float32, CPU)
        engine = TransformersEngine.from_assets(folder, torch.float32, CPU)
        tensors = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        engine.update_weights(tensors.items(), version=4)
        sampling = Sampling(max_tokens=8, seed=2)
        answers = engine.generate(prompts, sampling)
        assert [a.token_ids for [a] in answers] == [
            a.token_ids for [a] in expected.generate(prompts, sampling)
        ]
        assert {a.weight_version for [a] in answers} == {4}
        name = next(iter(tensors))
        with pytest.raises(InputError, match=f"missing {name}"):
            engine.update_weights([(n, t) for n, t in tensors.items() if n != name], version=5)
        with pytest.raises(InputError, match="must keep its shape"):
            engine.update_weights([(name, torch.zeros(2, 2))], version=5)
        with pytest.raises(InputError, match="no tensor x"):
            engine.update_weights([("x", torch.zeros(2))], version=5)


@pytest.mark.parametrize("kind", ["lora", "dora", "saved", "saved_tied"])
def test_an_adapter_alone_answers_as_the_merged_weights(kind, tmp_path, tiny_models, prompts):
    """The base is copied once and stays; each version's A and B replace the last; merged weights end their use.

    So do complete copies of modules.
    """
    folder = tiny_models("qwen2_tied" if kind == "saved_tied" else "qwen2_untied")
    shape, weights = read_shape(folder), open_hf(folder)[0]
    engine = TransformersEngine.from_assets(folder, torch.float32, CPU)
    base = object()
    engine.update_base(((name, weights.tensor(name)) for name in weights.names), base)
    assert engine.holds_base(base)
    held = {name: tensor.clone() for name, tensor in engine.model.named_parameters()}
    sampling = Sampling(temperature=0, max_tokens=8)
    dora = kind == "dora"
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"] if kind == "lora" else "all-linear"
    saved = ["norm", "lm_head"] if kind.startswith("saved") else []
    seen = []
    for version, b in ((3, 0.3), (4, 0.9)):
        path = make_adapter(tmp_path / str(version), folder, b=b, targets=targets, dora=dora, saved=saved)
        adapter = read_adapter(path, shape)
        assert engine.refuses_adapter(adapter) is None
        engine.update_adapter(LiveAdapter(adapter, read_tensors(path), shape), version)
        merge_adapter(folder, path, tmp_path / f"merged_{version}")
        judge = TransformersEngine.from_folder(tmp_path / f"merged_{version}", torch.float32, CPU)
        answers = engine.generate(prompts, sampling)
        for [answer], [wanted] in zip(answers, judge.generate(prompts, sampling), strict=True):
            assert answer.token_ids == wanted.token_ids
            # Log-probs of size 6: W x + s B (A x) rounds elsewhere than (W + s B A) x does.
            assert answer.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)
            assert answer.weight_version == version
        seen.append([answer.token_ids for [answer] in answers])
    assert seen[0] != seen[1]
    assert all(torch.equal(tensor, held[name]) for name, tensor in engine.model.named_parameters())
    engine.update_weights(((name, weights.tensor(name)) for name in weights.names), version=5)
    assert not engine.holds_base(base)
    plain = TransformersEngine.from_folder(folder, torch.float32, CPU).generate(prompts, sampling)
    assert [a.token_ids for [a] in engine.generate(prompts, sampling)] == [a.token_ids for [a] in plain]


def test_baichuan2_generates_as_its_llama_and_takes_its_own_tensors(tmp_path, prompts):
    """Greedy answers equal a step-by-step argmax of the model that ``convert verify`` compares with."""
    folder = make_baichuan(tmp_path / "baichuan")
    weights, shape = open_hf(folder)
    judge = load_hf_model(folder, weights, shape)
    sampling = Sampling(temperature=0, max_tokens=6)
    engine = TransformersEngine.from_folder(folder, torch.float32, CPU)
    answers = engine.generate(prompts[:3], sampling)
    for prompt, [answer] in zip(prompts, answers, strict=False):
        tokens = list(prompt.token_ids)
        for token in answer.token_ids:
            with torch.no_grad():
                assert token == judge(torch.tensor([tokens])).logits[0, -1].argmax().item()
            tokens.append(token)
    live = TransformersEngine.from_assets(folder, torch.float32, CPU)
    live.update_weights(((name, weights.tensor(name)) for name in weights.names), version=2)
    assert [a.token_ids for [a] in live.generate(prompts[:3], sampling)] == [a.token_ids for [a] in answers]


def test_models_that_generate_nothing_are_refused(tmp_path):
    folder = make_model(tmp_path / "reward", "qwen2_reward")
    with pytest.raises(InputError, match="needs a language model"):
        TransformersEngine.from_folder(folder, torch.float32, CPU)


def test_a_model_that_is_not_finite_is_refused(tmp_path, prompts):
    engine = TransformersEngine.from_folder(make_model(tmp_path / "nan"), torch.float32, CPU)
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(float("nan"))
    for sampling in (Sampling(max_tokens=2), Sampling(max_tokens=2, temperature=0)):
        with pytest.raises(InputError, match="must be finite, got NaN: .*too large for float32"):
            engine.generate(prompts, sampling)
