"""Compare two environments: the same trajectories, and checkpoints that go on in the other one.

    python tools/compare_versions.py .venv/bin/python .venv-oldest/bin/python

Per layout and environment: a run of 6 steps; a run of 3 steps that is saved; that checkpoint
resumed in the other environment up to step 6. All losses and gradient norms of steps 4 to 6, and
the final weights, must agree with the straight run of the first environment within TOLERANCE. In
other words: nobody can tell from a run which versions it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, CUT = 6, 3
TOLERANCE = 1e-5
"""Relative; losses are float32 sums, and versions of torch may add them up in another order."""
LAYOUTS = {
    "one process": (1, []),
    "two processes, distributed optimizer": (2, ["parallel.use_distributed_optimizer=true"]),
}
SETTINGS = [
    *("data.row_capacity=2304", "data.global_batch_size=4", "data.seed=1"),
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
    *("model.num_attention_heads=4", "model.num_query_groups=2", "optimizer.lr=1.0e-3"),
    *("train.seed=1", f"train.steps={STEPS}", f"train.save_interval={CUT}"),
]


def run(python: str, *arguments: object, processes: int = 1) -> None:
    """Run a module of the repository in an environment; its output is shown if it fails."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [python, *launch, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{python} {' '.join(map(str, arguments))}\n{done.stdout[-6000:]}")


def command(python: str, *arguments: object, processes: int = 1) -> None:
    run(python, "-m", "megatron_prefix", *arguments, processes=processes)


def metrics(folder: Path) -> dict[int, list[float]]:
    """Loss and gradient norm of every step after CUT."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        row["step"]: [row["loss"], row["grad_norm"]]
        for row in rows
        if "loss" in row and row["step"] > CUT
    }


def weights(python: str, checkpoint: Path, folder: Path) -> dict[str, list[float]]:
    """Every tensor of a checkpoint by its Hugging Face name."""
    from safetensors.numpy import load_file

    command(python, "convert", "export", "--load", checkpoint, "--hf", folder)
    (file,) = folder.glob("*.safetensors")
    return {name: tensor.ravel().tolist() for name, tensor in load_file(file).items()}


def worst(left: dict, right: dict) -> float:
    """Largest difference, relative to the largest entry of the same list."""
    assert left.keys() == right.keys(), (sorted(left), sorted(right))
    return max(
        max(abs(a - b) for a, b in zip(left[key], right[key], strict=True))
        / max(map(abs, right[key]))
        for key in right
    )


def compare(pythons: list[str], name: str, folder: Path, data: Path) -> float:
    """The largest difference between the four ways to 6 steps in one layout."""
    processes, settings = LAYOUTS[name]
    base = [f"data.train={data}", *SETTINGS, *settings]
    (folder / "base.yaml").write_text("data: {}\nmodel: {}\noptimizer: {}\ntrain: {}\n")

    def train(python: str, place: Path, **more: object) -> None:
        extra = [f"train.{key}={value}" for key, value in more.items()]
        command(
            python,
            *("train", "--config", folder / "base.yaml", *base, f"logging.output={place}"),
            *extra,
            processes=processes,
        )

    results = []
    for index, python in enumerate(pythons):
        straight, resumed = folder / f"straight{index}", folder / f"resumed{index}"
        train(python, straight, save=straight / "saved")
        train(python, resumed, steps=CUT, save=resumed / "saved")
        saved = resumed / "saved"
        train(pythons[1 - index], resumed, load=saved, save=saved)
        results += [straight, resumed]
    curves = [metrics(place) for place in results]
    ends = [weights(pythons[0], place / "saved", place / "hf") for place in results]
    assert all(len(curve) == STEPS - CUT for curve in curves), curves
    return max(
        max(worst(curve, curves[0]) for curve in curves), max(worst(end, ends[0]) for end in ends)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs=2, metavar="PYTHON", help="an environment's interpreter")
    args = parser.parse_args()
    failed = False
    for python in args.pythons:
        subprocess.run([python, ROOT / "tools" / "versions.py", python], check=True)
    with tempfile.TemporaryDirectory() as root:
        toy = Path(root) / "toy"
        made = ["--output", toy, "--num-train", 40, "--num-valid", 8]
        run(args.pythons[0], "tools/make_toy_preferences.py", *made)
        source = ["--input", toy / "train.jsonl", "--tokenizer", "bytes"]
        command(args.pythons[0], "build", *source, "--output", toy / "set")
        for number, name in enumerate(LAYOUTS):
            folder = Path(root) / str(number)
            folder.mkdir()
            difference = compare(args.pythons, name, folder, toy / "set")
            failed |= not difference <= TOLERANCE
            print(f"{name}: largest relative difference {difference:.1e} (allowed: {TOLERANCE:g})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
