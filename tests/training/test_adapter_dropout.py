"""Law 10 with dropout: the same gradients on every layout, packed, shared, recomputed or not, and losses of PEFT."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from megatron_align.data.batching.token_keys import token_keys
from megatron_align.model.dropout import _dropped, feature_keys
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_adapter, metrics_of, run_arguments, write_pairs

P = 0.4
WEIGHTS = "adapter/adapter_model.safetensors"
LAYOUTS = {
    "tp2_sp_mlp": (2, {"parallel__tensor": 2, "train__recompute_modules": "[mlp, norms]"}),
    "tp2_pp2_full": (
        4,
        {
            "parallel__tensor": 2,
            "parallel__sequence": False,
            "parallel__pipeline": 2,
            "train__recompute_layers": 1,
        },
    ),
    "allgather2": (
        2,
        {"parallel__context": 2, "parallel__context_kind": "allgather", "data__share_prefix": False},
    ),
    "vpp2_dp2": (
        4,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__recompute_modules": "[mlp]"},
    ),
}


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    pairs = write_pairs(folder / "pairs.jsonl", samples=12)
    adapter = make_adapter(folder / "start", tiny_models())

    def run(world=1, p=P, **layout):
        run = tmp_path_factory.mktemp("run")
        options = {"objective__name": "dpo", "reference__mode": "none"}
        options["model__adapter"] = f"{{path: {adapter}, dropout: {p}}}"
        # 128 tokens: several packs, so that another one's forward comes before the backward of the first
        arguments = run_arguments(tiny_models(), pairs, run, data__sequence_length=160, **options, **layout)
        pool.run(world, training_ranks.gradients, arguments, run / "adapter")
        return load_file(run / WEIGHTS)

    return run


@pytest.fixture(scope="module")
def of_one_rank(gradients):
    return gradients()


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["allgather2", "vpp2_dp2", "tp2_pp2_full"]))
def test_every_gradient_is_that_of_one_rank(layout, gradients, of_one_rank):
    world, options = LAYOUTS[layout]
    found = gradients(world, **options)
    for name, want in of_one_rank.items():
        assert (found[name] - want).norm() <= 2e-5 * want.norm(), name  # fp32 sums in another order


def test_dropout_changes_the_gradients(gradients, of_one_rank):
    without = gradients(p=0.0)
    assert all((without[name] - want).norm() > 1e-2 * want.norm() for name, want in of_one_rank.items())


class OurDropout(nn.Module):
    """PEFT's dropout with our mask of a sample of a step."""

    def __init__(self, module, keys):
        super().__init__()
        self.module, self.keys = module, keys

    def forward(self, x):
        features = feature_keys(self.module, torch.arange(x.shape[-1]))
        return _dropped(x.transpose(0, 1), self.keys, features, P).transpose(0, 1)


def test_the_first_loss_is_pefts_with_the_same_mask(pool, tiny_models, chat_file, tmp_path):
    model = tiny_models()
    adapter = make_adapter(tmp_path / "adapter", model)
    options = {"train__steps": 2, "train__global_batch_size": 1, "data__shuffle": False}
    options |= {"model__adapter": f"{{path: {adapter}, dropout: {P}}}", "optimizer__lr": 1e-12}
    arguments = run_arguments(model, chat_file, tmp_path / "run", **options)
    pool.run(1, training_ranks.train, arguments)
    store = prepare_run(
        parse([*arguments, "--train.steps", "3"]), RankInfo(rank=0, local_rank=0, world_size=1)
    ).train
    losses = []
    for step in range(2):
        sample = store.sample(step)
        keys = torch.from_numpy(token_keys(1234, step, [0], [sample], len(sample.tokens_L), True))
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter
        )
        for name, layer in peft.base_model.model.named_modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = OurDropout(name, keys)
        tokens = torch.from_numpy(sample.tokens_L.astype("int64"))
        with torch.no_grad():
            logprobs = peft(tokens[None]).logits[0].log_softmax(-1)
        scored = sample.scored_L.nonzero()[0]
        losses.append(-sum(logprobs[t - 1, tokens[t]].item() for t in scored) / len(scored))
    assert [row["loss"] for row in metrics_of(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)
