"""Prefix-sharing preference training inside Megatron-Bridge 0.6.

1. `prefix_preference(provider)`: Bridge's model provider, with tree attention. Parameter names,
   layers and hooks stay Bridge's, so its conversion, recipes, PEFT and FP8 apply.
2. `preference_data(model, prefix, ...)`: Bridge's `dataset`. Rows of prefix trees for this
   data-parallel rank, with reference log-probabilities.
3. `preference_forward_step(data)`: Bridge's forward step: one row -> (output, loss function).

Division: the loss of a row is already divided by the weight of the whole step, so nothing may be
divided again. Bridge gives Megatron-Core's `finalize_model_grads` the sum of `num_tokens` over
micro batches and ranks, and gradients are divided by max(sum, 1). So every row returns 0 tokens,
with `calculate_per_token_loss` on, which stops the divisions by micro batches and by ranks.

Megatron-Bridge needs CUDA. On CPU this package is tested against a stub with Bridge's signatures.
"""

from megatron_prefix.bridge.data import preference_data
from megatron_prefix.bridge.provider import prefix_preference
from megatron_prefix.bridge.step import preference_forward_step

__all__ = ["preference_data", "preference_forward_step", "prefix_preference"]
