"""TRL's trainers on one process, as on a GPU or as they come."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.steps.contestant import counted, of_base
from benchmarks.steps.task import CAPACITY, LR, Task

KINDS = {"dpo": "DPO", "sft": "SFT", "kto": "KTO", "reward": "Reward", "grpo": "GRPO"}


def train(task: Task, way: str) -> dict[str, object]:
    """Train and return losses, gradient norms, seconds of all steps but the last, and counts of the last.

    Args:
        task: what is trained.
        way: ``trl``; with ``precomputed`` the reference is computed in advance; with ``packed`` SFT packs.
    """
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    from tests.harness.trl import TRL_SETTINGS, load_adapter, peft_config

    if os.environ.get("TRL_SCORES_COMPLETIONS"):  # without Triton it would also project the prompts' rows
        from trl.trainer import utils

        utils._use_triton = lambda _: True
    kind, parent = KINDS[task.objective], getattr(trl, f"{KINDS[task.objective]}Trainer")
    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []
    operations = 0

    class Timed(parent):  # type: ignore[misc, valid-type]
        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            nonlocal operations
            with counted(self.state.global_step == task.steps - 1) as counter:
                loss = super().training_step(*args, **kwargs)
            operations += counter.get_total_flops() if counter else 0
            losses.append(loss.item())
            return loss

        def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
            norms.extend([logs["grad_norm"]] if "grad_norm" in logs else [])
            super().log(logs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    records = task.read_records()
    options, given, records = of_objective(task, way, records)
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(Path(task.folder) / "trl"),
        max_steps=task.steps,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        **{**TRL_SETTINGS, **options},
    )
    auto = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    trainer = Timed(
        auto.from_pretrained(task.model_folder, dtype=torch.float32, trust_remote_code=False),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(task.model_folder, trust_remote_code=False),
        callbacks=[Clock()],
        **given,
        **({"peft_config": peft_config(task.adapter_folder)} if task.adapter_folder else {}),
    )
    if task.adapter_folder:
        load_adapter(trainer.model, task.adapter_folder)
    trainer.train()
    base = [p for name, p in trainer.model.named_parameters() if "lora_" not in name] if task.rank else []
    state = of_base(base, trainer.optimizer.optimizer)
    each = len(losses) // task.steps  # micro-batches, whose losses add up
    return {
        "losses": [sum(losses[i : i + each]) for i in range(0, len(losses), each)],
        "grad_norms": norms,
        "seconds": seconds[:-1],
        "operations": operations,
        **state,
    }


def of_objective(
    task: Task, way: str, records: list[dict[str, Any]]
) -> tuple[dict[str, object], dict[str, object], list[dict[str, Any]]]:
    """Return what the objective adds to the configuration and to the trainer, and the records as TRL takes them."""
    if task.objective == "grpo":
        return grpo(task, records)
    options: dict[str, object] = {"per_device_train_batch_size": task.micro_batch, "max_length": CAPACITY}
    options["gradient_accumulation_steps"] = task.batch // task.micro_batch
    if task.objective in ("dpo", "kto"):
        options["precompute_ref_log_probs"] = "precomputed" in way
    if "packed" in way:  # packs of the same capacity; as many as hold a step's tokens
        options |= {"packing": True, "packing_strategy": "bfd"}
        tokens = sum(len((r["prompt"] + r["completion"]).encode()) + 1 for r in records)
        packs = max(1, round(tokens / task.steps / CAPACITY))
        options |= {"per_device_train_batch_size": packs, "gradient_accumulation_steps": 1}
    return options, {}, records


def grpo(
    task: Task, records: list[dict[str, Any]]
) -> tuple[dict[str, object], dict[str, object], list[dict[str, Any]]]:
    """Return options and functions that give TRL's trainer the recorded completions and scores in order."""
    from tests.harness.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    size = task.batch * task.completions
    answers = [
        (
            tokenizer(r["prompt"]).input_ids,
            [*tokenizer(a["content"]).input_ids, tokenizer.eos_token_id],
            a["score"],
        )
        for r in records
        for a in r["completions"]
    ]
    scores: list[float] = []

    def rollout_func(prompts: object, trainer: object) -> dict[str, object]:
        taken, answers[:] = answers[:size], answers[size:]
        scores[:] = [score for _, _, score in taken]
        prompt_ids, completion_ids = [ids for ids, _, _ in taken], [ids for _, ids, _ in taken]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    options: dict[str, object] = {
        "per_device_train_batch_size": task.micro_batch * task.completions,
        "gradient_accumulation_steps": task.batch // task.micro_batch,
        "steps_per_generation": task.batch // task.micro_batch,
        "num_generations": task.completions,
        "max_completion_length": CAPACITY,
        "shuffle_dataset": False,
    }
    rewards = [lambda completions, **columns: list(scores)]
    given: dict[str, object] = {"rollout_func": rollout_func, "reward_funcs": rewards}
    return options, given, [{"prompt": record["prompt"]} for record in records]
