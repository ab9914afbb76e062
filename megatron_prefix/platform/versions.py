"""What differs between Megatron-Core 0.16 and 0.19. No other module knows of versions.

Most code uses what all versions offer under one public name. No version number is compared: a
function looks at what it is given. Paths are relative to megatron/core.

0.17  `save` ignores a save strategy of ours (dist_checkpointing/serialization.py). So
      checkpoint/writing.py calls the parts of `save` itself.
0.18  `mlp` of a layer spec is a partial of a builder (models/gpt/gpt_layer_specs.py):
      `submodules_of`.
0.18  triton is imported but not declared (transformer/moe/paged_stash.py): setup.py requires it.
0.19  `GPTModel` is deprecated (models/gpt/gpt_model.py): model/gpt.py extends `LanguageModule`.
0.19  Gradients are added up on `torch.cuda.current_stream()`
      (distributed/param_and_grad_buffer.py): megatron_cpu.py replaces it.
0.19  Saved parameter groups are paired with this run's by learning rates, too
      (optimizer/optimizer.py): checkpoint/optimizer_state.py gives them this run's rates first.
0.19  What is not a tensor is saved as a pickled object (dist_checkpointing/serialization.py):
      checkpoint/writing.py writes `common.pt`, which every version reads.

0.19  `get_main_grads_for_grad_norm` is `get_grads_for_grad_norm` (optimizer/optimizer.py):
      `gradients_for_norm`.

Private names that are used because nothing public does the same:

`DistributedOptimizer._init_optimizer_states_with_dummy_values` (optimizer/distrib_optimizer.py)
      makes the state into which a checkpoint is loaded; called by checkpoint/optimizer_state.py.
`P2PCommunicator._communicate_shapes` (pipeline_parallel/p2p_communication.py)
      is overridden by engine/pipeline.py, whose stages know the shapes.
`_gather_along_first_dim` (tensor_parallel/mappings.py),
`_set_cuda_rng_state` (tensor_parallel/random.py),
`MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize` (transformer/moe/token_dispatcher.py)
      need CUDA; megatron_cpu.py replaces them on CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any


def submodules_of(part: Any) -> Any:
    """The submodules of a part of a layer spec: a `ModuleSpec`, or, for `mlp` since 0.18, a partial
    that is called with them."""
    return part.keywords["submodules"] if isinstance(part, partial) else part.submodules


def gradients_for_norm(optimizer: Any) -> list:
    """The gradients of one optimizer that count in the model's norm: those of replicas do not."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
