"""Sample answers and the profiler's window: exact, and without a trace in the training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_runs import configure, saved_weights, timeless, trained

from megatron_prefix.engine.generation import drawn
from megatron_prefix.errors import InputError
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.run import train
from megatron_prefix.train.samples import read_prompts

NUM_TOKENS = 12
PROMPTS = [
    "Hello",
    [{"role": "user", "content": "What is a tree?"}],
    "a much longer prompt, so that rows hold sequences of unlike length",
    "Hello",
]
SIZES = {
    "vocab_size": 270,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
BOS = 256


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("generate") / "set", 0, 12)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in PROMPTS) + "\n")
    return str(path)


def generation(prompts: str, **more) -> dict:
    return {"prompts": prompts, "every": 2, "max_new_tokens": NUM_TOKENS, **more}


def answers(output: Path) -> list[dict]:
    text = (output / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def as_tokens(prompt: object) -> list[int]:
    """As `build` would begin the path of a response, for the tokenizer of bytes."""
    if not isinstance(prompt, str):
        prompt = f"\n\nHuman: {prompt[0]['content']}\n\nAssistant:"
    return [BOS, *prompt.encode()]


@pytest.mark.parametrize("capacity", [4096, 130])
def test_greedy_answers_are_those_of_transformers(data, prompts, tmp_path, capacity):
    """With all sequences in one row, and in rows of one or two."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, eos_token_id=[65, 70])
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    settings = {"hf": str(tmp_path / "hf")}
    sections = {
        "model": {"num_layers": None, "hidden_size": None, "ffn_hidden_size": None}
        | {"num_attention_heads": None, "num_query_groups": None, **settings},
        "data": {"row_capacity": capacity},
        "train": {"steps": 1, "generate": generation(prompts)},
    }
    train(configure(tmp_path / "run", data, **sections))
    first = [x for x in answers(tmp_path / "run") if x["step"] == 0]
    assert [x["prompt"] for x in first] == list(range(len(PROMPTS)))
    for record, prompt in zip(first, PROMPTS, strict=True):
        ids = torch.tensor([as_tokens(prompt)])
        with torch.no_grad():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                eos_token_id=[65, 70, 257],
                pad_token_id=0,
            )[0]
        expected = whole[ids.shape[1] :].tolist()
        assert record["num_tokens"] == len(expected) and record["text"] == prompt
        ended = expected[-1] in (65, 70, 257)
        assert record["ended"] == ended
        kept = expected[:-1] if ended else expected
        assert record["answer"] == _decoded(kept)


def _decoded(ids: list[int]) -> str:
    from megatron_prefix.data.tokenize import load_tokenizer

    return load_tokenizer("bytes").decode(ids)


def test_training_is_the_same_with_and_without(data, prompts, tmp_path):
    """Every metric and every weight, bit for bit, with drawn answers and a profile."""
    results = []
    for name, more in (
        ("plain", {}),
        ("watched", {"generate": generation(prompts, temperature=0.9), "profile": [2, 3]}),
    ):
        saved = str(tmp_path / name / "saved")
        settings = {"steps": 4, "save": saved, "eval_interval": 2, **more}
        config = configure(
            tmp_path / name, data, data={"train": data, "valid": data}, train=settings
        )
        lines = trained(config)
        results.append((timeless(lines), saved_weights(saved, 4)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], x) for k, x in results[1][1].items())
    records = answers(tmp_path / "watched")
    assert sorted({x["step"] for x in records}) == [0, 2, 4]
    assert [x["kind"] for x in records[:2]] == ["greedy", "sampled"]
    with gzip.open(tmp_path / "watched" / "profile.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names


def test_a_resumed_run_removes_later_answers(data, prompts, tmp_path):
    saved = str(tmp_path / "saved")
    base = {"save": saved, "load": saved, "save_interval": 2, "generate": generation(prompts)}
    train(configure(tmp_path / "run", data, train=base | {"steps": 4}))
    whole = answers(tmp_path / "run")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    for folder in (tmp_path / "saved").glob("iter_*4"):
        folder.rename(tmp_path / "gone")
    train(configure(tmp_path / "run", data, train=base | {"steps": 4}))
    assert answers(tmp_path / "run") == whole


def test_tokens_are_drawn_by_cumulative_probability():
    logits = torch.tensor([[0.2, 0.5, 0.3]] * 5).log()
    shares = [0.0, 0.19, 0.6, 0.71, 0.999999]
    assert drawn(logits, 1.0, shares).tolist() == [0, 0, 1, 2, 2]
    assert drawn(logits[1:], 0.01, shares[1:]).tolist() == [1] * 4


def test_drawn_tokens_have_their_probabilities():
    rng = np.random.default_rng(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(4000, 4)
    counts = torch.bincount(drawn(logits, 0.7, rng.random(4000).tolist()), minlength=4)
    expected = torch.softmax(logits[0] / 0.7, 0)
    assert torch.allclose(counts / 4000, expected, atol=0.03)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": 3}', "line 1: prompt must be a text"),
        ('{"prompt": []}', "line 1: prompt must be a text"),
        ('{"prompt": [{"role": "user"}]}', "line 1: prompt must be a text"),
        ('{"prompt": "a", "id": 1}', "line 1: expected"),
        ('\n\n{"prompt": "a"}\nno', "line 4: expected"),
        ("", "0 prompts: give 1 to 256"),
        ('{"prompt": "a"}\n' * 257, "257 prompts"),
    ],
)
def test_prompts_that_are_refused(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"generate": {"max_new_tokens": 5000}}, r"fit data\.row_capacity = 4096"),
        ({"profile": [3, 2]}, "give the first and the last step"),
        ({"profile": [1, 200]}, "at most 100 steps"),
        ({"profile": [2, 9]}, "the run has 4 steps"),
    ],
)
def test_settings_that_are_refused(data, prompts, tmp_path, settings, message):
    if "generate" in settings:
        settings = {"generate": generation(prompts) | settings["generate"]}
    with pytest.raises(InputError, match=message):
        train(
            configure(
                tmp_path / "run",
                data,
                data={"row_capacity": 4096},
                train={"steps": 4, **settings},
            )
        )


def test_a_reward_model_writes_no_text(data, prompts, tmp_path):
    with pytest.raises(InputError, match="writes no text"):
        configure(
            tmp_path,
            data,
            model={"kind": "reward"},
            train={"steps": 4, "generate": generation(prompts)},
        )
