"""FP8: what its settings must agree on, and what rows of tokens it computes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROWS = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
"""By recipe: the tokens of a matrix product are a multiple of this. A weight's gradient is a sum
over tokens, quantised in blocks of so many of them, or as many as the device multiplies at once."""
CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""By recipe: the least compute capability."""
DEFAULT_RECIPE = "tensorwise"


def fp8_faults(model: Any) -> Iterator[str]:
    """What the settings of a model section do not agree on."""
    if model.fp8 is None:
        for key in ("fp8_recipe", "first_last_layers_bf16"):
            if value := getattr(model, key):
                yield (
                    f"model.{key} = {value} has no effect without model.fp8: set model.fp8: "
                    "hybrid, or remove it"
                )
        return
    if model.dtype != "bfloat16":
        yield (
            f"model.fp8 = {model.fp8} with model.dtype: {model.dtype}: what is not FP8 is "
            "bfloat16: set model.dtype: bfloat16"
        )
    if model.fp8_recipe == "delayed" and model.first_last_layers_bf16:
        yield (
            "model.first_last_layers_bf16 = True with model.fp8_recipe: delayed, whose scales are "
            "updated for all layers together: choose another recipe, or remove it"
        )


def fp8_size_faults(model: Any, sizes: Any, tensor: int) -> Iterator[str]:
    """Widths of a model, each rank's share of them, that FP8 does not multiply."""
    if model.first_last_layers_bf16 and sizes.num_layers <= 2:
        yield (
            f"model.first_last_layers_bf16 = True with model.num_layers = {sizes.num_layers} "
            "leaves no layer in FP8: remove it, or model.fp8"
        )
    heads = sizes.num_attention_heads * sizes.kv_channels // tensor
    keys = sizes.num_query_groups * sizes.kv_channels // tensor
    widths = {
        "model.hidden_size": sizes.hidden_size,
        "channels of a rank's queries": heads,
        "channels of a rank's queries, keys and values": heads + 2 * keys,
        "a rank's share of model.ffn_hidden_size": sizes.ffn_hidden_size // tensor,
    }
    if sizes.num_moe_experts:
        del widths["a rank's share of model.ffn_hidden_size"]
        widths["model.moe_ffn_hidden_size"] = sizes.moe_ffn_hidden_size // tensor
    for name, width in widths.items():
        if width % 16:
            yield f"model.fp8: {name} = {width} is not a multiple of 16: change it, or remove fp8"
