"""An engine fed with live sharded weights answers as transformers from the exported folder, after each step anew."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_align.errors import InputError, TrainingFault
from megatron_align.rollout.live_weights import require_version
from megatron_align.rollout.types import Completion
from tests.harness import training_ranks
from tests.harness.http_server import VLLMScript, serving
from tests.harness.marks import mark_slow
from tests.harness.tiny import run_arguments
from tests.rollout.test_transformers_engine import prompts_of

LAYOUTS = {
    "tensor_pipeline": {"parallel__tensor": 2, "parallel__pipeline": 2},
    "tensor_context": {"parallel__tensor": 2, "parallel__context": 2},
    "overlapped": {
        "parallel__pipeline": 2,
        "parallel__overlap_grad_reduce": True,
        "parallel__overlap_param_gather": True,
    },
    "virtual_adapter": {
        "parallel__pipeline": 2,
        "parallel__virtual_pipeline": 2,
        "model__adapter": {"rank": 4, "alpha": 64},
    },
    "tensor_pissa": {"parallel__tensor": 4, "model__adapter": {"rank": 4, "alpha": 8, "init": "pissa"}},
    "pipeline_copies": {
        "parallel__tensor": 2,
        "parallel__pipeline": 2,
        "model__adapter": {"rank": 4, "modules_to_save": ["norm", "lm_head"], "ensure_weight_tying": True},
    },
}


@pytest.mark.parametrize(
    "layout",
    mark_slow(
        LAYOUTS, ["tensor_context", "overlapped", "virtual_adapter", "tensor_pissa", "pipeline_copies"]
    ),
)
def test_live_weights_answer_as_the_exported_folder(pool, tiny_models, chat_file, tmp_path, layout):
    model = tiny_models("qwen2_untied" if layout == "tensor_context" else "qwen2_tied")
    # A learning rate at which the weights of each step give other answers.
    options = {**LAYOUTS[layout], "train__steps": 2, "optimizer__lr": 0.02, "checkpoint__export_hf": False}
    arguments = run_arguments(model, chat_file, tmp_path / "run", **options)
    prompts = prompts_of([5, 30, 12])
    answers = pool.run(4, training_ranks.live_answers, arguments, prompts, tmp_path)
    by_step = answers[0][0]
    for others, most, taken in answers:
        assert others == by_step
        if "model__adapter" in options:  # the base goes once, A and B every time
            assert taken == ["update_base", "update_weights", *["update_adapter"] * 3]
        else:
            assert taken == ["update_weights"] * 3
        # Of about 50 tensors: one row's (query, key and value), and another's that gloo's threads still hold.
        assert most <= 6
    for step in range(3):
        folder = tmp_path / str(step)
        judge, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        for prompt, (answer, logprobs) in zip(prompts, by_step[step], strict=True):
            made = judge.generate(
                torch.tensor([prompt.token_ids]),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
            assert list(answer) == made[0, len(prompt.token_ids) :].tolist()
            with torch.no_grad():
                logits = judge(made).logits[0, len(prompt.token_ids) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)  # fp32, with and without a cache
    assert by_step[0] != by_step[1] != by_step[2]


@pytest.mark.parametrize("dora", mark_slow([False, True], [True]), ids=["alone", "merged"])
def test_servers_of_all_ranks_receive_the_adapter_alone(dora, pool, tiny_models, chat_file, tmp_path):
    """As the plain one of the base that they hold, also where training holds another; DoRA is sent merged."""
    options = {"parallel__tensor": 2, "train__steps": 2, "optimizer__lr": 0.02}
    options["model__adapter"] = {"rank": 3, "alpha": 6, "init": "pissa", "dora": dora}
    server, run = VLLMScript(), tmp_path / "run"
    with serving(server) as url:
        arguments = run_arguments(tiny_models(), chat_file, run, **options)
        one, other = pool.run(2, training_ranks.update_servers, arguments, url, True)
    assert one == other
    assert [version for _, version in one] == [1, 2]
    if dora:
        assert [name for name, _ in one] == ["m", "m"]
        assert len(server.weights) == 2
        assert not server.loaded
        return
    assert [name for name, _ in server.loaded] == [name for name, _ in one]
    assert not server.weights
    (_, first), (_, second) = server.loaded
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first[name].shape == (6, 64)
    assert not torch.equal(first[name][:3], second[name][:3])  # trained
    assert torch.equal(first[name][3:], second[name][3:])  # what it started with


def test_an_engine_that_fails_ends_the_update_on_every_rank(pool, tiny_models, chat_file, tmp_path):
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run", parallel__tensor=2)
    faults = [InputError("no room"), OSError("disk full"), torch.OutOfMemoryError("out of\nmemory")]
    errors = pool.run(2, training_ranks.fail_to_update, arguments, 1, faults)
    found = [
        f"the engine could not take the weights of version 0: {line}"
        for line in ("no room", "disk full", "out of memory")
    ]
    assert errors == [found] * 2


def test_a_completion_of_other_weights_is_found():
    made = Completion(token_ids=(1,), logprobs=(0.0,), text="", finish_reason="stop", weight_version=3)
    require_version([[made]], 3)
    with pytest.raises(TrainingFault, match="of version 4, the engine answered with version 3"):
        require_version([[made], [made]], 4)
