"""Law 3: ten SFT steps have the losses of TRL's SFTTrainer on the same data, model and schedule (1e-4 relative).

TRL pads and accumulates micro-batches; we pack. Both give each trained token of the global batch one weight.
"""

import json
import random

import pytest
import torch

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments
from tests.harness.trl import TRL_SETTINGS

STEPS, BATCH, LENGTH = 10, 8, 256
# No default: a decay so strong that ten steps show it, and show that vectors have none; an eps that slows small
# gradients, and a clip that every step passes.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 10.0, "betas": (0.8, 0.95), "eps": 1e-4, "clip_grad": 0.5}


@pytest.fixture(scope="module")
def records():
    draw = random.Random(3)
    made = []
    for _ in range(STEPS * BATCH):
        a, b = (draw.randrange(10 ** draw.randrange(1, 9)) for _ in range(2))
        prompt = [{"role": "system", "content": "Add."}] if draw.random() < 0.5 else []
        prompt.append({"role": "user", "content": f"{a} + {b} = ?"})
        made.append(
            {"prompt": prompt, "completion": [{"role": "assistant", "content": f"{a} + {b} = {a + b}"}]}
        )
    return made


def trl_losses(model, records, folder, accumulate, schedule):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class Recording(SFTTrainer):
        losses = []

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())  # the log rounds
            return loss

    Recording.losses = []
    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=STEPS,
            learning_rate=OPTIMIZER["lr"],
            weight_decay=OPTIMIZER["weight_decay"],
            lr_scheduler_type=schedule,
            warmup_steps=3,
            adam_beta1=OPTIMIZER["betas"][0],
            adam_beta2=OPTIMIZER["betas"][1],
            adam_epsilon=OPTIMIZER["eps"],
            max_grad_norm=OPTIMIZER["clip_grad"],
            max_length=LENGTH,
            packing=False,
            **TRL_SETTINGS,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [sum(trainer.losses[i : i + accumulate]) for i in range(0, STEPS * accumulate, accumulate)]


@pytest.mark.parametrize(
    "variant, world, layout, accumulate, schedule",
    [
        ("qwen2_tied", 1, {}, 1, "constant_with_warmup"),
        ("llama3", 4, {"parallel__tensor": 2, "parallel__pipeline": 2}, 4, "cosine"),
    ],
    ids=["one_process", "tp2_pp2_against_accumulation"],
)
def test_losses_equal_trl(pool, tiny_models, records, tmp_path, variant, world, layout, accumulate, schedule):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {f"optimizer__{name}": value for name, value in OPTIMIZER.items()}
    options["optimizer__betas"] = list(OPTIMIZER["betas"])
    arguments = run_arguments(
        tiny_models(variant),
        data,
        tmp_path / "run",
        data__sequence_length=LENGTH,
        data__shuffle=False,
        train__steps=STEPS,
        train__global_batch_size=BATCH,
        optimizer__schedule=schedule.removesuffix("_with_warmup"),
        optimizer__warmup_steps=3,
        **options,
        **layout,
    )
    pool.run(world, training_ranks.train, arguments)
    ours = [row["loss"] for row in metrics_of(tmp_path / "run")]
    theirs = trl_losses(tiny_models(variant), records, tmp_path / "trl", accumulate, schedule)
    assert ours == pytest.approx(theirs, rel=1e-4)
    # it did learn: ten equal losses of a model that stands still prove nothing
    assert ours[-1] < 0.9 * ours[0]
