"""One run by two programs: `megatron_prefix` and TRL's `DPOTrainer`, compared step by step.

1. Pairs of text are taken from a preference file; a random model is made where none is given.
2. Ours: build, train from the Hugging Face model (trees shared, packed into rows), export.
3. TRL: the same weights, and the pairs in the order of our step plan, every response alone.
4. A Markdown table of loss and gradient norm, and how far the final weights are apart.

    python tools/compare_trl.py
    python tools/compare_trl.py --input pairs.jsonl.gz --hf DIR --label-smoothing 0.1

Needs TRL: pip install trl
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from bench_common import environment, table
from torch import Tensor

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.examples import ExampleReader
from megatron_prefix.data.formats.base import DegenerateRecord
from megatron_prefix.data.records import read_records
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError

DATA = os.environ.get(
    "MEGATRON_PREFIX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"
)
TextPair = dict[str, str]
"""Keys prompt, chosen, rejected."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both programs are told. `batch_size` counts pairs a step, over all micro batches."""

    steps: int = 8
    batch_size: int = 8
    lr: float = 1e-4
    beta: float = 0.1
    label_smoothing: float = 0.0
    clip_grad: float = 1.0
    precomputed: bool = False
    """Reference log-probabilities are computed before training."""
    row_capacity: int = 4096
    """Tokens of our rows."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One program's run: a number a step, and the weights it ends with, by Hugging Face's names.

    `num_tokens` counts both sides of every pair, each with its whole prompt; `num_run` the tokens
    that went through the model, padding left out.
    """

    losses: list[float]
    grad_norms: list[float]
    num_tokens: list[int]
    num_run: list[int]
    weights: dict[str, Tensor]


def make_tokenizer(directory: Path) -> None:
    """A tokenizer of the 256 bytes, padding and end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(directory)


def make_model(directory: Path, **sizes: int) -> Path:
    """Save a random float32 Llama with a byte tokenizer; the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(directory)
    parts = {
        "vocab_size": 258,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "pad_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**parts, **sizes})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def text_pairs(source: Path, hf: Path, count: int, max_length: int) -> list[TextPair]:
    """The first `count` pairs of a file whose sides take at most `max_length` tokens.

    End-of-text is counted. Raises InputError where there are fewer, or where they are no text.
    """
    from transformers import AutoTokenizer

    tokenizer, reader, found = AutoTokenizer.from_pretrained(hf), ExampleReader(), []
    for record in read_records([source]):
        if record.value is None:
            raise InputError(f"{record.where}: {record.error}")
        try:
            responses = reader.read(record.value).responses
        except DegenerateRecord:
            continue
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None
        if len(responses) != 2 or not all(isinstance(r.response, str) for r in responses):
            raise InputError(f"{record.where}: the comparison takes pairs of text")
        texts = [r.prompt + r.response for r in responses]
        if max(len(tokenizer(text)["input_ids"]) for text in texts) + 1 > max_length:
            continue
        chosen, rejected = (r.response for r in responses)
        found.append({"prompt": responses[0].prompt, "chosen": chosen, "rejected": rejected})
        if len(found) == count:
            return found
    raise InputError(f"{source} has {len(found)} pairs of at most {max_length} tokens, not {count}")


def our_config(folder: Path, hf: Path, setting: Setting) -> Config:
    """The run over the data set `folder`/set."""
    loss = {"beta": setting.beta, "label_smoothing": setting.label_smoothing}
    if setting.precomputed:
        loss |= {"reference": "precomputed", "ref_logps": str(folder / "reference")}
    data = {"train": str(folder / "set"), "sharing": "tree", "row_capacity": setting.row_capacity}
    return parse_config(
        {
            "data": {**data, "global_batch_size": setting.batch_size},
            "model": {"hf": str(hf)},
            "loss": loss,
            "optimizer": {"lr": setting.lr, "clip_grad": setting.clip_grad},
            "train": {"steps": setting.steps, "save": str(folder / "checkpoints")},
            "logging": {"output": str(folder / "run")},
        }
    )


def run_ours(
    pairs: Sequence[TextPair], hf: Path, setting: Setting, folder: Path
) -> tuple[Outcome, list[TextPair]]:
    """Build, train, export. Returns the run and its pairs in the order in which it took them."""
    from transformers import AutoModelForCausalLM

    from megatron_prefix.train.convert import export_checkpoint
    from megatron_prefix.train.inputs import training_sampler
    from megatron_prefix.train.loop import train
    from megatron_prefix.train.score import score_reference

    folder.mkdir(parents=True)
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    build_dataset([folder / "pairs.jsonl"], str(hf), folder / "set")
    config = our_config(folder, hf, setting)
    if setting.precomputed:
        plain = our_config(folder, hf, replace(setting, precomputed=False))
        score_reference(plain, str(folder / "reference"))
    train(config)
    export_checkpoint(folder / "checkpoints", folder / "aligned", 10**10)
    aligned = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype=torch.float32)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    dataset = PreferenceDataset(folder / "set")
    sampler = training_sampler(config, dataset)
    steps = [sampler.step(step).groups for step in range(setting.steps)]
    records = [record for groups in steps for record in dataset.group_records[groups].tolist()]
    outcome = Outcome(
        losses=[row["loss"] for row in rows],
        grad_norms=[row["grad_norm"] for row in rows],
        num_tokens=[row["tokens/logical"] for row in rows],
        num_run=[row["tokens/executed"] for row in rows],
        weights=aligned.state_dict(),
    )
    return outcome, [pairs[record] for record in records]


