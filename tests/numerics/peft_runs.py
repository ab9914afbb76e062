"""PEFT on plain torch, one sequence at a time, as the judge of runs with adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETA = 0.1


@dataclass(frozen=True)
class PlainRun:
    """Loss, gradient norm and log-probabilities of all responses at each step, and the end."""

    losses: list[float]
    grad_norms: list[float]
    logps: list[list[float]]
    weights: dict[str, Tensor]
    """By the names of the adapter's file."""


def make_model(directory: Path, kind: str = "llama", **sizes: object) -> Path:
    """Save a random Hugging Face model and a byte tokenizer; the same every time."""
    from trl_common import make_tokenizer

    make_tokenizer(directory)
    parts: dict = {"vocab_size": 258, "hidden_size": 48, "intermediate_size": 80}
    parts |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    parts |= {"max_position_embeddings": 4096, "initializer_range": 0.12}
    parts |= {"bos_token_id": None, "pad_token_id": 256, "eos_token_id": 257}
    parts |= {"tie_word_embeddings": kind == "qwen2"}
    config = transformers.AutoConfig.for_model(kind, **{**parts, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def make_adapter(model: Path, directory: Path, **settings: object) -> Path:
    """Save a random adapter of `model`, whose B is not zero."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    adapted = peft.get_peft_model(base_of(model), peft.LoraConfig(**{**given, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "modules_to_save" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(directory)
    return directory


def base_of(model: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def plain_run(
    model: Path,
    adapter: Path,
    pairs: list[dict[str, str]],
    steps: int,
    lr: float,
    reference: str = "base",
) -> PlainRun:
    """DPO over all pairs in every step, from `adapter`; `reference` is as in lora.reference."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    adapted = peft.PeftModel.from_pretrained(base_of(model), adapter, is_trainable=True)

    def logp(prompt: str, response: str) -> Tensor:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, response))
        tokens = torch.tensor([before + after + [tokenizer.eos_token_id]])
        logps = adapted(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
        return logps[0].gather(1, tokens[0, 1:, None])[len(before) - 1 :].double().sum()

    def both(pair: dict[str, str]) -> Tensor:
        return torch.stack([logp(pair["prompt"], pair[side]) for side in ("chosen", "rejected")])

    with torch.no_grad():
        if reference == "base":
            with adapted.disable_adapter():
                known = [both(pair) for pair in pairs]
        else:
            known = [both(pair) for pair in pairs]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms, logps = [], [], []
    for _ in range(steps):
        optimizer.zero_grad()
        value, own = 0.0, []
        for pair, ref in zip(pairs, known, strict=True):
            scores = both(pair)
            chosen, rejected = BETA * (scores - ref)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected) / len(pairs)
            loss.backward()
            value += loss.item()
            own += scores.tolist()
        losses.append(value)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        logps.append(own)
        optimizer.step()
    weights = peft.get_peft_model_state_dict(adapted)
    return PlainRun(losses, norms, logps, {k: x.detach().clone() for k, x in weights.items()})


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path
