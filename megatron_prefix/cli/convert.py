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
        description="Convert models and adapters, one tensor at a time. Every tensor keeps its "
        "precision; configuration and tokenizer are copied, too. Reward models are "
        "AutoModelForSequenceClassification; adapters are PEFT directories.",
    )
    directions = parser.add_subparsers(dest="direction", metavar="import|export", required=True)
    inward = directions.add_parser("import", help="Hugging Face -> checkpoint")
    inward.add_argument(
        "--hf",
        required=True,
        metavar="DIR",
        help="directory or Hub id of the model, or, with --base, a PEFT directory",
    )
    inward.add_argument(
        "--base",
        metavar="HF_DIR",
        help="directory or Hub id of the base model, if --hf is a PEFT directory",
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
    outward.add_argument("--hf", required=True, metavar="DIR", help="new directory for the result")
    outward.add_argument(
        "--merge",
        action="store_true",
        help="write the whole model, with the checkpoint's adapters merged into their base; "
        "without it, adapters become a PEFT directory",
    )
    outward.add_argument(
        "--base",
        metavar="DIR",
        help="base model of the adapters, a Hugging Face directory or a checkpoint (default: where "
        "it was in training)",
    )
    outward.add_argument(
        "--max-shard-size",
        type=_bytes,
        metavar="SIZE",
        help="maximum size of a safetensors file of a model; KB, MB and GB are powers of 1000 "
        "(default: 5GB)",
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

    done = import_hf(args.hf, args.output, args.base)
    print(f"wrote {args.output}: {_amount(done)}; config and tokenizer in {args.output}/hf")
    if done.note is not None:
        print(done.note)


def run_export(args: argparse.Namespace) -> None:
    """Export the model and print what was written."""
    quiet_megatron()
    from megatron_prefix.checkpoint import export_hf

    done = export_hf(args.load, args.hf, args.max_shard_size, merge=args.merge, base=args.base)
    print(f"wrote {args.hf}: {_amount(done)}")
    if not any(name.startswith("tokenizer") for name in done.companions):
        print("the checkpoint has no tokenizer, so none was exported")
    if done.note is not None:
        print(done.note)


def _amount(done) -> str:
    dtypes = " and ".join(done.dtypes)
    return f"{done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB, {dtypes}"
