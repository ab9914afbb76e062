"""The reward model: Megatron-Core's GPT with scores in place of next-token probabilities.

It is the same model up to the last norm. After it a linear map without bias scores the last token
of every response. Every tensor-parallel rank has the whole head: all of them have the same hidden
states, and compute the same scores and the same gradient, which is not summed over ranks and
counts once in gradient norms.

Shapes: C hidden channels, U tokens that are scored, N targets (one per response), A
attributes (usually one).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams
from megatron_prefix.model.gpt import TreeGPTModel


class RewardHead(torch.nn.Module):
    """Hidden states [U, C] -> scores [U], or [U, A] of several attributes, in float32 (float64
    stays).

    The weight [A, C] has the model's precision, so that wrappers, optimizer and files treat it
    like every other weight. The product is in float32: scores rounded to the 8 bits of bfloat16
    would make ties of pairs that the model distinguishes.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, num_labels: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_labels, hidden_size, dtype=dtype))

    def forward(self, hidden_UC: Tensor) -> Tensor:
        # bfloat16 has 8 bits: 2.01 and 2.013 both become 2.015625.
        dtype = torch.promote_types(hidden_UC.dtype, torch.float32)
        return torch.nn.functional.linear(hidden_UC.to(dtype), self.weight.to(dtype)).squeeze(1)

    @torch.no_grad()
    def scales(self, hidden_UC: Tensor, num_layers: int) -> Tensor:
        """Size of what is rounded on the way to each score, [U], without gradient; of several
        attributes the largest.

            scale = sqrt(1 + num_layers) * sqrt(sum over c of (weight_c hidden_c)^2)

        The last norm and each layer round every channel of the hidden state, independently.
        """
        dtype = torch.promote_types(hidden_UC.dtype, torch.float32)
        squares_UA = hidden_UC.to(dtype).square() @ self.weight.to(dtype).square().T
        return (1 + num_layers) ** 0.5 * squares_UA.amax(dim=1).sqrt()


class TreeRewardModel(TreeGPTModel):
    """A reward model whose attention and positions follow `TreePackedSeqParams`.

    `config.share_embeddings_and_output_weights` must be False: there is no output layer. The
    head's parameter is `score.weight`, as in Hugging Face's `…ForSequenceClassification`.
    """

    def _add_head(self) -> None:
        config = self.config
        assert not config.share_embeddings_and_output_weights, "a reward model has no output layer"
        self.score = RewardHead(config.hidden_size, config.params_dtype, config.num_labels)

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the embedding, as Megatron-Core does; there is no output layer to mark."""
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True

    def _head(self, hidden_UC: Tensor, params: TreePackedSeqParams) -> Tensor:
        """Score of every target, float32 [N]; of several attributes a line each, and with scales
        one more: [lines, N]."""
        assert params.logit_of_target is not None
        scores = self.score(hidden_UC)
        lines_U = [scores] if scores.dim() == 1 else list(scores.T)
        if params.with_scales:
            lines_U.append(self.score.scales(hidden_UC, self.config.num_layers))
        lines = torch.stack(lines_U).index_select(1, params.logit_of_target)
        return lines if len(lines) > 1 else lines[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The state of every part; the language model's method needs an output layer."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
