"""A reward model scores texts as transformers does, and accuracies of subsets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from small_runs import configure

from megatron_prefix.__main__ import main
from megatron_prefix.data import BuildOptions, build_dataset
from megatron_prefix.errors import InputError
from megatron_prefix.train.accuracies import accuracies_of_subsets, read_subsets
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.scoring import score_reference
from megatron_prefix.train.texts import read_texts, score_texts

SIZES = {
    "vocab_size": 270,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "num_labels": 1,
    "pad_token_id": 260,
}
NO_SIZES = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
)
TEXTS = [
    {"prompt": "How are you?", "response": " Well."},
    {"prompt": "a", "response": "b"},
    {"prompt": "How are you?", "response": " Well."},
    {
        "prompt": [{"role": "user", "content": "Hi"}],
        "response": [{"role": "assistant", "content": "Hello"}],
    },
]
BOS, EOS = 256, 257
PAIRS = [
    {
        "prompt": f"question {i}",
        "chosen": f" good {i}",
        "rejected": f" bad answer {i}",
        "kind": kind,
    }
    for i, kind in enumerate(["chat", "code", "chat", "code", "chat"])
]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("subsets") / "pairs.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in PAIRS))
    return path


@pytest.fixture(scope="module")
def data(records) -> str:
    build_dataset([records], "bytes", records.parent / "set", BuildOptions(ignored=("kind",)))
    return str(records.parent / "set")


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForSequenceClassification(config)
    folder = tmp_path_factory.mktemp("reward") / "hf"
    model.save_pretrained(folder)
    return str(folder)


def reward_config(folder: Path, data: str, hf: str, **sections):
    return configure(
        folder,
        data,
        model=NO_SIZES | {"kind": "reward", "hf": hf},
        data={"valid": data, **sections.pop("data", {})},
        **sections,
    )


def as_tokens(record: dict) -> list[int]:
    prompt, response = record["prompt"], record["response"]
    if not isinstance(prompt, str):
        prompt = f"\n\nHuman: {prompt[0]['content']}\n\nAssistant:"
        response = f" {response[0]['content']}"
    return [BOS, *(prompt + response).encode(), EOS]


def test_rewards_of_texts_are_those_of_transformers(data, hf, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in TEXTS))
    config = reward_config(tmp_path / "run", data, hf)
    scored = score_texts(config, None, str(path))
    model = transformers.LlamaForSequenceClassification.from_pretrained(hf).eval()
    for number, (own, record) in enumerate(zip(scored, TEXTS, strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor([as_tokens(record)])).logits.item()
        assert own["text"] == number and own["reward"] == pytest.approx(expected, abs=1e-5)
    written = tmp_path / "run.yaml"
    written.write_text(config.to_yaml())
    capsys.readouterr()
    assert main(["evaluate", "--config", str(written), "--texts", str(path)]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert lines == scored


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}', "line 1: expected"),
        ('{"prompt": "a", "response": "b", "id": 1}', "line 1: expected"),
        ("", "the file is empty"),
    ],
)
def test_texts_that_are_refused(tmp_path, text, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_texts(str(path))


def test_a_language_model_scores_no_texts(data, tmp_path):
    with pytest.raises(InputError, match="only a reward model scores texts"):
        score_texts(configure(tmp_path, data), None, "texts.jsonl")


def test_accuracies_of_subsets(records, data, hf, tmp_path):
    config = reward_config(tmp_path / "run", data, hf)
    metrics = evaluate(config, None, None, (str(records), "kind"))
    chat, code = (metrics[f"rewards/accuracies/subset/{x}"] for x in ("chat", "code"))
    # 3 pairs of chat and 2 of code
    assert metrics["rewards/accuracies"] == pytest.approx((3 * chat + 2 * code) / 5)
    assert metrics["rewards/accuracies/subsets"] == pytest.approx((chat + code) / 2)


def test_subsets_by_hand(tmp_path):
    means = accuracies_of_subsets(["b", "a", "b"], torch.tensor([1.0, 0.5, 0.0]), "dpo")
    assert means == {
        "rewards/accuracies/subset/a": 0.5,
        "rewards/accuracies/subset/b": 0.5,
        "rewards/accuracies/subsets": 0.5,
    }
    with pytest.raises(InputError, match="no accuracy of pairs"):
        accuracies_of_subsets(["a"], None, "kto")
    path = tmp_path / "few.jsonl"
    path.write_text('{"kind": "x"}\n{"kind": 3}\n')
    assert read_subsets(str(path), "kind", 1) == ["x", "3"]
    with pytest.raises(InputError, match="line 1: other is None"):
        read_subsets(str(path), "other", 1)
    with pytest.raises(InputError, match="several data.valid"):
        read_subsets(str(path), "kind", 2)


def test_a_file_of_fewer_records_is_refused(data, hf, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"kind": "x"}\n')
    with pytest.raises(InputError, match="has 1 record, and"):
        evaluate(reward_config(tmp_path / "run", data, hf), None, None, (str(path), "kind"))


def test_score_refuses_what_train_would(data, tmp_path):
    """Margins that the data lacks, a warm-up longer than the run: before anything is scored."""
    sections = {"loss": {"loss_type": "sigmoid", "margin": True}}
    with pytest.raises(InputError, match="no margin"):
        score_reference(configure(tmp_path, data, **sections), str(tmp_path / "ref"))
    slow = {"optimizer": {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 50}}
    with pytest.raises(InputError, match="lr_wsd_decay_steps"):
        score_reference(configure(tmp_path, data, **slow), str(tmp_path / "ref"))
    assert not (tmp_path / "ref").exists()


def test_a_batch_of_more_groups_than_there_are_is_told(data, tmp_path, capsys):
    from megatron_prefix.train.run import train

    train(configure(tmp_path / "run", data, data={"global_batch_size": 64}, train={"steps": 1}))
    assert "data.global_batch_size = 64 and data.train has 5 groups" in capsys.readouterr().out
