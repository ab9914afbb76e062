"""The `config.json` of a trained model, so that it can be exported to Hugging Face.

A reward model becomes a `…ForSequenceClassification` with one label. transformers scores a text at
its rightmost token that is not `pad_token_id`; for this to be the last token of the text, as in
training here, the padding token must be one that no text ends in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prefix.config import ModelConfig, ModelSizes
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.hf.families import FAMILIES
from megatron_prefix.model.hf.files import copy_companions
from megatron_prefix.model.hf.rotary import FULL, SLIDING


def write_hf_folder(
    folder: Path,
    source: HFModel | None,
    *,
    sizes: ModelSizes,
    vocab_size: int,
    max_positions: int,
    model: ModelConfig,
) -> None:
    """Write `config.json` and tokenizer of a trained model, copied from the model `source` that it
    started from.

    Without `source`, `config.json` is made from the sizes; nothing is written if no architecture
    has these parts: the training run goes on, and `convert export` refuses.
    """
    if source is not None:
        copy_companions(source.directory, folder)
        if model.kind == "lm" or source.images is not None:
            return  # transformers has no classifier that reads images
        # the end of text may be a default of the model type
        config = source.config | {"eos_token_id": source.settings.eos_token_id}
    else:
        try:
            config = hf_from_sizes(sizes, vocab_size, max_positions, model.dtype)
        except InputError:
            return
    folder.mkdir(parents=True, exist_ok=True)
    if model.kind == "reward":
        config = reward_config(config, folder, model.num_labels)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hf_from_sizes(
    sizes: ModelSizes, vocab_size: int, max_positions: int, dtype: str
) -> dict[str, Any]:
    """A `config.json` for a model that did not come from Hugging Face.

    The simplest architecture that has all parts of the model: Qwen3 with query-key norms, Qwen2
    with query-key-value biases, Mistral with a sliding window, else Llama; with experts Qwen3-MoE
    if there are query-key norms, else Mixtral. Raises InputError if no architecture has them.
    """
    kind = _architecture(sizes)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": sizes.rotary_base}
    if sizes.rope_scaling is not None:
        given = {k: v for k, v in vars(sizes.rope_scaling).items() if v is not None}
        rope |= {"rope_type": given.pop("type"), **given}
    config = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_query_groups,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": not sizes.untie_embeddings_and_output_weights,
        "vocab_size": vocab_size,
    }
    if kind != "qwen2":
        config["head_dim"] = sizes.kv_channels
    if FAMILIES[kind].experts:
        config["num_experts_per_tok"] = sizes.moe_router_topk
        config["num_local_experts"] = sizes.num_moe_experts
        if kind == "mixtral":
            config["intermediate_size"] = sizes.moe_ffn_hidden_size
        else:
            config["num_experts"] = config.pop("num_local_experts")
            config["moe_intermediate_size"] = sizes.moe_ffn_hidden_size
            config["norm_topk_prob"] = not sizes.moe_router_pre_softmax
    return config | _window_keys(kind, sizes)


def _window_keys(kind: str, sizes: ModelSizes) -> dict[str, Any]:
    """The keys of the sliding window, in the way of each model type."""
    if sizes.window_size is None:
        return {"sliding_window": None} if kind == "mixtral" else {}
    keys: dict[str, Any] = {"sliding_window": sizes.window_size[0] + 1}
    if kind not in ("mistral", "mixtral"):
        keys["use_sliding_window"] = True
    if FAMILIES[kind].window == "layer_types":
        keys["layer_types"] = [FULL if window is None else SLIDING for window in sizes.windows]
    return keys


def _architecture(sizes: ModelSizes) -> str:
    if sizes.attn_logit_softcapping is not None or sizes.softmax_type != "vanilla":
        raise InputError(
            "no Hugging Face architecture is known here that has model.attn_logit_softcapping or "
            "model.softmax_type and all other parts of this model: train without them to export"
        )
    if sizes.add_qkv_bias and sizes.qk_layernorm:
        raise InputError(
            "no supported Hugging Face architecture has both model.add_qkv_bias and "
            "model.qk_layernorm: train with one of them to export"
        )
    kind = "qwen3" if sizes.qk_layernorm else "qwen2" if sizes.add_qkv_bias else "llama"
    if sizes.num_moe_experts:
        if kind == "qwen2" or (kind == "llama" and sizes.moe_router_pre_softmax):
            raise InputError(
                "no supported Hugging Face architecture has model.num_moe_experts with "
                "model.add_qkv_bias, or with model.moe_router_pre_softmax and without "
                "model.qk_layernorm: train without them to export"
            )
        kind = "qwen3_moe" if sizes.qk_layernorm else "mixtral"
    if kind == "llama" and sizes.window_size is not None:
        kind = "mistral"
    if sizes.window_attn_skip_freq is not None and FAMILIES[kind].window != "layer_types":
        raise InputError(
            f"no supported Hugging Face architecture has model.window_attn_skip_freq = "
            f"{sizes.window_attn_skip_freq} and all other parts of this model: export needs "
            "model.qk_layernorm or model.add_qkv_bias, and no experts"
        )
    if kind == "qwen2" and sizes.kv_channels * sizes.num_attention_heads != sizes.hidden_size:
        raise InputError(
            f"Qwen2 has heads of hidden_size / num_attention_heads, and model.kv_channels is "
            f"{sizes.kv_channels}: train without model.add_qkv_bias or model.kv_channels to export"
        )
    return kind


def reward_config(config: dict[str, Any], folder: Path, num_labels: int = 1) -> dict[str, Any]:
    """`config.json` of the reward model that was made of the model with `config`.

    `pad_token_id` is the configuration's, else that of the tokenizer in `folder`. It is null if
    neither has one, or if it is an end-of-text token, which texts end in: transformers then
    scores single texts correctly and refuses batches, instead of scoring another token.
    """
    classifier = FAMILIES[config["model_type"]].classifier
    assert classifier is not None, "refused when the run started"
    pad = config.get("pad_token_id")
    pad = _tokenizer_pad(folder) if pad is None else pad
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    names = ["reward"] if num_labels == 1 else [f"LABEL_{i}" for i in range(num_labels)]
    labels: dict[str, Any] = {
        "num_labels": num_labels,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if classifier in (config.get("architectures") or []):
        labels = {}  # it has its own
    padding = {"pad_token_id": None if pad in ends else pad}
    return config | {"architectures": [classifier]} | labels | padding


def _tokenizer_pad(folder: Path) -> int | None:
    """Id of the padding token that the tokenizer's files name, if they do."""
    pad = _read(folder / "tokenizer_config.json").get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is None:
        return None
    # tokenizer_config.json names the token; tokenizer.json has its id, among the added tokens or
    # in the vocabulary
    tokenizer = _read(folder / "tokenizer.json")
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and entry.get("content") == pad:
            return entry.get("id")
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    return vocabulary.get(pad) if isinstance(vocabulary, dict) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
