"""What a model's configuration says about the attention of its layers.

The names are Megatron-Core's: `window_size` is (tokens before, tokens after) a token,
`window_attn_skip_freq` says which layers have the window, `softmax_type` whether heads have sinks.
`attn_logit_softcapping` is the bound of scores, which Megatron-Core does not have.
"""

from __future__ import annotations

from typing import Any


def layer_windows(config: Any) -> list[int | None]:
    """For each layer of the model the tokens that a token sees along its root path, itself
    included; None: all of them."""
    if config.window_size is None:
        return [None] * config.num_layers
    window, kinds = config.window_size[0] + 1, config.window_attn_skip_freq
    if kinds is None:
        return [window] * config.num_layers
    if isinstance(kinds, int):  # a number N, as Bridge has it: every layer but each Nth
        kinds = [layer % kinds != 0 for layer in range(1, config.num_layers + 1)]
    return [window if kind else None for kind in kinds]


def softcap_of(config: Any) -> float | None:
    """The bound of attention scores; None: there is none."""
    return getattr(config, "attn_logit_softcapping", None)


def features_of(config: Any) -> list[str]:
    """What the layers' attention needs, by the names in backends.FEATURES."""
    needs = {
        "window": config.window_size is not None,
        "softcap": softcap_of(config) is not None,
        "sinks": config.softmax_type != "vanilla",
    }
    return [name for name, is_needed in needs.items() if is_needed]


def attention_channels(config: Any) -> int:
    """Channels of the heads that kernels compute with: those of queries and keys or of values,
    which multi-latent attention may have more or fewer of."""
    latent = getattr(getattr(config, "architecture", None), "latent", None)
    return max(config.kv_channels, latent.value_channels if latent is not None else 0)
