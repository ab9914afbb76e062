"""PEFT on plain torch, and TRL's `DPOTrainer` with `peft_config`, as judges of runs with adapters.

Theirs are separate sequences, ours trees packed into rows; all start from the same adapter file.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

from peft_runs import make_adapter, make_model, plain_run, write_pairs  # noqa: E402
from small_runs import configure, saved_weights, trained  # noqa: E402
from trl_common import has_trl, relative  # noqa: E402

from megatron_prefix.data.build import build_dataset  # noqa: E402
from megatron_prefix.model.adapters.linear import AdaptedLinear  # noqa: E402
from megatron_prefix.model.hf.peft import peft_name  # noqa: E402
from megatron_prefix.train import evaluate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, LR = 20, 1e-3
TOLERANCE, WEIGHTS = 1e-5, 1e-4
"""Relative for losses, gradient norms and log-probabilities; absolute for weights."""
FEW = {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]}
CASES = {  # name: model, adapter, lora.reference
    "base": ("llama", {}, "base"),
    "start": ("qwen2", {}, "start"),
    "few": ("qwen3", {**FEW, "use_rslora": True}, "base"),
    "whole copies": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, "base"),
}


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    rng = np.random.default_rng(5)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(rng.choice([*letters], rng.integers(low, high)))

    return [
        {
            "prompt": "Say: " + text("abcdefgh", 10, 40) + ".",
            "chosen": " yes " + text("abc", 5, 30),
            "rejected": " yes " + text("efg", 5, 30),
        }
        for _ in range(6)
    ]


def our_run(
    folder: Path,
    model: Path,
    adapter: Path,
    pairs: list,
    reference: str,
    lr: float = LR,
    **train: object,
):
    """Rows of metrics of the packed, shared run, and its configuration."""
    build_dataset([write_pairs(folder / "pairs.jsonl", pairs)], str(model), folder / "set")
    config = configure(
        folder / "run",
        str(folder / "set"),
        data={"valid": str(folder / "set"), "global_batch_size": len(pairs)},
        model={"hf": str(model), **dict.fromkeys(SIZES_OF_HF)},
        loss={"beta": 0.1},
        lora={"adapter": str(adapter), "reference": reference},
        optimizer={"lr": lr},
        train={"steps": STEPS, "save": str(folder / "saved"), **train},
    )
    return [row for row in trained(config) if "loss" in row], config


SIZES_OF_HF = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_peft(case, pairs, tmp_path):
    kind, settings, reference = CASES[case]
    model = make_model(tmp_path / "model", kind)
    adapter = make_adapter(model, tmp_path / "adapter", **settings)
    # embeddings have gradients near 0, which Adam divides by themselves: smaller steps for them
    lr = LR / 4 if "modules_to_save" in settings else LR
    ours, config = our_run(tmp_path, model, adapter, pairs, reference, lr)
    theirs = plain_run(model, adapter, pairs, STEPS, lr, reference)
    assert max(relative([row["loss"] for row in ours], theirs.losses)) < TOLERANCE
    assert max(relative([row["grad_norm"] for row in ours], theirs.grad_norms)) < TOLERANCE
    assert theirs.losses[-1] < 0.5 * theirs.losses[0] and max(theirs.grad_norms) > 1.0
    assert all(row["tokens/executed"] < 0.9 * row["tokens/logical"] for row in ours)
    weights = {peft_name(name): x for name, x in saved_weights(tmp_path / "saved", STEPS).items()}
    assert weights.keys() == theirs.weights.keys()
    for name, x in theirs.weights.items():
        assert (weights[name][: len(x)] - x).abs().max() <= WEIGHTS, name
    evaluate(config, None, str(tmp_path / "logps.jsonl"))
    logps = [json.loads(row)["logp"] for row in (tmp_path / "logps.jsonl").open()]
    assert max(relative(logps, theirs.logps[0])) < TOLERANCE


def test_one_factor_for_queries_keys_and_values_is_found(pairs, tmp_path, monkeypatch):
    """The negative control: fused layers with one A are another model."""

    def shared(self, input_, *args, **kwargs):
        first = next(iter(self.adapters.values()))
        for adapter in self.adapters.values():
            adapter.lora_A = first.lora_A
        return own(self, input_, *args, **kwargs)

    own = AdaptedLinear.forward
    monkeypatch.setattr(AdaptedLinear, "forward", shared)
    model = make_model(tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter")
    ours, _ = our_run(tmp_path, model, adapter, pairs, "base", steps=1, save=None)
    theirs = plain_run(model, adapter, pairs, 1, LR)
    assert relative([ours[0]["loss"]], theirs.losses)[0] > 100 * TOLERANCE


@pytest.mark.skipif(not has_trl(), reason="TRL 1.16 is not installed: pip install trl")
def test_a_run_is_that_of_trl(pairs, tmp_path):
    """TRL makes the adapter, whose B is 0, and takes the base as reference."""
    import peft
    from compare_trl import load, trl_arguments
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl_common import Setting

    model = make_model(tmp_path / "model")
    setting = Setting(steps=8, batch_size=len(pairs), lr=LR)
    arguments = {**trl_arguments(setting), "report_to": "none", "save_strategy": "no"}
    trainer = DPOTrainer(
        model=load(model, "lm"),
        args=DPOConfig(output_dir=str(tmp_path), logging_steps=1, disable_tqdm=True, **arguments),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.model.save_pretrained(tmp_path / "adapter")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    ours, _ = our_run(tmp_path, model, tmp_path / "adapter", pairs, "base", steps=8)
    assert abs(ours[0]["loss"] - math.log(2)) < 1e-6 and ours[-1]["loss"] < 0.6
    assert max(relative([r["loss"] for r in ours], [r["loss"] for r in rows])) < 1e-4
    assert max(relative([r["grad_norm"] for r in ours], [r["grad_norm"] for r in rows])) < 1e-4
    weights = {peft_name(name): x for name, x in saved_weights(tmp_path / "saved", 8).items()}
    theirs = peft.get_peft_model_state_dict(trainer.model)
    assert weights.keys() == theirs.keys()
    assert max(float((weights[n] - x).abs().max()) for n, x in theirs.items()) < 1e-4
