"""The model: Megatron-Core's GPT with tree attention, and its head on the tokens that predict.

The face is lazy, so that model/hf can be used without loading Megatron-Core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.model.gpt import TreeTransformerConfig, unwrap
    from megatron_prefix.model.logps import response_logps
    from megatron_prefix.model.names import REWARD_HEAD
    from megatron_prefix.model.provider import (
        load_hf_weights,
        model_provider,
        transformer_config,
    )
else:
    __getattr__ = lazy_face(
        __name__,
        gpt=["TreeTransformerConfig", "unwrap"],
        logps=["response_logps"],
        names=["REWARD_HEAD"],
        provider=["load_hf_weights", "model_provider", "transformer_config"],
    )

__all__ = [
    "REWARD_HEAD",
    "TreeTransformerConfig",
    "load_hf_weights",
    "model_provider",
    "response_logps",
    "transformer_config",
    "unwrap",
]
