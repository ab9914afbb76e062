"""Whole training steps on pairs about pictures, shared or not, against the operations they need.

Random models with the shape of the small benchmarks and a vision tower in front, and pairs with
RLHF-V's lengths: 30 text tokens in a prompt, 576 or 1485 of a picture, answers of 60 to 120. The
tower is frozen, the projector is trained. Modes take turns as in bench_training.py, whose figures
these are.

    python tools/bench_images.py
    python tools/bench_images.py --models LLaVA-1.5 --rounds 5
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_common import Results, free_memory
from bench_image_models import SHAPES, write_model, write_pairs
from bench_model import LR, MODES
from bench_runs import Built
from bench_training import Measured, measure, mode_rows, summary

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.estimate.vision import KnownVision
from megatron_prefix.model.hf import HFModel

CAPACITY = 8192
"""Tokens of a row."""
BASE, SHARED = "packed, unshared", "packed, shared"
PAPER = {"time": 0.798, "memory": 0.635}
"""With over without packing of prompts, RLHF-V, LLaVA-OneVision-Qwen2-0.5B (arXiv 2602.24082)."""


def build(folder: Path, name: str, num_pairs: int) -> PreferenceDataset:
    """Model directory `folder/model` and data set `folder/pairs` of one of SHAPES."""
    write_model(folder / "model", name)
    pairs = write_pairs(folder, name, num_pairs)
    command = [sys.executable, "-m", "megatron_prefix", "build", "--input", str(pairs)]
    command += ["--tokenizer", str(folder / "model"), "--output", str(folder / "pairs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return PreferenceDataset(folder / "pairs")


def configuration(folder: Path, mode: str, name: str, steps: int) -> Config:
    """A run of `steps` steps under one of MODES."""
    return parse_config(
        {
            "data": {
                "train": str(folder / "pairs"),
                "sharing": MODES[mode].sharing,
                "row_capacity": CAPACITY,
                "global_batch_size": SHAPES[name].pairs,
            },
            "model": {"hf": str(folder / "model")},
            "optimizer": {"lr": LR},
            "train": {"steps": steps},
            "logging": {"output": str(folder / mode)},
        }
    )


def vision_of(config: Config, dataset: PreferenceDataset) -> KnownVision:
    """The part that reads images, with the work of each picture."""
    source, store = HFModel.read(Path(config.model.hf or "")), dataset.images
    vision = KnownVision.of(source, config)
    assert vision is not None and store is not None
    pictures = source.pictures_work(store.sizes, store.grids, store.several)
    return replace(vision, pictures=pictures)


def against_the_paper(by_mode: dict[str, Measured]) -> dict[str, str]:
    """What sharing saves, as the paper gives it."""
    base, shared = by_mode[BASE], by_mode[SHARED]
    time = float(np.median(shared.seconds() / base.seconds()))
    tower = shared.parts.tower / shared.parts.total
    return {
        "time, shared over unshared": f"{time:.3f}",
        "the paper's": f"{PAPER['time']:.3f}",
        "kept for backward": f"{shared.saved / base.saved:.3f}",
        "the paper's memory": f"{PAPER['memory']:.3f}",
        "tower, share of forward FLOP": f"{100 * tower:.1f} %",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each mode")
    return parser.parse_args()


def main() -> None:
    from megatron_prefix.distributed import open_session

    args = arguments()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    notes = (
        f"Random models: 4 layers, hidden 256, frozen tower, trained projector, reference computed "
        f"each step. Rows of {CAPACITY} tokens. By processor time; medians of {args.rounds} rounds."
    )
    summaries, modes = Results("images_cpu", notes), Results("images_cpu_modes", notes)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = Path(scratch) / name
            dataset = build(folder, name, SHAPES[name].pairs * (1 + args.rounds))
            configs = {
                mode: configuration(folder, mode, name, 1 + args.rounds) for mode in (BASE, SHARED)
            }
            with open_session(configs[BASE]) as world:
                vision = vision_of(configs[BASE], dataset)
                steps = len(configs) * (1 + args.rounds)
                built = Built(configs[BASE], dataset, world, True, steps)
                by_mode = measure(built, configs, dataset, vision)
                row = summary(name, dataset.vocab_size, by_mode)
                summaries.append({**row, **against_the_paper(by_mode)})
                modes.append(*mode_rows(name, list(configs), by_mode))
                del built
                free_memory()
    summaries.finish()
    modes.finish()


if __name__ == "__main__":
    main()
