"""The configuration of a run: its sections, and how they are read. ``objectives/configuration.py`` parses it."""

from megatron_align.config.inputs import (
    AdapterConfig,
    DataConfig,
    DataSource,
    ModelConfig,
    ReferenceConfig,
)
from megatron_align.config.run import RunConfig, to_dict
from megatron_align.config.sections import (
    CheckpointConfig,
    CriticConfig,
    Fp8Config,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "DataSource",
    "Fp8Config",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "to_dict",
]
