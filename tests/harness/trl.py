"""TRL's trainers in comparisons with ours: samples in order, on CPU in fp32, nothing saved; optionally with PEFT."""

import importlib
from pathlib import Path

import torch

STEPS, BATCH, LENGTH = 10, 4, 256
LR = 3e-4

TRL_SETTINGS = {
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def trl_rows(module, kind, model, records, folder, adapter=None, given=None, methods=None, **options):
    """Return TRL's log of every step, unrounded.

    ``adapter``: a PEFT folder; it is trained instead of the model's weights, from the values that the folder holds. Or
    PEFT's options, whose initial values it then has. ``given``: further arguments of the trainer; ``methods`` replace
    its own. ``options``: of its configuration.
    """
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    trl = importlib.import_module(module)
    parent = getattr(trl, f"{kind}Trainer")

    class Recording(parent):
        rows, loss = [], None

        def training_step(self, *args, **kwargs):
            type(self).loss = super().training_step(*args, **kwargs).item()
            return torch.tensor(self.loss)

        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                means = {
                    name: sum(values) / len(values)
                    for name, values in (
                        self._metrics if hasattr(self, "_metrics") else self._stored_metrics
                    )["train"].items()
                    if values and isinstance(values[0], (int, float))
                }
                self.rows.append({**means, "loss": self.loss, "grad_norm": logs.get("grad_norm")})
            super().log(logs, *args, **kwargs)

    Recording.rows, is_folder = [], isinstance(adapter, Path)
    for name, method in (methods or {}).items():
        setattr(Recording, name, method)
    own = {"pad_to_multiple_of": None} if kind in ("DPO", "Reward") else {}
    if kind in ("GRPO", "RLOO"):
        own = {"shuffle_dataset": False}
    else:
        own["max_length"] = LENGTH
    if "experimental" in module:
        own = {"max_length": LENGTH}
        if kind in ("CPO", "ORPO"):
            own["max_completion_length"] = LENGTH
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        max_steps=STEPS,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        **{
            "per_device_train_batch_size": BATCH,
            "learning_rate": LR,
            **TRL_SETTINGS,
            **own,
            **options,
        },
    )
    auto = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    trainer = Recording(
        auto.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(model),
        **({} if adapter is None else {"peft_config": peft_config(adapter) if is_folder else adapter}),
        **(given or {}),
    )
    if is_folder:
        load_adapter(trainer.model, adapter)
    trainer.train()
    return Recording.rows


def peft_config(adapter):
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = False
    return config


def load_adapter(model, adapter):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    loaded = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
