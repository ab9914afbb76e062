"""Time of a training step under every objective over pairs and sets, against `sigmoid`.

All runs are in one process, on the same rows of ranked and scored sets, and take their steps in
turn. Times are processor time of this process, the lowest of all repeats. The reference is
precomputed, so that a step is nothing but the policy's and the objective's work; objectives without
a reference are compared with `sigmoid` without one. What the objective itself adds, the loss of
every row and its slopes, is measured alone too: it is too small for the difference of two steps.

    python tools/bench_objectives.py
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import publish

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data import Pair, ResponsePath, build_tree
from megatron_prefix.data.store import DatasetWriter, PreferenceDataset
from megatron_prefix.distributed import World, open_session
from megatron_prefix.engine.step import objective_logs
from megatron_prefix.objectives.registry import OBJECTIVES
from megatron_prefix.train import score_reference
from megatron_prefix.train.setup import prepare_trainer
from megatron_prefix.train.trainer import Trainer

VOCAB = 512
OPTIONS = {
    "sigmoid, ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.5},
    "sigmoid, use_weighting": {"loss_type": "sigmoid", "use_weighting": True},
    "[sigmoid, bco_pair, sft]": {"loss_type": ["sigmoid", "bco_pair", "sft"]},
}
"""Beside the objectives by themselves."""


def write_sets(prefix: Path, num_groups: int, responses: int, prompt: int, length: int) -> str:
    """Groups of one prompt and ranked, scored responses; all pairs, with margins."""
    rng = np.random.default_rng(0)
    tokenizer = {"name": "drawn", "vocab_size": VOCAB, "fingerprint": "0" * 64}
    with DatasetWriter(prefix, tokenizer) as writer:
        for record in range(num_groups):
            start = rng.integers(0, VOCAB, prompt)
            paths = [
                ResponsePath(
                    tokens=np.concatenate([start, rng.integers(0, VOCAB, length)]),
                    loss_start=prompt,
                    rank=rank,
                    score=1.0 - 0.1 * rank,
                )
                for rank in range(responses)
            ]
            sides = combinations(range(responses), 2)
            pairs = [Pair(chosen=c, rejected=r, margin=0.5) for c, r in sides]
            writer.add(build_tree(paths, pairs), record)
        writer.finish()
    return str(prefix)


def config_of(folder: Path, data: str, loss: dict, args: argparse.Namespace) -> Config:
    """A run of `loss` that never ends."""
    return parse_config(
        {
            "data": {"train": data, "row_capacity": 4096, "global_batch_size": args.batch_size},
            "model": {
                **{"num_layers": args.layers, "hidden_size": args.hidden},
                **{"ffn_hidden_size": 2 * args.hidden, "num_attention_heads": args.hidden // 64},
                "attention_backend": "path",
            },
            "loss": loss,
            "optimizer": {"lr": 1e-6},
            "train": {"steps": 10**6},
            "logging": {"output": str(folder)},
        }
    )


def losses() -> dict[str, dict]:
    """The loss sections that are compared, by name."""
    records = [x for x in OBJECTIVES.values() if x.model == "lm" and x.scope == "set"]
    return {**{x.name: {"loss_type": x.name} for x in records if x.name != "sigmoid"}, **OPTIONS}


def started(name: str, loss: dict, folder: Path, data: str, args: Any, world: World) -> Trainer:
    """A run before its first step."""
    config = config_of(folder / name, data, loss, args)
    return prepare_trainer(config, PreferenceDataset(data), None, world)


def seconds(run: Trainer) -> float:
    """Processor time of one step."""
    start = time.process_time()
    run.train_step()
    return time.process_time() - start


def lowest_steps(run: Trainer, baseline: Trainer, repeats: int) -> tuple[float, float]:
    """The lowest times of steps of both, taken in turn."""
    for warm in (baseline, run):
        seconds(warm)
    times = [(seconds(run), seconds(baseline)) for _ in range(repeats)]
    own, other = zip(*times, strict=True)
    return min(own), min(other)


def objective_seconds(run: Trainer, repeats: int = 30) -> float:
    """The lowest time that the objective takes of a step: the loss of every row and its slopes."""
    step = run.feed.step(run.step)
    batches = run.reference.attach(step.rows, step.batches)
    tables = []
    for batch in batches:
        parts, num_responses = batch.parts, len(batch.response_tokens)
        size = num_responses * (1 + parts.alignments) + 2 * len(batch.pairs) * parts.heads
        tables.append((batch, torch.linspace(-90.0, -60.0, size).double()))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for batch, values in tables:
            scores = values.clone().requires_grad_()
            loss, _ = objective_logs(run.objective, batch.loss_inputs(scores), batch.denominators)
            torch.autograd.grad(loss, scores)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4, help="groups per step (default: 4)")
    parser.add_argument("--responses", type=int, default=6, help="per group (default: 6)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--length", type=int, default=96, help="tokens of a response (default: 96)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="names of objectives (default: all)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        rows = measure(Path(scratch), args)
    notes = (
        f"{args.batch_size} groups per step of {args.responses} ranked and scored responses of "
        f"{args.length} tokens and a prompt of {args.prompt}; {args.layers} layers, hidden size "
        f"{args.hidden}, float32. Lowest of {args.repeats} steps, in turn with those of `sigmoid`."
    )
    publish("objectives", rows, notes)


def measure(folder: Path, args: argparse.Namespace) -> list[dict]:
    data = write_sets(folder / "set", args.groups, args.responses, args.prompt, args.length)
    plain = config_of(folder / "score", data, {"loss_type": "sigmoid"}, args)
    sidecar = str(folder / "sidecar")
    score_reference(plain, sidecar)
    tails = str(folder / "tails")
    score_reference(replace(plain, loss=replace(plain.loss, ld_alpha=0.5)), tails)
    rows = []
    with open_session(plain) as world:
        place = folder, data, args, world
        known = {"loss_type": "sigmoid", "reference": "precomputed", "ref_logps": sidecar}
        with_reference = started("sigmoid", known, *place)
        without = started("without", {"loss_type": "sigmoid", "reference": "none"}, *place)
        for name, loss in {"sigmoid": {"loss_type": "sigmoid"}, **losses()}.items():
            if args.only and name not in args.only:
                continue
            types = [loss["loss_type"]] if isinstance(loss["loss_type"], str) else loss["loss_type"]
            has_reference = any(OBJECTIVES[x].needs_reference() for x in types)
            if has_reference:
                file = tails if "ld_alpha" in loss else sidecar
                loss = {**loss, "reference": "precomputed", "ref_logps": file}
            run = started(f"run {name}", loss, *place)
            baseline = with_reference if has_reference else without
            step, other = lowest_steps(run, baseline, args.repeats)
            added = objective_seconds(run) - objective_seconds(baseline)
            run.close()
            rows.append(
                {
                    "objective": name,
                    "step, s": f"{step:.3f}",
                    "of sigmoid": f"{step / other:.3f}",
                    "added by the objective, ms": f"{1000 * added:.2f}",
                    "of a step": f"{100 * added / other:+.2f} %",
                }
            )
            print(rows[-1], flush=True)
        with_reference.close()
        without.close()
    return rows


if __name__ == "__main__":
    main()
