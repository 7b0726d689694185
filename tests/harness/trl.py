"""Settings of TRL's trainers in comparisons with ours: samples in order, on CPU in fp32, nothing saved or logged."""

TRL_SETTINGS = {
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
