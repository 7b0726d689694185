"""Apex's switches leave updates and gradients as they are without it, with the same state, or are refused in one line.

Apex needs a GPU: a stand-in with its signatures computes in PyTorch (``harness/fake_packages.py``); the gradients that
its products add up are in ``tests/model/test_optional_packages.py``.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_align import load_config
from megatron_align.errors import InputError
from megatron_align.model.families import read_shape
from megatron_align.model.gradient_fusion import require_gradient_fusion
from megatron_align.training.apex_adamw import ApexAdamW, require_apex
from megatron_align.training.model_checks import require_kernels
from megatron_align.training.optimizer import Optimizer
from tests.harness import training_ranks
from tests.harness.fake_packages import installed
from tests.harness.tiny import metrics_of, run_arguments

SECTIONS = {"model": {"path": "m"}, "data": {"train": "d"}, "checkpoint": {"dir": "c"}, "train": {"steps": 1}}
OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}


def shards(draw):
    """Return matrices that decay and a vector that does not, and one group without a gradient."""
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(n, generator=draw)) for n in sizes], "weight_decay": decay}
        for sizes, decay in (((7, 30), 0.3), ((5,), 0.0), ((2,), 0.0))
    ]
    return [{**group, **OPTIONS} for group in groups]


def with_state(optimizer):
    for group in optimizer.param_groups:
        for shard in group["params"]:
            moments = {name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[shard] = {"step": torch.zeros(()), **moments}
    return optimizer


def numbers(optimizer):
    """Return every number of weights and state, by parameter and name."""
    return {
        (i, name): value.detach().clone()
        for i, shard in enumerate(shard for group in optimizer.param_groups for shard in group["params"])
        for name, value in {"weight": shard, **optimizer.state[shard]}.items()
    }


def test_updates_and_state_are_those_of_torch_and_are_left_out_by_the_device():
    with installed("apex"):
        apex = with_state(ApexAdamW(shards(torch.Generator().manual_seed(0))))
    torchs = with_state(torch.optim.AdamW(shards(torch.Generator().manual_seed(0))))
    draw = torch.Generator().manual_seed(1)
    for update in range(4):
        for ours, theirs in zip(apex.param_groups[:2], torchs.param_groups[:2], strict=True):
            ours["lr"] = theirs["lr"] = 0.1 / (1 + update)
            for a, b in zip(ours["params"], theirs["params"], strict=True):
                b.grad = torch.randn(len(b), generator=draw)
                a.grad = b.grad * 3
        owner = SimpleNamespace(
            config=SimpleNamespace(clip_grad=1.0), optimizer=apex, step_with_ready_grads=apex.step
        )
        before = numbers(apex)
        Optimizer.launch_update(owner, torch.tensor(3.0, dtype=torch.float64), torch.tensor(update == 2))
        if update == 2:
            assert all(torch.equal(before[key], value) for key, value in numbers(apex).items())
            continue
        torchs.step()
        for key, value in numbers(apex).items():
            torch.testing.assert_close(value, numbers(torchs)[key], rtol=1e-5, atol=1e-6)
    steps = {key[0]: value.item() for key, value in numbers(apex).items() if key[1] == "step"}
    assert steps == {0: 3, 1: 3, 2: 3, 3: 0}


@pytest.mark.parametrize(
    "check, chip, options, message",
    [
        (require_apex, None, {}, "optimizer.implementation: apex needs a CUDA GPU, this process sees none"),
        (
            require_apex,
            (9, 0),
            {"lacks": "amp_C"},
            "needs Apex with its CUDA extensions .amp_C.: not installed; ",
        ),
        (require_apex, (9, 0), {"lacks": "multi_tensor_adam_capturable"}, "got an older one; docs/"),
        (
            lambda: require_gradient_fusion("torch"),
            (9, 0),
            {"lacks": "fused_weight_gradient_mlp_cuda"},
            "train.gradient_accumulation_fusion needs Apex .*: not installed .*, or model.linear: te",
        ),
        (lambda: require_gradient_fusion("te"), None, {}, "fusion needs a CUDA GPU, this process sees none"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(check, chip, options, message):
    with installed("apex", chip=chip, **options), pytest.raises(InputError, match=message) as refused:
        check()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "option, needs",
    [
        ("optimizer.implementation=apex", "apex.multi_tensor_apply"),
        (
            "objective.name=ppo rollout.engine=data critic.optimizer.implementation=apex",
            "apex.multi_tensor_apply",
        ),
        ("train.gradient_accumulation_fusion=true", "fused_weight_gradient_mlp_cuda"),
    ],
)
def test_each_switch_is_checked_before_the_ranks_meet(option, needs, tiny_models):
    shape = read_shape(tiny_models())
    with installed(), pytest.raises(InputError, match=f"needs Apex .*{needs}"):
        require_kernels(load_config(SECTIONS, option.split()), shape, dry_run=False)
    with installed("apex"):
        require_kernels(load_config(SECTIONS, option.split()), shape, dry_run=False)
        require_kernels(load_config(SECTIONS, []), shape, dry_run=False)


def test_adapters_with_fused_gradients_are_refused():
    sections = {**SECTIONS, "model": {"path": "m", "adapter": {"rank": 2}}}
    with pytest.raises(InputError, match="gradient_accumulation_fusion must be false with model.adapter"):
        load_config(sections, ["train.gradient_accumulation_fusion=true"])


@pytest.mark.slow
def test_runs_are_those_without_it_and_either_resumes_the_other(pool, tiny_models, chat_file, tmp_path):
    def train(name, steps, *, apex):
        """Return the losses and gradient norms, one after the other."""
        options = {"optimizer__implementation": "apex", "train__gradient_accumulation_fusion": True}
        arguments = run_arguments(
            tiny_models("qwen2_untied"), chat_file, tmp_path / name, train__steps=steps, parallel__tensor=2,
            **(options if apex else {}),
        )  # fmt: skip
        pool.run(2, training_ranks.train_with_fakes, arguments, *(["apex"] if apex else []))
        return [row[key] for row in metrics_of(tmp_path / name) for key in ("loss", "grad_norm")]

    for first in (True, False):
        assert train("a", 2, apex=first) == pytest.approx(train("b", 2, apex=not first), rel=1e-5)
        assert train("a", 3, apex=not first) == pytest.approx(train("b", 3, apex=first), rel=1e-5)
        for name in "ab":
            (tmp_path / name).rename(tmp_path / f"{name}{first}")
