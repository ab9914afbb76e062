"""Steps of objectives that need the whole step, compared with steps of `sigmoid`.

Policies of every objective run the same groups, step by step in turn, so that other load slows all
of them. A figure is a ratio of processor times of the same round: the median over rounds, and the
lowest and the highest. `aot` and `bco` run a step in two passes, `kto` one pass and a forward pass
over the mismatches; a perfect forward pass costs a third of a step with a precomputed reference,
and a quarter with `reference: model`. The bounds are 1.40 and 1.30.

    OMP_NUM_THREADS=1 python tools/bench_two_passes.py --rounds 20
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_common import publish

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.distributed import open_session
from megatron_prefix.train.scoring import score_reference
from megatron_prefix.train.setup import prepare_trainer

OBJECTIVES = ("sigmoid", "aot", "bco", "apo_zero_unpaired", "kto")
MODEL = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4}
BOUNDS = {"precomputed": 1.40, "model": 1.30}
"""Upper limits of an objective's step over one of `sigmoid`, by `loss.reference`."""
WARM_UP = 2
"""Rounds that are not counted."""


def make_data(folder: Path, count: int) -> str:
    """PREFIX of toy pairs with mismatches, in bytes."""
    tool = Path(__file__).parent / "make_toy_preferences.py"
    command = [sys.executable, str(tool), "--output", str(folder), "--num-train", str(count)]
    subprocess.run(command, check=True, capture_output=True)
    build_dataset([folder / "train.jsonl"], "bytes", folder / "toy", BuildOptions(kto=True))
    return str(folder / "toy")


def configure(folder: Path, data: str, name: str, **loss: object) -> Config:
    return parse_config(
        {
            "data": {"train": data, "row_capacity": 4096, "global_batch_size": 16},
            "model": MODEL,
            "loss": {"loss_type": name, **loss},
            "optimizer": {"lr": 1e-9},
            "train": {"steps": 1000},
            "logging": {"output": str(folder / f"{name}-{len(loss)}")},
        }
    )


def measure(folder: Path, data: str, rounds: int, **loss: object) -> dict[str, list[float]]:
    """Processor seconds of each objective's steps, round by round."""
    configs = {name: configure(folder, data, name, **loss) for name in OBJECTIVES}
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    with open_session(configs["sigmoid"]) as world:
        dataset = own_responses(PreferenceDataset(data))
        trainers = {
            name: prepare_trainer(config, dataset, None, world) for name, config in configs.items()
        }
        for _ in range(WARM_UP + rounds):
            for name, trainer in trainers.items():
                start = time.process_time()
                trainer.train_step()
                seconds[name].append(time.process_time() - start)
        for trainer in trainers.values():
            trainer.close()
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--reference", choices=list(BOUNDS), help="only this one (default: both)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        data = make_data(folder, args.prompts)
        sidecar = str(folder / "reference")
        score_reference(configure(folder, data, "sigmoid"), sidecar)
        for reference, bound in BOUNDS.items():
            if args.reference not in (None, reference):
                continue
            loss = {"reference": reference}
            if reference == "precomputed":
                loss["ref_logps"] = sidecar
            times = measure(folder, data, args.rounds, **loss)
            base = np.array(times["sigmoid"])
            for objective, own in times.items():
                ratios = np.array(own) / base
                rows.append(
                    {
                        "loss.reference": reference,
                        "loss.loss_type": objective,
                        "time over sigmoid": f"{np.median(ratios):.3f}",
                        "rounds": f"{ratios.min():.3f} to {ratios.max():.3f}",
                        "bound": f"{bound:.2f}",
                        "met": "yes" if np.median(ratios) <= bound else "no",
                        "step, s": f"{np.median(own):.3f}",
                    }
                )
    model = ", ".join(f"{key} {value}" for key, value in MODEL.items())
    notes = (
        f"Toy pairs in bytes with mismatches, 16 groups per step, rows of 4096 tokens; {model}, "
        f"float32. Processor time; medians of {args.rounds} rounds, each one step of every "
        "objective in turn."
    )
    publish("_".join(["two_passes", *filter(None, [args.reference])]), rows, notes)


if __name__ == "__main__":
    main()
