"""The configuration of a run: sections, the objective's options, and how both are read."""

from megatron_align.config.run import RunConfig, parse, to_dict
from megatron_align.config.sections import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReferenceConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "RunConfig",
    "TrainConfig",
    "parse",
    "to_dict",
]