def trl_arguments(setting: Setting) -> dict:
    """`DPOConfig`'s arguments for the same run.

    TRL 1.16 reads `label_smoothing` in other losses than `sigmoid`. Its `aot` sorts a micro
    batch's log-ratios before it subtracts them; on one pair there is nothing to sort, and what
    it then computes, smoothed, is the conservative DPO loss.
    """
    smoothed = setting.label_smoothing > 0
    return {
        "per_device_train_batch_size": 1 if smoothed else setting.batch_size,
        "gradient_accumulation_steps": setting.batch_size if smoothed else 1,
        "max_steps": setting.steps,
        "loss_type": ["aot"] if smoothed else ["sigmoid"],
        "beta": setting.beta,
        "label_smoothing": setting.label_smoothing,
        "precompute_ref_log_probs": setting.precomputed,
        "learning_rate": setting.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": setting.clip_grad,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def run_trl(pairs: Sequence[TextPair], hf: Path, setting: Setting, folder: Path) -> Outcome:
    """TRL's run over `pairs` as they stand, the first `batch_size` of them in the first step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **trl_arguments(setting),
    )
    with _without_bars():
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(list(pairs)),
            processing_class=AutoTokenizer.from_pretrained(hf),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    totals = [0, *(int(row["num_tokens"]) for row in rows)]
    num_tokens = [b - a for a, b in zip(totals, totals[1:], strict=False)]
    return Outcome(
        losses=[row["loss"] for row in rows],
        grad_norms=[row["grad_norm"] for row in rows],
        num_tokens=num_tokens,
        num_run=num_tokens,
        weights={name: x.detach().cpu() for name, x in trainer.model.state_dict().items()},
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of `datasets` and TRL."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
            yield
    finally:
        datasets.enable_progress_bars()


def relative(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """|a - b| / |b|, a step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def farthest_weight(ours: Outcome, theirs: Outcome) -> float:
    """Largest absolute difference of two weights. Raises ValueError where names differ."""
    if ours.weights.keys() != theirs.weights.keys():
        names = sorted(ours.weights.keys() ^ theirs.weights.keys())
        raise ValueError(f"only one of the two models has the weights {', '.join(names)}")
    return max(float((x - theirs.weights[name]).abs().max()) for name, x in ours.weights.items())


def report(ours: Outcome, theirs: Outcome, setting: Setting) -> str:
    """The comparison in Markdown; norms are of the gradient, before clipping."""
    losses = zip(ours.losses, theirs.losses, relative(ours.losses, theirs.losses), strict=True)
    norms = relative(ours.grad_norms, theirs.grad_norms)
    norms = zip(ours.grad_norms, theirs.grad_norms, norms, strict=True)
    rows = [
        {
            "step": step,
            "loss, ours": f"{loss[0]:.7f}",
            "loss, TRL": f"{loss[1]:.7f}",
            "loss, relative": f"{loss[2]:.1e}",
            "norm, ours": f"{norm[0]:.6f}",
            "norm, TRL": f"{norm[1]:.6f}",
            "norm, relative": f"{norm[2]:.1e}",
        }
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
    ]
    notes = (
        f"{setting.batch_size} pairs a step, learning rate {setting.lr:g}, beta {setting.beta:g}, "
        f"label smoothing {setting.label_smoothing:g}, gradients clipped at "
        f"{setting.clip_grad:g}, reference {'precomputed' if setting.precomputed else 'in memory'}"
        f", float32. Final weights are at most {farthest_weight(ours, theirs):.1e} apart. Tokens "
        f"of all pairs: {sum(ours.num_tokens):,} here, {sum(theirs.num_tokens):,} in TRL; tokens "
        f"run: {sum(ours.num_run):,} here, {sum(theirs.num_run):,} and padding in TRL."
    )
    where = environment()
    where |= {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    return "\n".join([table(rows), "", notes, "", *(f"- {k}: `{v}`" for k, v in where.items())])


def compare(args: argparse.Namespace, setting: Setting) -> tuple[Outcome, Outcome]:
    """Both runs, in a directory that does not outlive them."""
    from transformers import logging

    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        hf = args.hf or make_model(Path(scratch) / "model")
        pairs = text_pairs(args.input, hf, args.num_pairs, args.max_length)
        ours, taken = run_ours(pairs, hf, setting, Path(scratch) / "ours")
        return ours, run_trl(taken, hf, setting, Path(scratch) / "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input",
        type=Path,
        default=Path(DATA) / "hh_pairs.jsonl.gz",
        metavar="FILE",
        help="pairs of text, as build reads them (default: HH-RLHF in MEGATRON_PREFIX_DATA)",
    )
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="model and tokenizer (default: a random Llama)"
    )
    default = Setting()
    parser.add_argument("--num-pairs", type=int, default=64, help="(default: 64)")
    parser.add_argument("--max-length", type=int, default=400, help="tokens a side (default: 400)")
    parser.add_argument("--steps", type=int, default=default.steps, help="(default: 8)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="(default: 8)")
    parser.add_argument("--lr", type=float, default=default.lr, help="(default: 1e-4)")
    parser.add_argument("--beta", type=float, default=default.beta, help="(default: 0.1)")
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="(default: 0)")
    parser.add_argument(
        "--precomputed", action="store_true", help="reference log-probabilities before training"
    )
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install trl")
    if not args.input.is_file():
        parser.error(f"{args.input}: no such file; give --input or set MEGATRON_PREFIX_DATA")
    names = ("steps", "batch_size", "lr", "beta", "label_smoothing", "precomputed")
    setting = Setting(**{name: getattr(args, name) for name in names})
    setting = replace(setting, row_capacity=max(setting.row_capacity, 2 * args.max_length))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ours, theirs = compare(args, setting)
    except InputError as error:
        parser.error(str(error))
    print(report(ours, theirs, setting))


if __name__ == "__main__":
    main()
