"""Reward models in and out: transformers' `…ForSequenceClassification` is the judge.

Random small models of every architecture are imported, score real preferences packed and shared,
are trained, and go out again; transformers scores each response from the exported files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_hf_parity import (
    KINDS,
    SIZES,
    assert_same_tensors,
    few,
    make,
    responses,
    run_config,
    tensors_of,
)

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.errors import InputError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.run import train

TOLERANCE = 1e-5
"""Of a score, relative if it exceeds 1."""
PAD = 260  # beyond the data's 258 tokens


@pytest.fixture(scope="session")
def hh(data_dir, tmp_path_factory) -> str:
    """PREFIX of 8 HH-RLHF pairs of at most 300 bytes a path."""
    return few(data_dir / "hh_pairs.jsonl.gz", tmp_path_factory.mktemp("hh8"), 8, 300, 300)


def make_reward(kind: str, directory: Path, dtype=torch.float32, **more) -> Path:
    """Save a random reward model whose norms and biases are off 1 and 0; the same every time."""
    name, parts = KINDS[kind]
    parts = {**SIZES, **parts, "num_labels": 1, "pad_token_id": PAD, **more}
    config = transformers.AutoConfig.for_model(name, **parts)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path) -> torch.nn.Module:
    """A reward model as transformers loads it, without a key missing or left over."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 1
    return model.eval()


@torch.no_grad()
def judged(directory: Path, prefix: str, batch_size: int = 1) -> np.ndarray:
    """Score of every response by transformers, in batches padded on the right."""
    model, scores = load(directory), []
    paths = [torch.from_numpy(tokens.astype(np.int64)) for tokens, _ in responses(prefix)]
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        padded = torch.nn.utils.rnn.pad_sequence(batch, True, model.config.pad_token_id or 0)
        lengths = torch.tensor([len(path) for path in batch])[:, None]
        mask = torch.arange(padded.size(1))[None] < lengths
        scores += model(padded, attention_mask=mask.long()).logits.squeeze(1).tolist()
    return np.array(scores)


def scored(config, output: Path, load: str | None = None) -> np.ndarray:
    """Our rewards, packed and shared, by way of `evaluate --per-response`."""
    file = output / "scored.jsonl"
    evaluate(config, load, str(file))
    return np.array([json.loads(line)["reward"] for line in file.read_text().splitlines()])


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape and len(np.unique(theirs.round(3))) > len(theirs) // 2
    return float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_is_imported_trained_and_exported(kind, hh, tmp_path):
    """Scores in, straight and through a checkpoint; scores out, after three steps."""
    directory = make_reward(kind, tmp_path / "hf")
    import_hf(str(directory), tmp_path / "ck")
    theirs = judged(directory, hh)
    for origin in ({"checkpoint": str(tmp_path / "ck")}, {"hf": str(directory)}):
        config = run_config(tmp_path, hh, kind="reward", **origin)
        assert worst(scored(config, tmp_path), theirs) < TOLERANCE
    train(config)
    export_hf(tmp_path / "run" / "saved", tmp_path / "out", 10**9)
    trained = judged(tmp_path / "out", hh)
    saved = str(tmp_path / "run" / "saved")
    assert worst(scored(config, tmp_path, load=saved), trained) < TOLERANCE
    assert np.abs(trained - theirs).max() > 100 * TOLERANCE, "training moved nothing"
    assert worst(judged(tmp_path / "out", hh, batch_size=8), trained) < TOLERANCE
    import_hf(str(tmp_path / "out"), tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "back", 10**9)
    assert_same_tensors(tmp_path / "out", tmp_path / "back")
    assert "score.weight" in tensors_of(tmp_path / "back")


@pytest.mark.parametrize("kind", ["llama 3", "mistral", "qwen2", "qwen3"])
def test_a_language_model_becomes_a_reward_model(kind, hh, tmp_path, capsys):
    """Trained from a causal model, tied or not; the architecture that leaves is the classifier."""
    directory = make(kind, tmp_path / "hf", pad_token_id=PAD)
    config = run_config(tmp_path, hh, kind="reward", hf=str(directory))
    train(config)
    assert "is a language model: the reward head is drawn from train.seed" in (
        capsys.readouterr().out
    )
    export_hf(tmp_path / "run" / "saved", tmp_path / "out", 10**9)
    given = json.loads((tmp_path / "out" / "config.json").read_text())
    name = KINDS[kind][0].capitalize()
    assert given["architectures"] == [f"{name}ForSequenceClassification"]
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    ours = scored(config, tmp_path, load=str(tmp_path / "run" / "saved"))
    assert worst(ours, judged(tmp_path / "out", hh, batch_size=8)) < TOLERANCE


def test_bfloat16_is_exported_as_bfloat16(hh, tmp_path):
    directory = make_reward("llama 3", tmp_path / "hf", torch.bfloat16)
    config = run_config(tmp_path, hh, kind="reward", hf=str(directory), dtype="bfloat16")
    train(config)
    done = export_hf(tmp_path / "run" / "saved", tmp_path / "out", 10**9)
    assert done.dtypes == ("bfloat16",)
    before, after = (tensors_of(x)["score.weight"] for x in (directory, tmp_path / "out"))
    assert after.dtype == torch.bfloat16 and not torch.equal(before, after)
    ours = scored(config, tmp_path, load=str(tmp_path / "run" / "saved"))
    assert np.abs(ours - judged(tmp_path / "out", hh)).max() < 0.05  # theirs in float32


def test_a_model_from_sizes_is_exported_as_a_classifier(random_set, tmp_path, capsys):
    sizes = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4}
    config = run_config(tmp_path, random_set, kind="reward", **sizes, init_method_std=0.2)
    train(config)
    assert (
        main(
            ["convert", "export", "--load", str(tmp_path / "run" / "saved"), "--hf"]
            + [str(tmp_path / "out")]
        )
        == 0
    )
    assert "pad_token_id is null" in capsys.readouterr().out
    ours = scored(config, tmp_path, load=str(tmp_path / "run" / "saved"))
    assert worst(ours, judged(tmp_path / "out", random_set)) < TOLERANCE


def test_what_is_not_supported_is_refused(hh, tmp_path):
    reward = make_reward("qwen2", tmp_path / "reward")
    with pytest.raises(InputError, match="is a reward model without a language-model head"):
        train(run_config(tmp_path, hh, hf=str(reward)))
    two = make_reward("llama 3", tmp_path / "two", num_labels=2)
    with pytest.raises(InputError, match="a sequence classifier with 2 labels"):
        train(run_config(tmp_path, hh, kind="reward", hf=str(two)))
    headless = make("llama 3", tmp_path / "headless")
    config = json.loads((headless / "config.json").read_text())
    names = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}
    (headless / "config.json").write_text(json.dumps(config | names))
    with pytest.raises(InputError, match=r"tensor score\.weight is missing"):
        train(run_config(tmp_path, hh, kind="reward", hf=str(headless)))
