"""The part of a Hugging Face model that makes features of images, without its language model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.errors import InputError

ATTENTION = "sdpa"
"""Attention of the vision tower: torch's own, which is exact on every device."""


def image_settings(directory: Path) -> Any:
    """What `AutoConfig` makes of the directory, vision part and text model."""
    import transformers

    return transformers.AutoConfig.from_pretrained(
        str(directory), trust_remote_code=False, local_files_only=True
    )


def image_part(directory: Path, source: str, device: torch.device | str) -> Any:
    """The model of a directory as transformers builds it, in float32, with `get_image_features` and
    without its language model. Its weights are undefined. Raises InputError."""
    import transformers

    config = image_settings(directory)
    text = copy.deepcopy(config.text_config)
    # The language model is built first and then dropped, so it is made as small as possible.
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    config = copy.deepcopy(config)
    config.text_config = text
    device = torch.device(device)
    try:
        # by default, it would start every CUDA device of the machine
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            model = transformers.AutoModel.from_config(
                config, attn_implementation=ATTENTION, dtype=torch.float32
            )
        del model.language_model
    except Exception as error:  # each class may raise what it likes
        raise InputError(
            f"{source}: transformers {transformers.__version__} does not build the vision part "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())[:300]}): correct config.json"
        ) from None
    return model
