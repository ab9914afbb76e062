"""Exact prefix-sharing preference training on Megatron-Core.

The public names below are imported when they are first used, so that reading data needs neither
torch nor Megatron-Core.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "PrefixTree": "data.tree",
    "PreferenceDataset": "data.store.dataset",
    "Sampler": "data.steps.sampler",
    "tree_targets": "data.steps.collate",
    "score_targets": "data.steps.collate",
    "GroupBatches": "data.steps.compositions.batches",
    "RowBatches": "data.steps.compositions.row_batches",
    "MicroBatch": "data.steps.collate",
    "TreeLayout": "layout",
    "TreePlan": "attention.plan",
    "tree_attention": "attention.api",
    "TreePackedSeqParams": "attention.megatron",
    "tree_layer_spec": "model.spec",
    "TreeTransformerConfig": "model.gpt",
    "model_provider": "model.provider",
    "transformer_config": "model.provider",
    "ModelConfig": "config",
    "LossConfig": "config",
    "forward_step": "engine.step",
    "to_device": "engine.batch",
    "sum_gradients": "engine.step",
    "with_reference": "reference.model",
    "dpo_loss": "objectives.pairwise",
    "ipo_loss": "objectives.pairwise",
    "bradley_terry_loss": "objectives.reward",
}

_MODULES = ("platform",)

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
