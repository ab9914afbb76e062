"""The configuration of a run: its sections, their bounds and rules, and reading it from YAML."""

from megatron_prefix.config.load import load_config, parse_config
from megatron_prefix.config.loss import LossConfig
from megatron_prefix.config.model import ModelConfig, ModelSizes
from megatron_prefix.config.parallel import ParallelConfig
from megatron_prefix.config.parts import RopeScaling
from megatron_prefix.config.schema import Config

__all__ = [
    "Config",
    "LossConfig",
    "ModelConfig",
    "ModelSizes",
    "ParallelConfig",
    "RopeScaling",
    "load_config",
    "parse_config",
]
