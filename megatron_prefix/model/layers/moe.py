"""Mixture of experts: a router whose load-balancing loss skips padding and may count a shared
token once per response.

Megatron-Core's expert layers are used unchanged. Their router is replaced where it counts tokens:
rows of prefix trees contain padding, which must not count, and tokens that several responses share,
which count once, or once per response (`moe_count`). A layer gives its router the counts of its
micro batch for the time of one call. So recomputation, which calls the layer again, and interleaved
chunks, each of which calls its own layers, always use the counts of the current row.

The auxiliary loss of one layer over the rows m of a step is the mean of the rows' balances,
weighted by their counts W_m (their sum is W). With f_e the share of a row's top-k choices that go
to expert e and P_e the mean of its probability, both weighted by the counts (Fedus et al. 2021,
arXiv 2101.03961, equations 4 to 6, for k choices):

    balance_m = E sum_e f_e P_e        1 if all experts are chosen equally often
    auxiliary = sum_m W_m / W balance_m

Shapes: T tokens of this rank, C hidden channels, E experts of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams
from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.layers.block import FamilyLayer
from megatron_prefix.model.layers.routing import choose_experts, scores_of
from megatron_prefix.platform import submodules_of


def row_balance(
    probs_TE: Tensor,
    chosen_TE: Tensor,
    counts_T: Tensor,
    topk: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """W_m balance_m of one row, or this rank's share of it; see the module's docstring.

    `group` are the ranks that share the row's tokens; their shares add up. Only the
    probabilities have gradients. A row of padding has 0.

    2 experts, top 1, counts [1, 2]: the first token chooses expert 0, the second expert 1, so
    f = [1/3, 2/3]; with probabilities [0.6, 0.4] and [0.3, 0.7], P = [0.4, 0.6],
    W balance = 3 * 2 * (0.4 / 3 + 0.6 * 2 / 3) = 3.2.
    """
    counts_T = counts_T.to(probs_TE.dtype)
    # choices_E[e]: how often expert e is chosen; f_e = choices_E[e] / (topk W_m). Their sums over
    # the ranks of the row are constants for autograd.
    choices_E = counts_T @ chosen_TE.to(probs_TE.dtype)
    totals = torch.cat([choices_E, counts_T.sum()[None]]).detach()
    if group is not None and group.size() > 1:
        dist.all_reduce(totals, group=group)
    choices_E, total = totals[:-1], totals[-1].clamp(min=torch.finfo(probs_TE.dtype).tiny)
    return len(choices_E) / (topk * total) * (choices_E @ (counts_T @ probs_TE))


class _AlsoMinimise(torch.autograd.Function):
    """Returns its first argument; in backward, the second is added to the loss.

    Megatron-Core's counterpart takes a loss scale from a global variable. None is needed here:
    neither float32 nor bfloat16 training scales the loss.
    """

    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, ctx.one


class TreeRouter(TopKRouter):
    """Top-k choice of experts in float32, with an auxiliary loss over `counts`.

    If the routing corrects the choice by a bias per expert, that is `expert_bias`, as Megatron-Core
    names it: not trained, and float32 in every precision.
    """

    counts: Tensor | None = None
    """How often each of this rank's tokens counts, [T]; set while its layer runs."""
    step_count: float = 0.0
    """Sum of the counts of the step's rows, over all ranks."""
    with_auxiliary: bool = True
    """Whether the current row has an auxiliary loss."""
    auxiliary: Tensor | float = 0.0
    """This rank's share of the auxiliary loss, summed since `step_auxiliary` was last called."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        parts: Architecture = getattr(config, "architecture", Architecture())
        self.routing = parts.routing
        if self.routing is not None and self.routing.score == "sigmoid":
            correction = torch.zeros_like(self.weight[:, 0], dtype=torch.float32)
            self.expert_bias = torch.nn.Parameter(correction, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> TreeRouter:
        """Casts of the model move `expert_bias`, and leave it in float32."""
        kept = None if self.expert_bias is None else self.expert_bias.detach().clone()
        super()._apply(fn, recurse)
        if kept is not None:
            self.expert_bias.data = kept.to(self.expert_bias.device)
        return self

    def gating(self, input: Tensor) -> Tensor:
        """Logits of all experts, at least float32 also if the model is bfloat16."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, 1, C] -> the chosen experts' weights [T, E], 0 for the others, and which are chosen.

        `counts` has the information of `padding_mask`, which is not used.
        """
        logits_TE = self.gating(input).flatten(0, -2)
        if self.routing is None:
            probs_TE, chosen_TE = topk_routing_with_score_function(
                logits_TE, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
            )
        else:
            scores_TE = scores_of(logits_TE, self.routing)
            probs_TE, chosen_TE = choose_experts(
                scores_TE, self.topk, self.routing, self.expert_bias
            )
        coefficient = self.config.moe_aux_loss_coeff if self.with_auxiliary else 0.0
        if coefficient and self.training and torch.is_grad_enabled():
            if self.counts is None or not self.step_count:
                raise ValueError(
                    "an auxiliary loss needs MicroBatch.served and to_device(…, step_count=…): "
                    "give them, or set moe_aux_loss_coeff to 0"
                )
            shares_TE = logits_TE.softmax(dim=-1)
            if self.expert_bias is not None:  # scores are sigmoids
                shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            group = self.tp_cp_group  # without sequence parallelism it holds no tensor ranks
            balance = row_balance(shares_TE, chosen_TE, self.counts, self.topk, group)
            share = balance / self.step_count
            self.auxiliary = self.auxiliary + share.detach()
            probs_TE = _AlsoMinimise.apply(probs_TE, coefficient * share)
        return probs_TE, chosen_TE


class TreeMoELayer(TransformerLayer):
    """A transformer layer that tells its router how often each token counts."""

    @property
    def _counts_responses(self) -> bool:
        return getattr(self.config, "moe_count", "tokens") == "responses"

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        packed_seq_params: TreePackedSeqParams,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """TransformerLayer's forward, with the counts of `packed_seq_params` set in the router."""
        router, served = self.mlp.router, packed_seq_params.responses_served
        if served is not None:
            # A prompt token of two answers, an answer's token, padding: served [2 1 0] counts as it
            # is for `responses`, and as [1 1 0] for `tokens`.
            counts = served if self._counts_responses else served.clamp(max=1)
            if self.config.sequence_parallel:
                tensor = self.pg_collection.tp
                # this rank's tokens of the row, as sequence parallelism divides them
                counts = counts.chunk(tensor.size())[tensor.rank()]
            router.counts, router.step_count = counts, packed_seq_params.step_count
        router.with_auxiliary = packed_seq_params.with_auxiliary
        try:
            return super().forward(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        finally:
            router.counts = None


class FamilyMoELayer(TreeMoELayer, FamilyLayer):
    """A `FamilyLayer` with experts."""


class ExpertOutput(RowParallelLinear):
    """The last linear layer of an expert with biases.

    Megatron-Core adds the bias in place, which autograd forbids for what `RowParallelLinear`
    returns on one rank, a view. And it sums the outputs of tensor-parallel ranks with their biases:
    so only the first rank has the bias. Its gradient is the sum over ranks, because Megatron-Core
    marks it for sequence parallelism.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        if bias is not None and self.tp_group.rank() > 0:
            bias = bias * 0.0
        return output.clone(), bias


def with_tree_router(layer: ModuleSpec, expert_bias: bool = False) -> ModuleSpec:
    """Put this module's router into a layer spec with experts, and its last layer of experts with
    biases; changes and returns `layer`."""
    if expert_bias:
        submodules_of(submodules_of(layer.submodules.mlp).experts).linear_fc2 = ExpertOutput
    layer.module = FamilyMoELayer if layer.module is FamilyLayer else TreeMoELayer
    submodules_of(layer.submodules.mlp).router = TreeRouter
    return layer


@torch.no_grad()
def step_auxiliary(chunks: Iterable[torch.nn.Module], device: torch.device) -> float:
    """The auxiliary loss since the last call, without its coefficient: the mean over the layers
    with experts.

    It is 1 if every row is spread evenly over all experts. Collective over all processes, each of
    which has its own layers, rows and tokens.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)  # (loss, layers with experts)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                parts: Architecture = getattr(module.config, "architecture", Architecture())
                total[1] = module.config.num_layers - parts.dense_layers
            if isinstance(module, TreeRouter):
                total[0] += module.auxiliary
                module.auxiliary = 0.0
    dist.all_reduce(total[:1])
    return float(total[0] / total[1])
