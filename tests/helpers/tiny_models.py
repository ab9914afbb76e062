"""A model of one layer, and a run's configuration with it, for unit tests."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prefix.config import Config, ModelConfig, parse_config
from megatron_prefix.model.provider import model_provider, transformer_config

SIZES = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "num_query_groups": 1,
}


def tiny_model(world, seed: int = 1, vocab_size: int = 320, **settings) -> torch.nn.Module:
    """A model with its initial weights."""
    config = transformer_config(
        ModelConfig(**{**SIZES, **settings}), vocab_size=vocab_size, seed=seed
    )
    return model_provider(config=config, pg_collection=world.groups)


def tiny_config(dataset: str, output: Path, **sections: dict) -> Config:
    """A run of two steps of four groups that saves nothing; `sections` go on top."""
    defaults = {
        "data": {"train": dataset, "global_batch_size": 4, "row_capacity": 512},
        "model": SIZES,
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2},
        "logging": {"output": str(output)},
    }
    return parse_config(
        {
            name: {**defaults.get(name, {}), **sections.get(name, {})}
            for name in {**defaults, **sections}
        }
    )
