"""examples/trl_prefix_dpo.py against TRL's own `DPOTrainer`: every step has the same loss, gradient
norm and metrics.

Random Hugging Face models in float32 and real HH-RLHF pairs. Both trainers are given the same
arguments and run their own loop.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "examples")]

from trl_common import has_trl  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not has_trl(), reason="TRL 1.16 is not installed: pip install trl"),
    pytest.mark.filterwarnings("ignore"),
]
TOLERANCE = 1e-4
"""Relative, for losses and gradient norms."""
STEPS, PAIRS = 4, 16
SAME = ("num_tokens", "rewards/accuracies", "mean_token_accuracy")
CLOSE = ("entropy", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")

CASES = {
    "reference model": {},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "ipo, checkpointing": {"loss_type": ["ipo"], "gradient_checkpointing": True},
    "several losses, weighting": {"loss_type": ["sigmoid_norm", "apo_zero"], "use_weighting": True},
    "cut at the end, ld_alpha": {"max_length": 96, "ld_alpha": 0.5},
    "cut at the start": {"max_length": 96, "truncation_mode": "keep_end"},
    "micro batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    from trl_common import make_model

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("model"), **sizes, initializer_range=0.12)


@pytest.fixture(scope="module")
def pairs(data_dir, hf) -> list[dict]:
    from trl_common import text_pairs

    return text_pairs(data_dir / "hh_pairs.jsonl.gz", hf, PAIRS, 200)


def arguments(folder: Path, **change):
    from compare_trl import trl_arguments
    from trl import DPOConfig
    from trl_common import Setting

    given = trl_arguments(Setting(steps=STEPS, batch_size=PAIRS // STEPS))
    fixed = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return DPOConfig(output_dir=str(folder), **{**given, **fixed, **change})


def make_trainer(kind: type, hf: Path, pairs: list[dict], folder: Path, **change):
    """Without a reference model if it is precomputed: then the policy is the reference."""
    from compare_trl import load
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    trainer = kind(
        model=load(hf, "lm"),
        ref_model=None if change.get("precompute_ref_log_probs") else load(hf, "lm"),
        args=arguments(folder, **change),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(hf),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer) -> list[dict]:
    """Train, and return the logs of every step."""
    trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def assert_same_steps(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for our, their in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert math.isclose(our[name], their[name], rel_tol=TOLERANCE), (name, our, their)
        assert [our[name] for name in SAME] == [their[name] for name in SAME]
        for name in CLOSE:
            assert math.isclose(our[name], their[name], rel_tol=1e-3, abs_tol=1e-5), (name, our)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_trl(case, hf, pairs, tmp_path):
    from trl import DPOTrainer
    from trl_prefix_dpo import PrefixDPOTrainer

    theirs = history(make_trainer(DPOTrainer, hf, pairs, tmp_path / "theirs", **CASES[case]))
    trainer = make_trainer(PrefixDPOTrainer, hf, pairs, tmp_path / "ours", **CASES[case])
    assert_same_steps(history(trainer), theirs)
    losses = [row["loss"] for row in theirs]
    assert max(losses) - min(losses) > 0.01, "a run that goes nowhere would say nothing"


def test_qwen2_trains_as_in_trl(hf, pairs, tmp_path):
    """With biases and tied embeddings."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import DPOTrainer
    from trl_prefix_dpo import PrefixDPOTrainer

    sizes = {"vocab_size": 258, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "initializer_range": 0.12}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=257))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(hf).save_pretrained(tmp_path / "model")
    theirs, ours = (
        history(make_trainer(kind, tmp_path / "model", pairs, tmp_path / kind.__name__))
        for kind in (DPOTrainer, PrefixDPOTrainer)
    )
    assert_same_steps(ours, theirs)


def test_a_model_with_other_layers_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl_prefix_dpo import PrefixDPOTrainer

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    with pytest.raises(ValueError, match="model_type gpt2 is not supported; use one of llama"):
        PrefixDPOTrainer(model, args=arguments(tmp_path))


