"""The same run in `megatron_prefix` and in TRL, compared step by step.

Losses with a reference are compared with TRL's `DPOTrainer`, `cpo` and `simpo` with `CPOTrainer`,
`orpo` with `ORPOTrainer`; with `--kind reward`, a reward model with `RewardTrainer`.

1. Take pairs of text from a preference file. If no model is given, make a random one.
2. Ours: build, train from the Hugging Face model (trees shared, packed into rows), export.
3. TRL: the same weights, the pairs in the order of our step plan, every response alone.
4. Print a Markdown table of loss and gradient norm, and the difference of the final weights.

    python tools/compare_trl.py
    python tools/compare_trl.py --input pairs.jsonl.gz --hf DIR --label-smoothing 0.1
    python tools/compare_trl.py --loss-type simpo --beta 2
    python tools/compare_trl.py --kind reward --margin --center 0.01

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
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from bench_common import environment, table
from trl_common import (
    Outcome,
    Setting,
    TextPair,
    farthest_weight,
    make_model,
    relative,
    text_pairs,
    with_margins,
)
from trl_reference_free import REFERENCE_FREE, reference_free_parts, tokens_of_steps

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError

DATA = os.environ.get(
    "MEGATRON_PREFIX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"
)


def our_config(folder: Path, hf: Path, setting: Setting) -> Config:
    """The configuration of our run on the data set `folder`/set."""
    names, weights = setting.loss_type, setting.loss_weights
    loss = {"loss_type": names if isinstance(names, str) else [*names], "beta": setting.beta}
    if weights is not None:
        loss["loss_weights"] = [*weights]
    if setting.label_smoothing:
        loss["label_smoothing"] = setting.label_smoothing
    if setting.kind == "reward":
        loss = {"margin": setting.margin, "center_rewards_coefficient": setting.center}
    elif setting.precomputed:
        loss |= {"reference": "precomputed", "ref_logps": str(folder / "reference")}
    data = {"train": str(folder / "set"), "sharing": "tree", "row_capacity": setting.row_capacity}
    return parse_config(
        {
            "data": {**data, "global_batch_size": setting.batch_size},
            "model": {"hf": str(hf), "kind": setting.kind},
            "loss": loss,
            "optimizer": {"lr": setting.lr, "clip_grad": setting.clip_grad},
            "train": {"steps": setting.steps, "save": str(folder / "checkpoints")},
            "logging": {"output": str(folder / "run")},
        }
    )


def run_ours(
    pairs: Sequence[TextPair], hf: Path, setting: Setting, folder: Path
) -> tuple[Outcome, list[TextPair]]:
    """Build, train, export. Returns the outcome, and the pairs in the order of training."""
    from megatron_prefix.checkpoint import export_hf
    from megatron_prefix.objectives import check
    from megatron_prefix.train import score_reference, train, training_sampler

    folder.mkdir(parents=True)
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    build_dataset([folder / "pairs.jsonl"], str(hf), folder / "set")
    config = our_config(folder, hf, setting)
    if setting.precomputed:
        plain = our_config(folder, hf, replace(setting, precomputed=False))
        score_reference(plain, str(folder / "reference"))
    train(config)
    export_hf(folder / "checkpoints", folder / "aligned", 10**10)
    aligned = load(folder / "aligned", setting.kind)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    dataset = PreferenceDataset(folder / "set")
    sampler = training_sampler(config, check(config.loss, config.model.kind), dataset)
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


def load(directory: Path, kind: str) -> torch.nn.Module:
    """Load a model in float32 with transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    lm = kind == "lm"
    auto = AutoModelForCausalLM if lm else AutoModelForSequenceClassification
    return auto.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)


