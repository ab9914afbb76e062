"""TRL's `KTOTrainer` as judge: the same losses, KL and gradient norms, step by step.

Eight records in one micro batch, eight steps of all of them. TRL's mismatched response of a record
is that of the record before it in the batch; ours are put into the data set like that.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from labelled_sets import block_with_roles
from small_runs import lines

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from compare_trl import _without_bars, load, our_config, trl_arguments  # noqa: E402
from trl_common import Setting, has_trl, make_model, relative  # noqa: E402

from megatron_prefix.data.build import build_dataset  # noqa: E402
from megatron_prefix.data.rebuilding import tree_paths  # noqa: E402
from megatron_prefix.data.store import DatasetWriter, PreferenceDataset  # noqa: E402
from megatron_prefix.data.tree import ResponsePath, build_tree  # noqa: E402
from megatron_prefix.train import train  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not has_trl(), reason="TRL 1.16 is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]
COUNT, STEPS = 8, 8
TOLERANCE = 1e-4
"""Relative."""
SETTING = Setting(loss_type="kto", batch_size=COUNT, steps=STEPS, lr=3e-4, beta=0.5)
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("model"), **sizes, initializer_range=0.12)


def records() -> list[dict]:
    rng = np.random.default_rng(5)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(rng.choice([*letters], rng.integers(low, high)))

    return [
        {
            "prompt": "Say: " + text("abcdefgh ", 10, 40) + ".",
            "completion": " yes " + text("abc" if i % 3 else "efg", 5, 20),
            "label": bool(i % 3),
        }
        for i in range(COUNT)
    ]


def write_set(folder: Path, model: Path) -> None:
    """`folder`/set: record i with the answer of record i - 1 as its mismatch."""
    source = folder / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in records()))
    build_dataset([source], str(model), folder / "plain")
    plain = PreferenceDataset(folder / "plain")
    groups = []
    for group in range(COUNT):
        paths, pairs = tree_paths(plain[group])
        prompt = paths[0].tokens[: paths[0].loss_start]
        tokens, start = plain[group - 1 if group else COUNT - 1].response_tokens(0)
        mismatch = ResponsePath(
            tokens=np.concatenate([prompt, tokens[start:]]), loss_start=len(prompt), set_id=1
        )
        groups.append((build_tree([*paths, mismatch], pairs), [0, 1]))
    with DatasetWriter(folder / "set", plain.manifest["tokenizer"]) as writer:
        writer.add_block(block_with_roles(groups))
        writer.finish()


def run_trl_kto(model: Path, folder: Path, loss_type: str) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(folder),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        loss_type=loss_type,
        beta=SETTING.beta,
        max_length=None,
        per_device_train_batch_size=COUNT,
        **WEIGHTS,
        **trl_arguments(SETTING),
    )
    with _without_bars():
        trainer = KTOTrainer(
            model=load(model, "lm"),
            ref_model=load(model, "lm"),
            args=config,
            train_dataset=Dataset.from_list(records()),
            processing_class=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_steps_are_those_of_trl(loss_type, model, tmp_path):
    write_set(tmp_path, model)
    config = our_config(tmp_path, model, SETTING)
    loss = replace(config.loss, loss_type=loss_type, **WEIGHTS)
    train(replace(config, loss=loss))
    ours = [row for row in lines(tmp_path / "run") if "loss" in row]
    theirs = run_trl_kto(model, tmp_path / "trl", loss_type)
    assert len(ours) == len(theirs) == STEPS
    for key, name in (("loss", "loss"), ("grad_norm", "grad_norm")):
        pairs = [row[key] for row in ours], [row[name] for row in theirs]
        assert max(relative(*pairs)) < TOLERANCE, (key, pairs)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        pairs = [row[key] for row in ours], [row[key] for row in theirs]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3, abs=1e-4), key
    if loss_type == "kto":
        kl = [row["kl"] for row in ours]
        assert kl == pytest.approx([row["kl"] for row in theirs], rel=1e-3, abs=1e-4)
        assert max(kl) > 0.1, "the KL is never above 0"
    assert abs(ours[-1]["loss"] / ours[0]["loss"] - 1) > 0.05, "nothing was learned"