def test_adapters_are_refused(hf, tmp_path):
    from compare_trl import load
    from trl_prefix_dpo import PrefixDPOTrainer

    with pytest.raises(ValueError, match="PEFT is not supported"):
        PrefixDPOTrainer(load(hf, "lm"), args=arguments(tmp_path), peft_config=object())


def test_windows_are_passed_on_and_dropout_is_refused():
    from trl_prefix_dpo import Row, attend

    import megatron_prefix as mp

    plan = mp.TreePlan(mp.TreeLayout.from_parents([4, 2, 3], [-1, 0, 0]), "cpu")
    q = torch.randn(1, 2, 9, 8)
    row = Row({}, plan, q, q)
    ours, _ = attend(None, q, q, q, None, tree_row=row, sliding_window=3)
    heads = q[0].transpose(0, 1)
    expected = mp.tree_attention(heads, heads, heads, plan.layout, backend="dense", window=3)
    assert (ours[0] - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="attention_dropout 0.1: .* set it to 0"):
        attend(None, q, q, q, None, tree_row=row, dropout=0.1)


def test_a_broken_mask_is_told_from_it(hf, pairs, tmp_path):
    """Rejected responses see the chosen one before them: the comparison fails."""
    from transformers import AttentionInterface
    from trl import DPOTrainer
    from trl_prefix_dpo import TREE, PrefixDPOTrainer, attend

    import megatron_prefix as mp

    def broken(*args, tree_row, **kwargs):
        plan = tree_row.plan
        chain = mp.TreeLayout.from_parents([plan.num_queries], [-1])
        row = type(tree_row)(**{**vars(tree_row), "plan": mp.TreePlan(chain, plan.device)})
        return attend(*args, tree_row=row, **kwargs)

    theirs = history(make_trainer(DPOTrainer, hf, pairs, tmp_path / "theirs"))
    trainer = make_trainer(PrefixDPOTrainer, hf, pairs, tmp_path / "ours")
    AttentionInterface.register(TREE, broken)
    try:
        ours = history(trainer)
    finally:
        AttentionInterface.register(TREE, attend)
    with pytest.raises(AssertionError):
        assert_same_steps(ours, theirs)


def test_models_run_the_row_and_the_reference_too(hf, pairs, tmp_path):
    """Each prompt goes through a model once, except its last token."""
    from trl_prefix_dpo import PrefixDPOTrainer

    trainer = make_trainer(PrefixDPOTrainer, hf, pairs, tmp_path, precompute_ref_log_probs=True)
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    padded = batch["input_ids"].numel()
    trainer.compute_loss(trainer.model, batch)
    trainer.compute_ref_log_probs(trainer.model, batch)
    assert len(seen) == 2 and all(shape[0] == 1 for shape in seen)
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(1)
    unshared = int(batch["attention_mask"].sum())
    half = len(prompts) // 2
    assert seen[0][1] <= unshared - int(prompts[:half].sum()) + half < padded


def test_evaluation_with_logits_is_that_of_trl(hf, pairs, tmp_path):
    """TRL's extra pass for logits is an ordinary batch."""
    from trl import DPOTrainer
    from trl_prefix_dpo import PrefixDPOTrainer

    outputs = []
    for kind in (DPOTrainer, PrefixDPOTrainer):
        trainer = make_trainer(kind, hf, pairs[:4], tmp_path / kind.__name__)
        batch = next(iter(trainer.get_train_dataloader()))
        outputs.append(trainer.prediction_step(trainer.model, batch, prediction_loss_only=False))
    for a, b in zip(*(x[:2] for x in outputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"padding_free": True}, {"use_liger_kernel": True}, {"pad_to_multiple_of": 8}]
)
def test_unsupported_options_are_refused_by_name(change, hf, pairs, tmp_path):
    from trl_prefix_dpo import PrefixDPOTrainer

    with pytest.raises(
        ValueError, match=f"{next(iter(change))}={next(iter(change.values()))} is not supported"
    ):
        make_trainer(PrefixDPOTrainer, hf, pairs, tmp_path, **change)
