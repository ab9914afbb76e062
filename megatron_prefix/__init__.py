"""Exact prefix-sharing preference training on Megatron-Core.

The public names below are imported when they are first used, so that reading data needs neither
torch nor Megatron-Core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_prefix import platform
    from megatron_prefix.attention import TreePackedSeqParams, TreePlan, tree_attention
    from megatron_prefix.checkpoint import export_hf, import_hf
    from megatron_prefix.config import LossConfig, ModelConfig
    from megatron_prefix.data import BuildOptions, PreferenceDataset, PrefixTree, Sampler
    from megatron_prefix.data.build import from_hf_dataset
    from megatron_prefix.data.steps import MicroBatch
    from megatron_prefix.data.steps.collate import score_targets, tree_targets
    from megatron_prefix.data.steps.compositions import GroupBatches, RowBatches
    from megatron_prefix.data.steps.trl_rows import tree_rows
    from megatron_prefix.engine.batch import to_device
    from megatron_prefix.engine.step import forward_step, sum_gradients
    from megatron_prefix.layout import TreeLayout
    from megatron_prefix.model import (
        TreeTransformerConfig,
        load_hf_weights,
        model_provider,
        transformer_config,
    )
    from megatron_prefix.model.parameters import model_fingerprint
    from megatron_prefix.model.spec import tree_layer_spec
    from megatron_prefix.objectives import LossOutputs, register_objective
    from megatron_prefix.objectives.pairwise import dpo_loss, ipo_loss
    from megatron_prefix.objectives.record import FirstValue, ObjectiveRecord, Option
    from megatron_prefix.objectives.reward import bradley_terry_loss
    from megatron_prefix.reference import PrecomputedReference
    from megatron_prefix.reference.scoring import with_reference
else:
    __getattr__ = lazy_face(
        __name__,
        attention=["TreePackedSeqParams", "TreePlan", "tree_attention"],
        checkpoint=["export_hf", "import_hf"],
        config=["LossConfig", "ModelConfig"],
        data=["BuildOptions", "PreferenceDataset", "PrefixTree", "Sampler"],
        data__build=["from_hf_dataset"],
        data__steps=["MicroBatch"],
        data__steps__collate=["score_targets", "tree_targets"],
        data__steps__compositions=["GroupBatches", "RowBatches"],
        data__steps__trl_rows=["tree_rows"],
        engine__batch=["to_device"],
        engine__step=["forward_step", "sum_gradients"],
        layout=["TreeLayout"],
        model=[
            "TreeTransformerConfig",
            "load_hf_weights",
            "model_provider",
            "transformer_config",
        ],
        model__parameters=["model_fingerprint"],
        model__spec=["tree_layer_spec"],
        objectives=["LossOutputs", "register_objective"],
        objectives__pairwise=["dpo_loss", "ipo_loss"],
        objectives__record=["FirstValue", "ObjectiveRecord", "Option"],
        objectives__reward=["bradley_terry_loss"],
        platform=[],
        reference=["PrecomputedReference"],
        reference__scoring=["with_reference"],
    )


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "BuildOptions",
    "FirstValue",
    "GroupBatches",
    "LossConfig",
    "LossOutputs",
    "MicroBatch",
    "ModelConfig",
    "ObjectiveRecord",
    "Option",
    "PrecomputedReference",
    "PreferenceDataset",
    "PrefixTree",
    "RowBatches",
    "Sampler",
    "TreeLayout",
    "TreePackedSeqParams",
    "TreePlan",
    "TreeTransformerConfig",
    "__version__",
    "bradley_terry_loss",
    "dpo_loss",
    "export_hf",
    "forward_step",
    "from_hf_dataset",
    "import_hf",
    "ipo_loss",
    "load_hf_weights",
    "model_fingerprint",
    "model_provider",
    "platform",
    "register_objective",
    "score_targets",
    "sum_gradients",
    "to_device",
    "transformer_config",
    "tree_attention",
    "tree_layer_spec",
    "tree_rows",
    "tree_targets",
    "with_reference",
]
