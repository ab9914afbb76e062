"""Small models, rows for them, and what comes out: shared by the tests of the model.

*Alone* means one row, one chain, positions 0 to n - 1, no tree anywhere. Shapes: R responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.config import ModelConfig
from megatron_prefix.data.steps.collate import MicroBatch, RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.engine.batch import TrainBatch, to_device
from megatron_prefix.layout import TreeLayout
from megatron_prefix.model.gpt import TreeGPTModel
from megatron_prefix.model.logps import response_logps
from megatron_prefix.model.provider import model_provider, transformer_config

CPU = torch.device("cpu")
EXACT = 1e-12
"""Relative to the largest entry: float64 rounding through three layers."""
VOCAB = 61

VARIANTS = {
    "untied": {},
    "untied, bias, norm": {"add_qkv_bias": True, "qk_layernorm": True},
    "tied, bias": {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True},
    "tied, norm": {"untie_embeddings_and_output_weights": False, "qk_layernorm": True},
    "windows, cap, sinks": {
        "window_size": [3, 0],
        "window_attn_skip_freq": (1, 0, 1),
        "attn_logit_softcapping": 1.5,
        "softmax_type": "learnable",
    },
}
FULL = {"recompute_granularity": "full"}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full uniform": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 3},
    "full block": {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
}


def make_model(world, vocab_size: int = VOCAB, seed: int = 5, **settings) -> TreeGPTModel:
    """A small model of three layers, three query heads a key head, at its initial weights."""
    sizes = {
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "init_method_std": 0.2,
    }
    config = transformer_config(
        ModelConfig(**{**sizes, **settings}), vocab_size=vocab_size, seed=seed
    )
    return model_provider(config=config, pg_collection=world.groups).to(world.device)


def random_model(world, **settings) -> TreeGPTModel:
    """The same in float64, with biases and norms moved off 0 and 1."""
    model = make_model(world, **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.device))
            assert parameter.dtype == torch.float64, name
    return model


def chain(tokens: np.ndarray, loss_start: int) -> MicroBatch:
    """One response alone in a row, written out."""
    length = len(tokens)
    return MicroBatch(
        tokens=np.asarray(tokens),
        layout=TreeLayout.from_parents([length], [-1]),
        logit_token=np.arange(loss_start - 1, length - 1),
        target_token=np.asarray(tokens[loss_start:]),
        response=np.zeros(length - loss_start, np.int64),
        response_ids=np.zeros((1, 2), np.int64),
        response_tokens=np.array([length - loss_start]),
        pairs=np.zeros((0, 2), np.int64),
        pair_ids=np.zeros((0, 2), np.int64),
        pair_weights=np.zeros(0),
        pair_margins=np.zeros(0),
        ranks=np.array([-1]),
        labels=np.array([np.nan]),
        members=np.array([[0]]),
        num_tokens=length,
    )


def items(trees: Sequence[PrefixTree], sharing: str = "tree") -> list[RowItem]:
    views = [view(tree, sharing, 0) for tree in trees]
    return [
        RowItem(group=i, view=v, pair_weights=np.ones(len(v.pairs))) for i, v in enumerate(views)
    ]


def pack(trees: Sequence[PrefixTree], multiple: int = 1) -> MicroBatch:
    return collate_packed(items(trees), multiple)


def logps_of(model: TreeGPTModel, batch: MicroBatch | TrainBatch) -> Tensor:
    """Log-probability of every response of a row, float64 [R]."""
    if isinstance(batch, MicroBatch):
        batch = to_device(batch, next(model.parameters()).device)
    token_logps = model(batch.tokens, None, None, packed_seq_params=batch.params)
    return response_logps(token_logps, batch.response_order, batch.response_offsets)


@dataclass
class Outcome:
    """Response log-probabilities, and gradients of their weighted sum by parameter name."""

    logps: Tensor
    gradients: dict[str, Tensor]

    def errors(self, other: Outcome) -> tuple[float, float]:
        """(log-probabilities, gradients): largest differences over the largest entries."""
        assert self.gradients.keys() == other.gradients.keys()
        logps = (self.logps - other.logps).abs().max() / other.logps.abs().max()
        by_name = {
            name: float((self.gradients[name] - g).abs().max() / g.abs().max())
            for name, g in other.gradients.items()
        }
        return float(logps), max(by_name.values())


def weights_of(num_responses: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(size=num_responses))


def outcome(model: TreeGPTModel, batches: Sequence[MicroBatch | TrainBatch]) -> Outcome:
    """Forward and backward over rows whose responses follow each other."""
    model.train()
    model.zero_grad()
    parts = []
    weights = weights_of(10_000).to(next(model.parameters()).device)
    for batch in batches:
        logps = logps_of(model, batch)
        assert logps.dtype == torch.float64
        (logps * weights[: len(logps)]).sum().backward()
        weights = weights[len(logps) :]
        parts.append(logps.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return Outcome(torch.cat(parts), gradients)
