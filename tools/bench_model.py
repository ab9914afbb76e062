"""Model sizes and modes of the benchmarks of whole steps, and their configurations."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_prefix.config import Config, parse_config

LLAMA_1B = {
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "rotary_base": 500000.0,
    "untie_embeddings_and_output_weights": False,
}
MISTRAL_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
}


@dataclass(frozen=True)
class Size:
    """A model's shape, and the settings with which it fits. `vocab_size` is for drawn data."""

    model: dict
    vocab_size: int
    row_capacity: int
    tokens: int
    """About how many tokens of trees a step of drawn data has."""


SIZES = {
    "small": Size(
        model={
            "num_layers": 4,
            "hidden_size": 256,
            "ffn_hidden_size": 704,
            "num_attention_heads": 4,
            "make_vocab_size_divisible_by": 1,
        },
        vocab_size=2048,
        row_capacity=8192,
        tokens=3000,
    ),
    "1b": Size(
        model={**LLAMA_1B, "dtype": "bfloat16"}, vocab_size=128256, row_capacity=16384, tokens=65536
    ),
    "7b": Size(
        model={**MISTRAL_7B, "dtype": "bfloat16"},
        vocab_size=32000,
        row_capacity=16384,
        tokens=65536,
    ),
    "8b": Size(
        model={**MISTRAL_7B, "rotary_base": 500000.0, "dtype": "bfloat16"},
        vocab_size=128256,
        row_capacity=16384,
        tokens=65536,
    ),
}
"""`small` is for a CPU; the others, for one large GPU, have the shapes of Llama-3.2-1B, Mistral-7B
and Llama-3-8B."""


@dataclass(frozen=True)
class Mode:
    """One way to run the same pairs."""

    sharing: str
    packing: bool = True
    precomputed: bool = False


MODES = {
    "unpacked, unshared": Mode("none", packing=False),
    "packed, unshared": Mode("none"),
    "packed, shared": Mode("tree"),
    "packed, unshared, precomputed": Mode("none", precomputed=True),
    "packed, shared, precomputed": Mode("tree", precomputed=True),
}
LR = 1e-30
"""So small that the weights do not change, though the optimizer does all its work. All runs share
the weights, and the reference's log-probabilities stay valid."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `make_config` reads."""
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--num-layers", type=int, help="instead of the size's")
    parser.add_argument("--hidden-size", type=int, help="instead of the size's; heads of 64")
    parser.add_argument("--ffn-hidden-size", type=int, help="instead of the size's")
    parser.add_argument(
        "--recompute", choices=["none", "full"], default="none", help="activations in backward"
    )
    parser.add_argument("--row-capacity", type=int, help="tokens; instead of the size's")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences, unpacked")
    parser.add_argument("--global-batch-size", type=int, default=32, help="groups per step")
    parser.add_argument("--attention-backend", default="auto")


def model_section(args: argparse.Namespace) -> dict:
    """The section `model` of the configuration."""
    model = dict(SIZES[args.size].model)
    for name in ("num_layers", "hidden_size", "ffn_hidden_size"):
        if (given := getattr(args, name)) is not None:
            model[name] = given
    if args.hidden_size is not None:
        model |= {"num_attention_heads": args.hidden_size // 64, "num_query_groups": None}
    if args.recompute == "full":
        model |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {**model, "attention_backend": args.attention_backend}


def make_config(
    args: argparse.Namespace, prefix: str, mode: Mode, output: str, groups: int, steps: int
) -> Config:
    """A run of `steps` steps of `groups` groups of data set `prefix`."""
    data = {
        "train": prefix,
        "sharing": mode.sharing,
        "packing": mode.packing,
        "global_batch_size": groups,
    }
    if mode.packing:
        data["row_capacity"] = args.row_capacity or SIZES[args.size].row_capacity
    else:
        data["micro_batch_size"] = args.micro_batch_size
    return parse_config(
        {
            "data": data,
            "model": model_section(args),
            "optimizer": {"lr": LR},
            "train": {"steps": steps},
            "logging": {"output": output},
        }
    )


def describe(args: argparse.Namespace) -> str:
    """The model in words."""
    model = model_section(args)
    whole = SIZES[args.size].model["num_layers"]
    return (
        f"size {args.size}: {model['num_layers']} layers"
        f"{'' if model['num_layers'] == whole else f' of {whole}'}, hidden {model['hidden_size']}, "
        f"feed-forward {model['ffn_hidden_size']}, {model['num_attention_heads']} heads, "
        f"{model.get('dtype', 'float32')}, recompute {args.recompute}, rows of "
        f"{args.row_capacity or SIZES[args.size].row_capacity}, "
        f"micro batches of {args.micro_batch_size} sequences where unpacked, "
        f"backend {args.attention_backend}"
    )
