"""The first-step check in bfloat16 with a reference that another layout scored: sound runs pass,
although a model that knows its answers has small log-probabilities and large logits; a wrong
boundary does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure, trained

from megatron_prefix.config import Config
from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.train.run import train
from megatron_prefix.train.scoring import score_reference


def knows_its_answers(folder: Path, data: str, steps: int = 120) -> Path:
    """A Hugging Face Llama in bfloat16 that gives every response of `data` a probability near 1,
    so that log-probabilities are small and logits are not."""
    transformers = pytest.importorskip("transformers")
    dataset = PreferenceDataset(data)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=dataset.vocab_size,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        losses = []
        for group in range(len(dataset)):
            tree = dataset[group]
            for response in range(tree.num_responses):
                tokens, start = tree.response_tokens(response)
                labels = torch.from_numpy(tokens.astype(np.int64))[None]
                logps = model(labels).logits.log_softmax(-1)[0, :-1]
                losses.append(-logps.gather(1, labels[0, 1:, None])[start - 1 :].mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


OF_ANOTHER_LAYOUT = {
    "pair": {"data": {"sharing": "pair"}},
    "unpacked": {
        "data": {"sharing": "none", "packing": False, "micro_batch_size": 4, "row_capacity": None}
    },
    "dense": {"model": {"attention_backend": "dense"}},
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Callable[..., Config]:
    """A run in bfloat16 from such a model, with a reference that trees in rows scored; in the
    layout of other settings."""
    folder = tmp_path_factory.mktemp("scored")
    records = [  # every answer follows from its own prompt, so a model can learn all of them
        {"prompt": f"{a}{b}:", "chosen": f"{b}{a}{a}", "rejected": f"{a}{b}{b}."}
        for a, b in ("pq", "xy", "mn", "st")
    ]
    (folder / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    build_dataset([folder / "few.jsonl"], "bytes", folder / "few", BuildOptions())
    model = knows_its_answers(folder / "model", str(folder / "few"))
    sizes = {"num_layers": None, "hidden_size": None, "ffn_hidden_size": None}
    sizes |= {"num_attention_heads": None, "num_query_groups": None}

    def make(output: Path, reference: bool = True, **sections: dict) -> Config:
        own = {"hf": str(model), "dtype": "bfloat16", **sizes, **sections.pop("model", {})}
        loss = {"reference": "precomputed", "ref_logps": str(folder / "ref")} if reference else {}
        train = {"steps": 1}
        data = str(folder / "few")
        return configure(output, data, model=own, loss=loss, train=train, **sections)

    score_reference(make(folder / "score", reference=False), str(folder / "ref"))
    return make


@pytest.mark.parametrize("layout", OF_ANOTHER_LAYOUT)
def test_a_reference_of_another_layout_does_not_stop_bfloat16(scored, tmp_path, layout):
    first = trained(scored(tmp_path, **OF_ANOTHER_LAYOUT[layout]))[0]
    assert abs(first["logps/chosen"]) < 1, "the model does not know its answers"


def test_a_wrong_boundary_stops_bfloat16(scored, tmp_path, monkeypatch):
    """Each response sees the last three tokens of the one before it."""
    sound = TreeLayout.from_parents.__func__

    def leaky(cls, lengths, parents):
        layout = sound(cls, lengths, parents)
        ends = np.where(layout.parents >= 0, layout.subtree_ends + 3, layout.subtree_ends)
        return dataclasses.replace(layout, subtree_ends=ends.clip(max=layout.num_tokens))

    monkeypatch.setattr(TreeLayout, "from_parents", classmethod(leaky))
    with pytest.raises(RunError, match="the first loss is"):
        train(scored(tmp_path, model={"attention_backend": "dense"}))
