"""References of differing quality: every mixture and weighting, and each reference alone.

1. Pairs of short letters: the better one has more friendly words. Some training labels are wrong.
2. Seven small models: the policy's start, and others that know the task better, worse or wrongly.
   `score` writes the log-probabilities of each to a file.
3. DPO from the same start with each file alone, and with all seven under every mixture and rule.
4. A table of held-out accuracies over several seeds, and a plot.

    python examples/experiments/several_references.py --output experiments/references
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.train import evaluate, score_reference, train

NICE = (
    "kind warm glad calm fair neat good fond keen safe true wise brave happy merry proud quick "
    "sunny clean bright gentle polite honest cheery lovely tender joyful caring"
).split()
NASTY = (
    "cold rude grim sour vain mean dull glum harsh bleak angry bored nasty cruel upset surly dirty "
    "bitter gloomy stupid hostile lazy moody petty shabby tetchy sullen dismal"
).split()
SLOTS = 4
WRONG_LABELS = 0.2
"""Share of training pairs whose label is wrong."""
NUM_TRAIN, NUM_VALID = 640, 400
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
WIDE = {**MODEL, "hidden_size": 128, "ffn_hidden_size": 256}
STEPS = 40
MIXTURES = ("multi_dpo", "harmonic", "geometric")
RULES = (
    "uniform",
    "adaptive",
    "validation_confidence",
    "validation_accuracy",
    "sliding_window",
    "thompson",
)
ALONE = "one reference"


def letters(seed: int, count: int, wrong: float) -> list[dict[str, str]]:
    """Records whose chosen answer has more friendly words, but for a share of wrong labels."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        name = "".join(draw.choices("abcdefghijklmnop", k=5)).title()
        good = draw.randint(1, SLOTS)
        bad = draw.randint(max(0, good - 2), good - 1)
        sides = []
        for friendly in (good, bad):
            words = draw.choices(NICE, k=friendly) + draw.choices(NASTY, k=SLOTS - friendly)
            draw.shuffle(words)
            sides.append(f" It is {', '.join(words)}.")
        if draw.random() < wrong:
            sides.reverse()
        records.append(
            {"prompt": f"{name} asks, {number}:", "chosen": sides[0], "rejected": sides[1]}
        )
    return records


def write_set(folder: Path, name: str, records: list[dict[str, str]]) -> str:
    """PREFIX of a data set of these records."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    build_dataset([str(path)], "bytes", str(folder / name), BuildOptions())
    return str(folder / name)


class Experiment:
    """One seed: its data sets, its seven models and their files."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.policies: dict[str, dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        right = letters(1000 + seed, NUM_TRAIN, 0.0)
        flipped = [{**x, "chosen": x["rejected"], "rejected": x["chosen"]} for x in right]
        self.train = write_set(folder, "train", letters(seed, NUM_TRAIN, WRONG_LABELS))
        self.valid = write_set(folder, "valid", letters(2000 + seed, NUM_VALID, 0.0))
        self.judge = write_set(folder, "judge", letters(3000 + seed, NUM_VALID, 0.0))
        self.others = write_set(folder, "others", right)
        self.against = write_set(folder, "against", flipped)

    def config(
        self,
        name: str,
        *,
        data: str = "train",
        valid: str | None = None,
        model: dict | None = None,
        loss: dict | None = None,
        **train: Any,
    ) -> Config:
        """A run of one epoch at most; `train` goes into its section."""
        return parse_config(
            {
                "data": {
                    "train": getattr(self, data),
                    "valid": valid or self.valid,
                    "seed": self.seed,
                    "row_capacity": 2048,
                    "global_batch_size": 16,
                },
                "model": model or MODEL,
                "loss": loss or {},
                "optimizer": {"lr": 1e-3, "lr_warmup_steps": 4},
                "train": {"steps": STEPS, "seed": self.seed, **train},
                "logging": {"output": str(self.folder / "runs" / name)},
            }
        )

    def made(
        self, name: str, start: str | None = None, size: dict | None = None, **options: Any
    ) -> dict:
        """A model section with the weights that a run leaves."""
        saved = str(self.folder / "models" / name)
        model = {**(size or MODEL), "checkpoint": start} if start else size or MODEL
        train(self.config(f"model {name}", model=model, save=saved, **options))
        return {**(size or MODEL), "checkpoint": saved}

    def models(self) -> dict[str, dict]:
        """The seven references by name, from clueless to good; the first is the policy's start."""
        sft = {"loss_type": "sft"}
        start = self.made("start", loss=sft, data="others", steps=80)
        path = start["checkpoint"]
        return {
            "start": start,
            "drawn": MODEL,
            "more sft": self.made("more-sft", path, loss=sft, data="others", steps=80),
            "wide": self.made("wide", size=WIDE, loss=sft, data="others", steps=80),
            "little dpo": self.made("little-dpo", path, data="others", steps=20),
            "much dpo": self.made("much-dpo", path, data="others", steps=80),
            "against": self.made("against", path, data="against", steps=20),
        }

    def references(self) -> list[dict[str, str]]:
        """`loss.references`: a file for each model."""
        listed = []
        for name, model in self.policies.items():
            short = name.replace(" ", "-")
            path = str(self.folder / f"{short}.ref")
            score_reference(self.config(f"score {name}", model=model), path)
            listed.append({"name": short, "ref_logps": path})
        return listed

    def run(self) -> dict[str, dict]:
        """Results by method."""
        self.policies = self.models()
        files = self.references()
        results: dict[str, dict] = {}
        for file in files:
            loss = {"references": [file], "reference_anchor": file["name"]}
            results[f"{ALONE} / {file['name']}"] = self.result(loss)
        for mixture in MIXTURES:
            for rule in RULES:
                loss = {
                    "references": files,
                    "reference_mixture": mixture,
                    "reference_weights": rule,
                }
                results[f"{mixture} / {rule}"] = self.result(loss)
        return results

    def result(self, loss: dict) -> dict:
        """Held-out accuracies after DPO from the start.

        `policy` is of the policy's log-probabilities alone, on pairs that no rule has read;
        `reward` of log-ratios with the run's own reference or mixture, on those that the rules of
        validation have read. `weights` are those of the references, the mean over steps.
        """
        names = [file["name"] for file in loss["references"]]
        rule = f"{loss.get('reference_mixture')}-{loss.get('reference_weights')}"
        name = f"run-{rule}-{'-'.join(names)}"
        saved = str(self.folder / "models" / name)
        model = self.policies["start"]
        config = self.config(name, model=model, loss=loss, save=saved, eval_interval=STEPS)
        train(config)
        lines = (Path(config.logging.output) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        steps = [row for row in rows if "loss" in row]
        keys = [f"reference_weights/{name}" for name in names]
        return {
            "policy": self.plain(model, saved)["rewards/accuracies"],
            "reward": rows[-1]["eval_rewards/accuracies"],
            "weights": [sum(row[key] for row in steps) / len(steps) for key in keys],
        }

    def plain(self, model: dict, load: str | None) -> dict[str, float]:
        """Metrics without a reference, on the pairs that nothing else reads."""
        loss = {"reference": "none"}
        config = self.config("plain", model=model, loss=loss, valid=self.judge)
        return evaluate(config, load, None)

    def qualities(self) -> dict[str, float]:
        """How often each reference itself prefers the better answer."""
        return {
            name: self.plain(model, None)["rewards/accuracies"]
            for name, model in self.policies.items()
        }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def spread(values: list[float]) -> str:
    """Mean and range, in percent."""
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * sum(values) / len(values):.1f} ({low:.1f}–{high:.1f})"