def trl_arguments(setting: Setting) -> dict:
    """Arguments of TRL's configuration for the same run."""
    return {
        "max_steps": setting.steps,
        "learning_rate": setting.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": setting.clip_grad,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def _dpo_arguments(setting: Setting) -> dict:
    """Arguments of `DPOConfig` only.

    TRL 1.16 ignores `label_smoothing` in loss `sigmoid`. Its `aot` sorts the log-ratios of a micro
    batch before it subtracts them. With one pair there is nothing to sort, and the smoothed loss
    is that of conservative DPO.
    """
    names = [setting.loss_type] if isinstance(setting.loss_type, str) else [*setting.loss_type]
    smoothed = setting.label_smoothing > 0 and names == ["sigmoid"]
    return {
        "max_length": None,
        "per_device_train_batch_size": 1 if smoothed else setting.batch_size,
        "gradient_accumulation_steps": setting.batch_size if smoothed else 1,
        "loss_type": ["aot"] if smoothed else names,
        "loss_weights": setting.loss_weights and [*setting.loss_weights],
        "beta": setting.beta,
        "label_smoothing": setting.label_smoothing,
        "precompute_ref_log_probs": setting.precomputed,
    }


def _reward_arguments(setting: Setting) -> dict:
    """Arguments of `RewardConfig` only. It uses margins if the data has them."""
    return {
        "max_length": None,
        "per_device_train_batch_size": setting.batch_size,
        "center_rewards_coefficient": setting.center,
        "disable_dropout": True,
    }


def trl_parts(setting: Setting) -> tuple[type, type, dict]:
    """TRL's configuration and trainer for a setting, and the arguments that only they have."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    if setting.loss_type in REFERENCE_FREE:
        config, trainer, own = reference_free_parts(setting)
        return config, trainer, {"per_device_train_batch_size": setting.batch_size, **own}
    if setting.kind == "reward":
        return RewardConfig, RewardTrainer, _reward_arguments(setting)
    return DPOConfig, DPOTrainer, _dpo_arguments(setting)


def run_trl(pairs: Sequence[TextPair], hf: Path, setting: Setting, folder: Path) -> Outcome:
    """TRL's run on `pairs` in this order: the first `batch_size` are the first step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    config_class, trainer_class, own = trl_parts(setting)
    config = config_class(
        output_dir=str(folder),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **trl_arguments(setting),
        **own,
    )
    is_free = setting.loss_type in REFERENCE_FREE
    has_reference = setting.kind == "lm" and not is_free
    reference = {"ref_model": load(hf, "lm")} if has_reference else {}
    with _without_bars():
        trainer = trainer_class(
            model=load(hf, setting.kind),
            args=config,
            train_dataset=Dataset.from_list(list(pairs)),
            processing_class=AutoTokenizer.from_pretrained(hf, trust_remote_code=False),
            **reference,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    if is_free:
        num_tokens = tokens_of_steps(trainer.train_dataset, setting)
    else:
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
    """Context without progress bars of `datasets` and TRL."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
            yield
    finally:
        datasets.enable_progress_bars()


def report(ours: Outcome, theirs: Outcome, setting: Setting) -> str:
    """The comparison in Markdown. Norms are those of the gradient before clipping."""
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
    objective = (
        f"{setting.loss_type}, beta {setting.beta:g}, label smoothing "
        f"{setting.label_smoothing:g}, reference "
        f"{'precomputed' if setting.precomputed else 'in memory'}"
    )
    if setting.loss_type in REFERENCE_FREE:
        objective = f"{setting.loss_type}, beta {setting.beta:g}"
    if setting.kind == "reward":
        objective = f"Bradley-Terry, margins {setting.margin}, centring {setting.center or 0:g}"
    notes = (
        f"{setting.batch_size} pairs per step, learning rate {setting.lr:g}, {objective}, "
        f"gradients clipped at {setting.clip_grad:g}, float32. Final weights are at most "
        f"{farthest_weight(ours, theirs):.1e} apart. Tokens of all pairs: "
        f"{sum(ours.num_tokens):,} in ours, {sum(theirs.num_tokens):,} in TRL; tokens run: "
        f"{sum(ours.num_run):,} in ours, {sum(theirs.num_run):,} and padding in TRL."
    )
    where = environment()
    where |= {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    return "\n".join([table(rows), "", notes, "", *(f"- {k}: `{v}`" for k, v in where.items())])


def compare(args: argparse.Namespace, setting: Setting) -> tuple[Outcome, Outcome]:
    """Both runs, in a temporary directory."""
    from transformers import logging

    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        hf = args.hf or make_model(Path(scratch) / "model", setting.kind)
        pairs = text_pairs(args.input, hf, args.num_pairs, args.max_length)
        pairs = with_margins(pairs) if setting.margin else pairs
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
    parser.add_argument(
        "--max-length", type=int, default=400, help="tokens per side (default: 400)"
    )
    parser.add_argument("--steps", type=int, default=default.steps, help="(default: 8)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="(default: 8)")
    parser.add_argument("--lr", type=float, default=default.lr, help="(default: 1e-4)")
    parser.add_argument(
        "--loss-type",
        choices=("sigmoid", "ipo", "robust", *REFERENCE_FREE),
        default=default.loss_type,
        help="a loss that both programs have (default: sigmoid)",
    )
    parser.add_argument("--beta", type=float, default=default.beta, help="(default: 0.1)")
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="(default: 0)")
    parser.add_argument(
        "--precomputed", action="store_true", help="reference log-probabilities before training"
    )
    parser.add_argument(
        "--kind",
        choices=("lm", "reward"),
        default="lm",
        help="lm: DPO; reward: a reward model (default: lm)",
    )
    parser.add_argument(
        "--margin", action="store_true", help="for reward models: margins of 0, 1/4, 1/2, 3/4"
    )
    parser.add_argument(
        "--center", type=float, metavar="C", help="for reward models: center_rewards_coefficient"
    )
    args = parser.parse_args()
    own = ("beta", "label_smoothing", "precomputed", "loss_type") if args.kind == "reward" else ()
    own = own or ("margin", "center")
    if given := [name for name in own if getattr(args, name) != parser.get_default(name)]:
        parser.error(
            f"--{given[0].replace('_', '-')} has no effect with --kind {args.kind}: leave it out"
        )
    if find_spec("trl") is None:
        parser.error("TRL is not installed: pip install trl")
    if not args.input.is_file():
        parser.error(f"{args.input}: no such file; give --input or set MEGATRON_PREFIX_DATA")
    names = ("steps", "batch_size", "lr", "beta", "label_smoothing", "precomputed")
    names += ("kind", "margin", "center", "loss_type")
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
