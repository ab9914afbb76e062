"""`megatron-prefix convert`: Hugging Face safetensors <-> a distributed checkpoint."""

from __future__ import annotations

import argparse
import re

from megatron_prefix.cli.options import quiet_megatron

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command, its two directions and their flags."""
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face safetensors <-> a distributed checkpoint",
        description="Convert Llama, Mistral, Qwen2 and Qwen3 models, one tensor at a time. Every "
        "tensor keeps its precision; configuration and tokenizer are copied, too. Reward models "
        "are AutoModelForSequenceClassification.",
    )
    directions = parser.add_subparsers(dest="direction", metavar="import|export", required=True)
    inward = directions.add_parser("import", help="Hugging Face -> checkpoint")
    inward.add_argument(
        "--hf", required=True, metavar="DIR", help="directory or Hub id of the model"
    )
    inward.add_argument(
        "--output", required=True, metavar="CKPT", help="new directory, for model.checkpoint"
    )
    inward.set_defaults(run=run_import)
    outward = directions.add_parser("export", help="checkpoint -> Hugging Face")
    outward.add_argument(
        "--load",
        required=True,
        metavar="CKPT",
        help="an iter_… directory, or a directory whose newest iter_… is used",
    )
    outward.add_argument("--hf", required=True, metavar="DIR", help="new directory for the model")
    outward.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="maximum size of a safetensors file; KB, MB and GB are powers of 1000 (default: 5GB)",
    )
    outward.set_defaults(run=run_export)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)?", text.strip().upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2] or "B"]


def run_import(args: argparse.Namespace) -> None:
    """Import the model and print what was written."""
    quiet_megatron()
    from megatron_prefix.checkpoint import import_hf

    done = import_hf(args.hf, args.output)
    print(f"wrote {args.output}: {_amount(done)}; config and tokenizer in {args.output}/hf")


def run_export(args: argparse.Namespace) -> None:
    """Export the model and print what was written."""
    quiet_megatron()
    from megatron_prefix.checkpoint import export_hf

    done = export_hf(args.load, args.hf, args.max_shard_size)
    print(f"wrote {args.hf}: {_amount(done)}")
    if not any(name.startswith("tokenizer") for name in done.companions):
        print("the checkpoint has no tokenizer, so none was exported")
    if done.note is not None:
        print(done.note)


def _amount(done) -> str:
    dtypes = " and ".join(done.dtypes)
    return f"{done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB, {dtypes}"