def table(results: list[dict], qualities: list[dict]) -> str:
    """The results as Markdown, the best policy first; means over seeds, with the range."""
    lines = ["| trained against | the reference alone | policy | reward accuracy | mean weights |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    names = [name.replace(" ", "-") for name in qualities[0]]
    own = dict(zip(names, ([q[x] for q in qualities] for x in qualities[0]), strict=True))

    def policies(method: str) -> list[float]:
        return [result[method]["policy"] for result in results]

    for method in sorted(results[0], key=lambda x: -sum(policies(x))):
        kind, rule = method.split(" / ")
        alone = spread(own[rule]) if kind == ALONE else ""
        rewards = spread([result[method]["reward"] for result in results])
        weights = ""
        if kind != ALONE:
            columns = zip(*(result[method]["weights"] for result in results), strict=True)
            weights = " ".join(f"{sum(x) / len(x):.2f}" for x in columns)
        lines.append(f"| {method} | {alone} | {spread(policies(method))} | {rewards} | {weights} |")
    lines += ["", f"Weights are those of {', '.join(names)}."]
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """One point per run, one row per method."""
    from matplotlib.figure import Figure

    def mean(method: str) -> float:
        return sum(result[method]["policy"] for result in results) / len(results)

    methods = sorted(results[0], key=mean)
    figure = Figure(figsize=(7, 0.24 * len(methods) + 1))
    axes = figure.subplots()
    for place, method in enumerate(methods):
        points = [100 * result[method]["policy"] for result in results]
        is_alone = method.startswith(ALONE)
        colour = "tab:blue" if is_alone else "tab:orange"
        axes.plot(points, [place] * len(points), "o", color=colour, alpha=0.5, markersize=4)
        axes.plot([100 * mean(method)], [place], "|", color=colour, markersize=11)
    axes.set_yticks(range(len(methods)), methods, fontsize=7)
    axes.set_xlabel("held-out pairs that the policy ranks correctly, %")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything (default: 3)")
    args = parser.parse_args()
    results: list[dict] = []
    qualities: list[dict] = []
    for seed in range(args.seeds):
        start = time.monotonic()
        with quietly():
            experiment = Experiment(args.output / f"seed{seed}", seed)
            results.append(experiment.run())
            qualities.append(experiment.qualities())
        print(f"seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    path = args.output / "results.json"
    path.write_text(json.dumps({"results": results, "qualities": qualities}, indent=1) + "\n")
    draw(results, args.output / "several_references.png")
    print(table(results, qualities))


if __name__ == "__main__":
    main()
