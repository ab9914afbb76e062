"""Initial weights as a function of (seed, canonical parameter name) alone.

Megatron-Core draws weights in the order in which a rank builds its layers, from streams that
depend on the layout, and padding the vocabulary shifts every later draw. Here every parameter
is drawn whole and unpadded from its own stream and then cut to this rank's part, so that all
layouts start from the same model.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megatron_prefix.model.gpt import TreeGPTModel, TreeTransformerConfig
from megatron_prefix.model.names import SINKS, VOCABULARY, is_added
from megatron_prefix.model.parameters import canonical_parameters, partition_dim, tensor_group


@torch.no_grad()
def initialize_weights(model: TreeGPTModel, seed: int, only: str | None = None) -> None:
    """Draw every parameter of this rank by its canonical name, or the one called `only`.

    A reward model's head is drawn like other matrices, from N(0, init_method_std), as Hugging
    Face draws it from N(0, initializer_range).
    """
    for name, parameter in canonical_parameters(model):
        if is_added(name) or (only is not None and name != only):
            continue
        group = tensor_group(name, model)
        parameter.copy_(_initial(name, parameter, model.config, group, seed))


@torch.no_grad()
def initialize_adapters(model: TreeGPTModel, seed: int) -> None:
    """Set the adapters to their initial values: B to 0, A as PEFT draws it, but by name.

    A is uniform in +-1 / sqrt(in), Kaiming's bound with a = sqrt 5. So all layouts start equal.
    """
    for name, factor in canonical_parameters(model):
        if name.endswith("lora_B"):
            factor.zero_()
        elif name.endswith("lora_A"):
            shape, dim = list(factor.shape), partition_dim(factor)
            group = tensor_group(name, model)
            if dim is not None:
                shape[dim] *= group.size()
            bound = 1 / math.sqrt(shape[1])
            whole = torch.empty(shape, dtype=torch.float32)
            whole.uniform_(-bound, bound, generator=_stream("adapters", seed, name))
            factor.copy_(whole if dim is None else whole.chunk(group.size(), dim)[group.rank()])


def _initial(
    name: str,
    parameter: torch.nn.Parameter,
    config: TreeTransformerConfig,
    group: torch.distributed.ProcessGroup,
    seed: int,
) -> Tensor:
    """This rank's part of an initial parameter."""
    if name.endswith("bias"):
        return torch.zeros_like(parameter)
    if parameter.dim() == 1 and not name.endswith(SINKS):
        return torch.ones_like(parameter)
    shape, dim = list(parameter.shape), partition_dim(parameter)
    if dim is not None:
        shape[dim] *= group.size()
    is_vocabulary = name in VOCABULARY
    if is_vocabulary:
        shape[0] = config.vocab_size
    whole = _normal(name, shape, _standard_deviation(name, config), seed)
    if is_vocabulary:
        # Padding is 0 and drawn from no stream, so its number of rows changes no other weight.
        padding = whole.new_zeros(config.padded_vocab_size - config.vocab_size, shape[1])
        whole = torch.cat([whole, padding])
    if dim is None:
        return whole
    if name.endswith("linear_fc1.weight") and config.gated_linear_unit:
        # [gate, up] over two ranks: rank 0 has the first halves of both, not all of gate
        gate, up = whole.chunk(2, dim)
        parts = [x.chunk(group.size(), dim)[group.rank()] for x in (gate, up)]
        return torch.cat(parts, dim)
    return whole.chunk(group.size(), dim)[group.rank()]


def _standard_deviation(name: str, config: TreeTransformerConfig) -> float:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / math.sqrt(2 * config.num_layers)
    return config.init_method_std


def _normal(name: str, shape: list[int], std: float, seed: int) -> Tensor:
    whole = torch.empty(shape, dtype=torch.float32)
    return whole.normal_(0.0, std, generator=_stream("weights", seed, name))


def _stream(kind: str, seed: int, name: str) -> torch.Generator:
    """The stream of random numbers of one parameter."""
    # 64 bits of the digest, shifted: a seed from 0 up to, not including, 2^63.
    digest = hashlib.sha256(f"{kind}/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
