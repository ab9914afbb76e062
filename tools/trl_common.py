"""Helpers of the comparisons with TRL: settings, outcomes, a model, and pairs of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.data.read import ExampleReader, Inputs
from megatron_prefix.data.read.formats import DegenerateRecord
from megatron_prefix.errors import InputError

OLDEST_TRL = (1, 16)

TextPair = dict[str, str | float]
"""Keys prompt, chosen, rejected, and margin if margins are used."""


def has_trl() -> bool:
    """Whether a TRL is installed that has all settings of the comparisons."""
    try:
        installed = version("trl")
    except PackageNotFoundError:
        return False
    return tuple(map(int, installed.split(".")[:2])) >= OLDEST_TRL


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of both programs. `batch_size` counts pairs per step, over all micro batches."""

    steps: int = 8
    batch_size: int = 8
    lr: float = 1e-4
    loss_type: str | tuple[str, ...] = "sigmoid"
    """A loss of `DPOTrainer`, as both programs name it, or several."""
    loss_weights: tuple[float, ...] | None = None
    """What multiplies each of several losses."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    clip_grad: float = 1.0
    precomputed: bool = False
    """Reference log-probabilities are computed before training."""
    row_capacity: int = 4096
    """Tokens of our rows."""
    kind: str = "lm"
    """`lm`: DPO; `reward`: a reward model, which uses the next two settings, but not beta, label
    smoothing and reference."""
    margin: bool = False
    center: float | None = None
    """Coefficient of the centring of rewards."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The run of one program: one number per step, and the final weights by Hugging Face's names.

    `num_tokens` counts both sides of every pair, each with its whole prompt. `num_run` counts the
    tokens that went through the model, without padding.
    """

    losses: list[float]
    grad_norms: list[float]
    num_tokens: list[int]
    num_run: list[int]
    weights: dict[str, Tensor]


def make_tokenizer(directory: Path) -> None:
    """A tokenizer of the 256 bytes, padding and end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(directory)


def make_model(directory: Path, kind: str = "lm", **sizes: int) -> Path:
    """Save a random float32 Llama, or a reward model if `kind` is reward, and a byte tokenizer.
    They are the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    make_tokenizer(directory)
    parts = {
        "vocab_size": 258,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.06,
        "bos_token_id": None,
        "pad_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    if kind == "reward":
        parts |= {"num_labels": 1}
    torch.manual_seed(0)
    made = LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM
    model = made(LlamaConfig(**{**parts, **sizes})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def text_pairs(source: Path, hf: Path, count: int, max_length: int) -> list[TextPair]:
    """The first `count` pairs of a file whose sides take at most `max_length` tokens.

    End-of-text is counted. Raises InputError if there are fewer, or if they are not text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    reader, pairs = ExampleReader(), []
    for record in Inputs([source]).read():
        if record.value is None:
            raise InputError(f"{record.place}: {record.error}")
        try:
            responses = reader.read(record.value).responses
        except DegenerateRecord:
            continue
        except InputError as error:
            raise InputError(f"{record.place}: {error}") from None
        if len(responses) != 2 or not all(isinstance(r.response, str) for r in responses):
            raise InputError(f"{record.place}: the comparison takes pairs of text")
        texts = [r.prompt + r.response for r in responses]
        if max(len(tokenizer(text)["input_ids"]) for text in texts) + 1 > max_length:
            continue
        chosen, rejected = (r.response for r in responses)
        pairs.append({"prompt": responses[0].prompt, "chosen": chosen, "rejected": rejected})
        if len(pairs) == count:
            return pairs
    raise InputError(f"{source} has {len(pairs)} pairs of at most {max_length} tokens, not {count}")


def with_margins(pairs: Sequence[TextPair]) -> list[TextPair]:
    """The pairs with margins 0, 1/4, 1/2, 3/4, repeated: preference files seldom have margins."""
    return [{**pair, "margin": (i % 4) / 4} for i, pair in enumerate(pairs)]


def relative(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """|a - b| / |b|, per step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def farthest_weight(ours: Outcome, theirs: Outcome) -> float:
    """Largest absolute difference of two weights. Raises ValueError if names differ."""
    if ours.weights.keys() != theirs.weights.keys():
        names = sorted(ours.weights.keys() ^ theirs.weights.keys())
        raise ValueError(f"only one of the two models has the weights {', '.join(names)}")
    return max(float((x - theirs.weights[name]).abs().max()) for name, x in ours.weights.items())
