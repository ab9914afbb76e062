"""What has to hold on any device: runs that must follow one another, a model against itself with
every response alone, and transformers. test_device_checks.py has it on CPU, test_numerics_cuda.py
on CUDA; both run where torch puts a run by itself."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_prefix.config import parse_config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.testing import random_group
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.run import train

sys.path.append(str(Path(__file__).resolve().parents[1] / "numerics"))
from small_models import EXACT, VOCAB, chain, outcome, pack, random_model  # noqa: E402

STEPS = 8
PACKED = {"row_capacity": 1024}
LAYOUTS = {
    "tree": {"sharing": "tree", **PACKED},
    "tree, small rows": {"sharing": "tree", "row_capacity": 128},
    "pair": {"sharing": "pair", **PACKED},
    "response": {"sharing": "response", **PACKED},
    "none": {"sharing": "none", **PACKED},
    "unpacked": {"sharing": "none", "packing": False, "micro_batch_size": 2},
}
MODELS = {
    "chunked head": {"lm_head_chunk_size": 16},
    "recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
LORA = {"r": 4, "lora_alpha": 64}
TOLERANCES = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-5, "rewards/margins": 1e-3},
    "bfloat16": {"loss": 2e-2, "grad_norm": 3e-2, "rewards/margins": 3e-2},
}
LEAST = {"float32": 0.1, "bfloat16": 1.0}
"""Largest differences over max(LEAST, |the other's value|): in float32 as in docs/design.md, in
bfloat16 some four times what layouts on CPU have been seen to differ by."""
HF_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of a response's log-probability, relative if it exceeds 1."""


def write_decided_set(prefix: Path, num_groups: int = 24, seed: int = 3) -> str:
    """Groups of three responses of which one is better than both others.

    No response is chosen as often as it is rejected, whose gradient at the first step is 0 in one
    layout and rounding in another, which Adam would make equally large.
    """
    rng = np.random.default_rng(seed)
    with DatasetWriter(prefix, load_tokenizer("bytes").describe()) as writer:
        for record in range(num_groups):
            prompt = rng.integers(0, 256, int(rng.integers(8, 40)))
            first = rng.permutation(256)[:3]
            paths = [
                ResponsePath(
                    tokens=np.concatenate(
                        [prompt, [own], rng.integers(0, 256, int(rng.integers(3, 14)))]
                    ),
                    loss_start=len(prompt),
                )
                for own in first
            ]
            writer.add(build_tree(paths, [Pair(chosen=0, rejected=x) for x in (1, 2)]), record)
        writer.finish()
    return str(prefix)


def trained(
    output: Path, train_set: str, layout: str, lora: dict | None = None, **model
) -> list[dict]:
    """Train in this process and return the run's lines; with `lora`, adapters."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 160,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "init_method_std": 0.05,
    }
    config = {
        "data": {"train": train_set, "global_batch_size": 6, **LAYOUTS[layout]},
        "model": {**sizes, **model},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": STEPS},
        "logging": {"output": str(output)},
        **({} if lora is None else {"lora": lora}),
    }
    train(parse_config(config))
    return [json.loads(x) for x in (output / "metrics.jsonl").read_text("utf-8").splitlines()]


def assert_follows(metrics: list[dict], expected: list[dict], dtype: str) -> None:
    """One trajectory, within the tolerances of `dtype`."""
    assert len(metrics) == len(expected) == STEPS
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["num_pairs"] == theirs["num_pairs"]
        for key, tolerance in TOLERANCES[dtype].items():
            error = abs(ours[key] - theirs[key]) / max(LEAST[dtype], abs(theirs[key]))
            assert error <= tolerance, f"step {ours['step']}, {key}: {ours[key]} {theirs[key]}"


def assert_learns(lines: list[dict]) -> None:
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"], "the run has to learn something"


def check_alone(world, backend: str, **settings) -> None:
    """In float64: packed trees have the log-probabilities and gradients of each response alone."""
    rng = np.random.default_rng(11)
    groups = [random_group(rng, vocab_size=VOCAB) for _ in range(3)]
    rows = [chain(path.tokens, path.loss_start) for paths, _ in groups for path in paths]
    expected = outcome(random_model(world, attention_backend="dense"), rows)
    model = random_model(world, attention_backend=backend, **settings)
    assert next(model.parameters()).device.type == world.device.type
    packed = outcome(model, [pack([build_tree(*group) for group in groups])])
    assert max(packed.errors(expected)) < EXACT


def small_llama(directory: Path):
    """A random model of transformers, saved; in evaluation mode, on CPU in float32."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=270,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def check_hf(folder: Path, train_set: str, **model) -> None:
    """Packed and shared, responses score as in transformers on CPU, where each runs alone."""
    theirs_model, dataset = small_llama(folder / "hf"), PreferenceDataset(train_set)
    config = {
        "data": {
            "train": train_set,
            "valid": train_set,
            "global_batch_size": 6,
            **LAYOUTS["tree"],
        },
        "model": {"hf": str(folder / "hf"), **model},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1},
        "logging": {"output": str(folder / "run")},
    }
    config = parse_config(config)
    evaluate(config, None, str(folder / "scored.jsonl"))
    lines = (folder / "scored.jsonl").read_text("utf-8").splitlines()
    ours = np.array([json.loads(line)["logp"] for line in lines])
    theirs = []
    for tree in (dataset[group] for group in range(len(dataset))):
        for response in range(tree.num_responses):
            tokens, start = tree.response_tokens(response)
            ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
            logps = theirs_model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            theirs.append(float(logps.gather(1, ids[0, start:, None]).sum()))
    error = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
    assert error.max() <= HF_TOLERANCES[config.model.dtype], error.max()
