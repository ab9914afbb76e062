"""Steps of `PrefixDPOTrainer` (examples/trl_prefix_dpo.py) and of TRL's own `DPOTrainer`, in turn.

Both have the same random Hugging Face Llama as policy and reference, and are given the same batches
of TRL's collator. One step is forward, backward and the optimizer, for one batch of pairs. One row
of the table is for the pairs with the longest prompts and short responses, one for the first pairs
of the file; tokens are bytes. A step's time is the processor time of this process on CPU, and the
wall clock on CUDA. Losses and gradient norms must agree.

    python tools/bench_trl_prefix_dpo.py

Needs TRL: pip install trl
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from bench_common import ROOT, publish
from compare_trl import DATA, load, trl_arguments
from trl_common import Setting, TextPair, make_model, relative, text_pairs

sys.path.append(str(ROOT / "examples"))


def longest_prompts(pairs: list[TextPair], count: int, response: int) -> list[TextPair]:
    """The `count` pairs with the longest prompts, in bytes, of those whose responses have at most
    `response` bytes."""
    fitting = [x for x in pairs if max(_bytes(x["chosen"]), _bytes(x["rejected"])) <= response]
    return sorted(fitting, key=lambda x: -_bytes(x["prompt"]))[:count]


def _bytes(text: str) -> int:
    return len(text.encode())


def make_trainer(kind: type, hf: Path, pairs: list[TextPair], args, folder: Path):
    """A trainer of class `kind` that is ready for `step`."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig

    setting = Setting(steps=args.steps, batch_size=args.batch_size)
    config = DPOConfig(
        output_dir=str(folder), report_to="none", disable_tqdm=True, **trl_arguments(setting)
    )
    trainer = kind(
        model=load(hf, "lm"),
        ref_model=load(hf, "lm"),
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(hf, trust_remote_code=False),
    )
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def step(trainer, batch: dict) -> tuple[float, float, float]:
    """One step: loss, gradient norm before clipping, and seconds."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    loss, norm = float(loss), float(norm)
    return loss, norm, clock() - start


def measure(name: str, pairs: list[TextPair], hf: Path, args, scratch: Path) -> dict:
    """One row of the table."""
    from trl import DPOTrainer
    from trl_prefix_dpo import PrefixDPOTrainer, to_row

    theirs = make_trainer(DPOTrainer, hf, pairs, args, scratch / "theirs")
    ours = make_trainer(PrefixDPOTrainer, hf, pairs, args, scratch / "ours")
    results, tokens = [], []
    for batch in theirs.get_train_dataloader():
        results.append((*step(theirs, batch), *step(ours, batch)))
        shared = to_row(batch).tensors["input_ids"].numel()
        tokens.append((batch["input_ids"].numel(), int(batch["attention_mask"].sum()), shared))
    loss, norm, seconds, our_loss, our_norm, our_seconds = np.array(results).T
    apart = max(*relative(our_loss, loss), *relative(our_norm, norm))
    if apart > 1e-3:
        raise SystemExit(f"{name}: steps differ by {apart:.1e}, so these are not the same steps")
    padded, real, shared = np.array(tokens)[1:].sum(0)  # the first step is a warm-up
    ratio = seconds[1:] / our_seconds[1:]
    return {
        "data": name,
        "pairs": len(pairs),
        "tokens TRL / ours": f"{real / shared:.2f}",
        "with TRL's padding": f"{padded / shared:.2f}",
        "step time TRL / ours": f"{seconds[1:].sum() / our_seconds[1:].sum():.2f}",
        "steps, lowest to highest": f"{ratio.min():.2f} to {ratio.max():.2f}",
        "seconds a step, TRL": f"{seconds[1:].mean():.2f}",
        "ours": f"{our_seconds[1:].mean():.2f}",
        "loss and norm apart, relative": f"{apart:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=Path(DATA) / "hh_pairs.jsonl.gz")
    parser.add_argument("--steps", type=int, default=3, help="the first one is a warm-up")
    parser.add_argument("--batch-size", type=int, default=2, help="pairs per step")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--read", type=int, default=400, help="pairs of the file to choose from")
    args = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install trl")
    import datasets

    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        hf = make_model(
            Path(scratch) / "model",
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=args.hidden_size // 64,
            initializer_range=0.02,
        )
        everything = text_pairs(args.input, hf, args.read, 4096)
        count = args.steps * args.batch_size
        for name, pairs in {
            "longest prompts, short responses": longest_prompts(everything, count, 150),
            "first pairs": everything[:count],
        }.items():
            rows.append(measure(name, pairs, hf, args, Path(scratch)))
    clock = "wall clock" if torch.cuda.is_available() else "processor time"
    load_before, cores = os.getloadavg()[2], os.cpu_count()
    notes = (
        f"{args.layers} layers, hidden {args.hidden_size}, a vocabulary of bytes, float32, "
        f"{args.batch_size} pairs per step, reference model in memory; TRL "
        f"{importlib.metadata.version('trl')}, transformers "
        f"{importlib.metadata.version('transformers')}, attention sdpa. {args.steps - 1} steps of "
        f"both in turn, by {clock}. Other programs were running: the load average was "
        f"{load_before:.0f} on {cores} cores."
    )
    publish(f"trl_prefix_dpo_{'cuda' if torch.cuda.is_available() else 'cpu'}", rows, notes)


if __name__ == "__main__":
    main()
