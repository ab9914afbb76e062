"""Rankings in one pass: Plackett-Luce on whole trees against all pairs, each response by itself.

1. OpenAssistant's message trees, in bytes; folds of them take turns as held-out data.
2. For each fold a model that has learned to write the better answers: policy and reference start
   from it.
3. The same steps with each method. `tokens` and `time` are those of training, without evaluation;
   time is the processor's, so that other programs change it little.
4. A table of tokens, time and held-out accuracy, and a plot of accuracy after each epoch.

    python examples/experiments/rankings.py --input oasst_trees.jsonl.gz \
        --output experiments/rankings
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.train import evaluate, train

FOLDS, EPOCHS, BATCH = 4, 3, 8
OPTIONS = BuildOptions(max_length=1024, overflow="drop")
ROW_CAPACITY = 8192
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
RANKED, PAIRS = {"loss_type": "plackett_luce"}, {"loss_type": "sigmoid"}
METHODS: dict[str, tuple[dict, str]] = {
    "Plackett-Luce, one pass": (RANKED, "tree"),
    "all pairs, one pass": (PAIRS, "tree"),
    "Plackett-Luce, unshared": (RANKED, "none"),
    "all pairs, unshared": (PAIRS, "none"),
}
"""Name -> loss section and data.sharing."""
BASELINE = "all pairs, unshared"


class Fold:
    """One part of the trees as held-out data, the others to train on."""

    def __init__(self, folder: Path, number: int, trees: list[str]) -> None:
        self.folder, self.number = folder, number
        folder.mkdir(parents=True, exist_ok=True)
        self.valid = self._built("valid", trees[number::FOLDS])
        self.train = self._built("train", [x for i, x in enumerate(trees) if i % FOLDS != number])
        groups = len(PreferenceDataset(self.train))
        self.steps_per_epoch = max(1, groups // BATCH)
        self.start = {**MODEL, "checkpoint": str(folder / "start")}

    def _built(self, name: str, trees: Iterable[str]) -> str:
        source = self.folder / f"{name}.jsonl"
        source.write_text("".join(trees), encoding="utf-8")
        build_dataset([str(source)], "bytes", str(self.folder / name), OPTIONS)
        return str(self.folder / name)

    def config(self, name: str, loss: dict, sharing: str, **sections: dict[str, Any]) -> Config:
        steps = EPOCHS * self.steps_per_epoch
        return parse_config(
            {
                "data": {
                    "train": self.train,
                    **sections.get("data", {}),
                    "seed": self.number,
                    "sharing": sharing,
                    "row_capacity": ROW_CAPACITY,
                    "global_batch_size": BATCH,
                },
                "model": sections.get("model", self.start),
                "loss": loss,
                "optimizer": {"lr": 1e-3, "lr_warmup_fraction": 0.1},
                "train": {"steps": steps, "seed": self.number, **sections.get("train", {})},
                "logging": {"output": str(self.folder / "runs" / name)},
            }
        )

    def make_start(self) -> None:
        """The model that policy and reference start from."""
        saved = {"save": str(self.folder / "start")}
        train(self.config("start", {"loss_type": "sft"}, "tree", model=MODEL, train=saved))

    def run(self, method: str) -> dict[str, Any]:
        """Tokens and seconds of a run, and what it ranks correctly after each epoch."""
        loss, sharing = METHODS[method]
        name = method.replace(",", "").replace(" ", "-")
        saved = self.folder / "models" / name
        every = {"save": str(saved), "save_interval": self.steps_per_epoch}
        config = self.config(name, loss, sharing, train=every)
        before = time.process_time()
        train(config)
        seconds = time.process_time() - before
        text = (Path(config.logging.output) / "metrics.jsonl").read_text("utf-8")
        steps = [json.loads(line) for line in text.splitlines()]
        judged = self.config("judge", RANKED, "tree", data={"valid": self.valid})
        metrics = [
            evaluate(judged, str(saved / f"iter_{epoch * self.steps_per_epoch:07d}"), None)
            for epoch in range(1, EPOCHS + 1)
        ]
        return {
            "tokens": sum(row["tokens/executed"] for row in steps),
            "seconds": seconds,
            "correct": [x["rewards/accuracies"] * x["num_pairs"] for x in metrics],
            "pairs": metrics[-1]["num_pairs"],
            "top1": metrics[-1]["rewards/top1"],
        }

    def longer(self) -> float:
        """Held-out pairs whose better answer is the longer one; equal lengths count one half."""
        dataset = PreferenceDataset(self.valid)
        lengths = dataset.own_tokens[dataset.pair_sides]
        return float(((np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2).sum())


def accuracies(results: list[dict], method: str) -> list[float]:
    """Of the held-out pairs of all folds together, after each epoch."""
    runs = [fold[method] for fold in results]
    total = sum(run["pairs"] for run in runs)
    return [sum(x) / total for x in zip(*(run["correct"] for run in runs), strict=True)]


def table(results: list[dict], longer: float) -> str:
    """The results as Markdown; ratios are medians over folds, with the range."""
    lines = ["| method | tokens | time | held-out pairs | best answer |", "| --- |" + " --- |" * 4]
    pairs = sum(fold[BASELINE]["pairs"] for fold in results)
    for method in results[0]:
        cells = [method]
        for key in ("tokens", "seconds"):
            ratios = sorted(fold[method][key] / fold[BASELINE][key] for fold in results)
            middle = float(np.median(ratios))
            cells.append(f"{middle:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})")
        cells.append(f"{100 * accuracies(results, method)[-1]:.1f}")
        cells.append(f"{100 * sum(fold[method]['top1'] for fold in results) / len(results):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    tokens, seconds = (
        sum(fold[BASELINE][key] for fold in results) for key in ("tokens", "seconds")
    )
    lines += [
        "",
        f"Tokens and time are parts of `{BASELINE}`: {tokens:,} tokens and {seconds:.0f} s of the "
        f"processor in {len(results)} folds. {pairs} held-out pairs, of which the better answer is "
        f"the longer one in {100 * longer / pairs:.1f} %; the standard error of an accuracy is "
        f"{100 * (0.25 / pairs) ** 0.5:.1f} points.",
    ]
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Held-out accuracy after each epoch, over tokens and over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(
        panels, ("tokens", "seconds"), ("tokens executed", "processor seconds"), strict=True
    ):
        for method in results[0]:
            values = [100 * x for x in accuracies(results, method)]
            whole = sum(fold[method][key] for fold in results)
            places = [whole * (i + 1) / len(values) for i in range(len(values))]
            style = "-" if METHODS[method][0] is RANKED else "--"
            axes.plot(places, values, f"o{style}", markersize=4, linewidth=1, label=method)
        axes.set_xlabel(f"{label}, all folds")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out pairs ranked\ncorrectly, %")
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=Path, required=True, metavar="FILE", help="trees, .jsonl.gz"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--folds", type=int, default=FOLDS, help=f"of {FOLDS}, those to run (default: all)"
    )
    args = parser.parse_args()
    if not 1 <= args.folds <= FOLDS:
        parser.error(f"--folds must be from 1 to {FOLDS}")
    with gzip.open(args.input, "rt", encoding="utf-8") as file:
        trees = list(file)
    results: list[dict] = []
    longer = 0.0
    for number in range(args.folds):
        start = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            fold = Fold(args.output / f"fold{number}", number, trees)
            fold.make_start()
            # In turns that move, so that no method is always the first or the last.
            methods = [*METHODS][number % len(METHODS) :] + [*METHODS][: number % len(METHODS)]
            runs = {method: fold.run(method) for method in methods}
        results.append({method: runs[method] for method in METHODS})
        longer += fold.longer()
        print(f"fold {number}: {time.monotonic() - start:.0f} s", flush=True)
        report = json.dumps({"results": results, "longer": longer}, indent=1)
        (args.output / "results.json").write_text(report + "\n", encoding="utf-8")
    draw(results, args.output / "rankings.png")
    print(table(results, longer))


if __name__ == "__main__":
    main()
