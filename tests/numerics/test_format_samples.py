"""A sample of every format goes the whole way: build, inspect --verify, one training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_real_sets import first_step

from megatron_prefix.__main__ import main
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "formats"
FOUND = {  # format, groups, responses, pairs
    "hh": ("hh", 2, 4, 2),
    "trl_text": ("trl", 2, 4, 2),
    "trl_messages": ("trl", 2, 4, 2),
    "trl_implicit_prompt": ("hh", 2, 4, 2),
    "ultrafeedback_binarized": ("trl", 2, 4, 2),
    "unpaired": ("unpaired", 2, 2, 0),
    "ms_swift_response": ("ms-swift", 2, 4, 2),
    "ms_swift_messages": ("ms-swift", 2, 4, 2),
    "nemo_rl": ("nemo-rl", 2, 5, 4),
    "nemo_aligner": ("nemo-aligner", 2, 4, 2),
    "llama_factory_alpaca": ("alpaca", 2, 4, 2),
    "llama_factory_sharegpt": ("sharegpt", 2, 4, 2),
    "ultrafeedback": ("ultrafeedback", 2, 6, 6),
    "oasst": ("oasst", 2, 7, 5),
    "question_system": ("question", 2, 4, 2),
    "question_distilabel": ("question", 2, 4, 2),
    "question_stackexchange": ("question", 2, 4, 2),
    "question_accepted": ("question", 2, 4, 2),
    "ms_swift_query": ("question", 2, 4, 2),
    "unpaired_query": ("unpaired-alpaca", 2, 2, 0),
    "messages_object": ("messages", 2, 4, 2),
    "messages_text": ("messages", 2, 4, 2),
    "sharegpt_role_content": ("sharegpt", 2, 4, 2),
    "ultrainteract": ("ultrainteract", 2, 4, 2),
    "trl_text_prompt_messages": ("trl", 2, 4, 2),
    "trl_message_prompt_texts": ("trl", 2, 4, 2),
    "trl_text_parts": ("trl", 2, 4, 2),
    "trl_json_texts": ("trl", 2, 4, 2),
    "trl_transposed": ("hh", 2, 4, 2),
    "trl_json_tools": ("trl", 2, 4, 2),
    "ms_swift_lists": ("ms-swift", 2, 6, 4),
    "ms_swift_tools": ("ms-swift", 2, 4, 2),
    "nemo_rl_scores": ("nemo-rl", 2, 4, 2),
    "nectar": ("ranked", 2, 5, 4),
    "ranked_parallel": ("ranked", 2, 4, 2),
    "helpsteer2": ("ranked", 2, 4, 2),
    "helpsteer2_preference": ("choice", 2, 4, 2),
    "helpsteer3_preference": ("choice", 2, 4, 2),
    "pku_saferlhf": ("choice", 2, 4, 2),
    "alpaca_farm": ("choice", 2, 4, 2),
    "chatbot_arena": ("arena", 2, 4, 2),
    "arena_votes": ("arena-votes", 2, 4, 2),
    "summarize_from_feedback": ("summaries", 2, 4, 2),
    "webgpt": ("webgpt", 2, 4, 2),
    "rlhf_v": ("rlhf-v", 2, 4, 2),
    "shp": ("shp", 2, 4, 2),
    "oasst_messages": ("oasst", 2, 4, 2),
    "unpaired_number": ("unpaired", 2, 2, 0),
    "unpaired_messages": ("unpaired-messages", 2, 2, 0),
    "unpaired_sharegpt": ("unpaired-messages", 2, 2, 0),
    "unpaired_alpaca": ("unpaired-alpaca", 2, 2, 0),
}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer with a chat template that knows tools."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([(SAMPLES / "oasst.jsonl").read_text(encoding="utf-8")], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def test_every_sample_is_tried():
    assert {path.stem for path in SAMPLES.iterdir()} == FOUND.keys()


@pytest.mark.parametrize("name", FOUND)
def test_sample(name, tokenizer, tmp_path, capsys):
    prefix = str(tmp_path / name)
    source = ["--input", str(SAMPLES / f"{name}.jsonl"), "--tokenizer", str(tokenizer)]
    assert main(["build", *source, "--output", prefix]) == 0
    assert main(["inspect", prefix, "--verify", "--json"]) == 0
    assert "warning" not in capsys.readouterr().out
    dataset = PreferenceDataset(prefix)
    report, counts = dataset.manifest["report"], dataset.manifest["counts"]
    assert (report["dropped"], report["wrong"]["num_records"]) == ({}, 0)
    format_and_counts = (
        report["format"],
        *(counts[key] for key in ("groups", "responses", "pairs")),
    )
    assert format_and_counts == FOUND[name]
    forced = str(tmp_path / "forced")
    assert main(["build", *source, "--output", forced, "--format", format_and_counts[0]]) == 0
    assert PreferenceDataset(forced).fingerprint == dataset.fingerprint
    if not counts["pairs"]:
        with pytest.raises(InputError, match=r"data\.train: .* has 2 responses and no pair"):
            first_step(prefix, tmp_path / "run")
        return
    row = first_step(prefix, tmp_path / "run")
    assert abs(row["loss"] - math.log(2)) < 1e-5
    assert row["num_pairs"] == counts["pairs"]


def test_merged_prompts_are_trained_by_records(tokenizer, tmp_path):
    """Three records, two of one prompt: batches of two records, losses as without merging."""
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": " no"}
        for prompt, chosen in (("One is", " odd"), ("Two is", " even"), ("One is", " a number"))
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prefix = str(tmp_path / "merged")
    source = ["--input", str(path), "--tokenizer", str(tokenizer), "--output", prefix]
    assert main(["build", *source, "--merge-prompts"]) == 0
    assert main(["inspect", prefix, "--verify"]) == 0
    dataset = PreferenceDataset(prefix)
    assert dataset.group_num_records.tolist() == [2, 1]
    row = first_step(prefix, tmp_path / "run")
    assert abs(row["loss"] - math.log(2)) < 1e-5 and row["num_pairs"] in (1, 2, 3)
