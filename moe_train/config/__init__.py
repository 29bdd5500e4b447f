"""Every setting of a run, as frozen dataclasses: what exists, what type it has, and what cannot be combined.

hydra composes `configs/`; `compose.py` converts the result into a `RunConfig` once, and nothing beyond that line sees
a DictConfig. A combination that cannot work is refused here, with the key, the value and the remedy, before anything
is loaded.
"""

from moe_train.config.cost import BudgetConfig, CostConfig, Purpose
from moe_train.config.data import (
    AnyDataConfig,
    DataConfig,
    HubConfig,
    LocalPackagesConfig,
    LocalPythonConfig,
    TextFilesConfig,
)
from moe_train.config.hardware import HardwareConfig, LinksConfig, PeakConfig, TrackingConfig
from moe_train.config.model import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeScalingConfig,
    YarnConfig,
)
from moe_train.config.parallel import ParallelConfig
from moe_train.config.precision import Fp8Config, Fp8HealthConfig, OperandConfig, PrecisionConfig
from moe_train.config.run import RunConfig, differences, model_digest, to_dict
from moe_train.config.training import (
    AdamWConfig,
    BatchRampConfig,
    CheckpointConfig,
    EvalConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    SegmentsConfig,
    StopConfig,
    WarmupDecayConfig,
)

__all__ = [
    "AdamWConfig",
    "AnyDataConfig",
    "BatchRampConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "CostConfig",
    "DataConfig",
    "EvalConfig",
    "Fp8Config",
    "Fp8HealthConfig",
    "GQAConfig",
    "HardwareConfig",
    "HubConfig",
    "LinksConfig",
    "Llama3RopeConfig",
    "LocalPackagesConfig",
    "LocalPythonConfig",
    "MLAConfig",
    "MTPConfig",
    "MoEConfig",
    "ModelConfig",
    "MuonConfig",
    "OperandConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PeakConfig",
    "PrecisionConfig",
    "Purpose",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmentsConfig",
    "StopConfig",
    "TextFilesConfig",
    "TrackingConfig",
    "WarmupDecayConfig",
    "YarnConfig",
    "differences",
    "model_digest",
    "to_dict",
]
