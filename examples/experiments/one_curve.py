"""Packed trees against one padded sequence per response: five objectives, three seeds, one curve.

Both runs of a pair see the same groups in the same steps. One computes every token of a group
once, in packed rows; the other runs every response with its own prompt, padded, as unpacked
training does. The table has the largest difference of the loss over all steps.

    python examples/experiments/one_curve.py --output experiments/one_curve
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from megatron_prefix.config import parse_config
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.train import train

STEPS, BATCH = 24, 8
MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "plackett_luce": {"loss_type": "plackett_luce"},
    "aot": {"loss_type": "aot"},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed trees": {"sharing": "tree", "row_capacity": 1024},
    "unpacked": {"sharing": "none", "packing": False, "micro_batch_size": 8},
}
FRIENDLY = "kind warm glad calm fair neat good fond keen safe true wise".split()
RUDE = "cold rude grim sour vain mean dull glum harsh bleak angry bored".split()


def write_letters(path: Path, seed: int, count: int) -> None:
    """Letters with two to four answers, the better one with more friendly words."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answers = []
            for friendly in draw.sample(range(5), draw.randint(2, 4)):
                words = draw.choices(FRIENDLY, k=friendly) + draw.choices(RUDE, k=4 - friendly)
                draw.shuffle(words)
                answers.append({"response": f" {', '.join(words)}.", "score": friendly})
            prompt = f"Letter {number} to the shop: how was the {draw.choice(RUDE)} day? It was"
            file.write(json.dumps({"prompt": prompt, "answers": answers}) + "\n")


def run(folder: Path, objective: str, layout: str, seed: int) -> list[dict]:
    """The lines of a run's metrics."""
    output = folder / "runs" / f"{objective}-{layout.replace(' ', '-')}-{seed}"
    settings = {
        "data": {
            "train": str(folder / "letters"),
            "seed": seed,
            "global_batch_size": BATCH,
            **LAYOUTS[layout],
        },
        "model": MODEL,
        "loss": OBJECTIVES[objective],
        "optimizer": {"lr": 1e-3},
        "train": {"steps": STEPS, "seed": seed},
        "logging": {"output": str(output)},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        train(parse_config(settings))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def draw_curves(curves: dict, path: Path) -> None:
    """A panel per objective: lines are packed trees, dots the unpacked runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6))
    panels = figure.subplots(1, len(OBJECTIVES))
    for axes, objective in zip(panels, OBJECTIVES, strict=True):
        for seed, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
            packed, unpacked = (curves.get((objective, x, seed)) for x in LAYOUTS)
            if packed is None or unpacked is None:
                continue
            axes.plot([row["loss"] for row in packed], color=colour, linewidth=1)
            axes.plot([row["loss"] for row in unpacked], ".", color=colour, markersize=5)
        axes.set_title(objective, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    source = args.output / "letters.jsonl"
    write_letters(source, 0, 240)
    build_dataset([str(source)], "bytes", str(args.output / "letters"), BuildOptions())
    curves = {
        (objective, layout, seed): run(args.output, objective, layout, seed)
        for objective in OBJECTIVES
        for layout in LAYOUTS
        for seed in range(args.seeds)
    }
    print("| objective | loss, first and last step | largest difference | tokens |")
    print("| --- | --- | --- | --- |")
    for objective in OBJECTIVES:
        pairs = [[curves[objective, x, seed] for x in LAYOUTS] for seed in range(args.seeds)]
        worst = max(
            abs(a["loss"] - b["loss"]) / max(abs(b["loss"]), 0.01)
            for packed, unpacked in pairs
            for a, b in zip(packed, unpacked, strict=True)
        )
        first, last = pairs[0][0][0]["loss"], pairs[0][0][-1]["loss"]
        packed, unpacked = (
            sum(row["tokens/executed"] for pair in pairs for row in pair[i]) for i in range(2)
        )
        losses = f"{first:.4f}, {last:.4f}"
        print(f"| {objective} | {losses} | {worst:.1e} | {packed / unpacked:.2f} |")
    print("\nTokens: packed trees as a part of unpacked, padding included.")
    draw_curves(curves, args.output / "one_curve.png")


if __name__ == "__main__":
    main()
