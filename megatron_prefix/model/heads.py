"""The reward model: Megatron-Core's GPT with one number in place of next-token probabilities.

It is the same model up to the last norm. Behind it a linear map without bias scores the last
token's row of every response. The head stands whole on every tensor-parallel rank: all of them
hold the same rows, compute the same scores and find the same gradient, which is summed over no
one and counted once in norms.

Shapes: C hidden channels, U projected rows, N targets (one a response).
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_prefix.attention.megatron import TreePackedSeqParams
from megatron_prefix.model.gpt import TreeGPTModel, TreeTransformerConfig


class RewardHead(torch.nn.Module):
    """Rows [U, C] -> scores [U], in float32 (float64 stays).

    The weight [1, C] has the model's precision, so that wrappers, optimizer and files treat it
    like every other; under bfloat16 it is raised for the product, because a score rounded to 8
    bits makes ties of pairs that the model tells apart.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))

    def forward(self, rows_UC: Tensor) -> Tensor:
        dtype = torch.promote_types(rows_UC.dtype, torch.float32)
        return torch.nn.functional.linear(rows_UC.to(dtype), self.weight.to(dtype)).squeeze(1)


class TreeRewardModel(TreeGPTModel):
    """A reward model whose attention and positions follow `TreePackedSeqParams`.

    `config.share_embeddings_and_output_weights` must be False: there is no output layer. Its
    parameter is `score.weight`, as in Hugging Face's `…ForSequenceClassification`.
    """

    def __init__(
        self,
        config: TreeTransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        assert not config.share_embeddings_and_output_weights, "a reward model has no output layer"
        super().__init__(config, pre_process, post_process, vp_stage, pg_collection)
        if post_process:
            del self.output_layer  # the stock constructor makes one; it was never filled
            self.score = RewardHead(config.hidden_size, config.params_dtype)

    def _head(self, rows_UC: Tensor, params: TreePackedSeqParams) -> Tensor:
        """Score of every target's row, float32 [N]."""
        return self.score(rows_UC).index_select(0, params.logit_of_target)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Of every part; the language model's own adds what its output layer needs."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
