"""The reward model itself: its scores, its gradients, its parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import CPU, chain, items, make_model, random_model

from megatron_prefix.data.steps.collate import (
    MicroBatch,
    collate_packed,
    collate_padded,
    score_targets,
)
from megatron_prefix.engine.batch import to_device
from megatron_prefix.model.parameters import canonical_parameters

pytestmark = pytest.mark.sample


def scores_of(model, batch: MicroBatch) -> torch.Tensor:
    """Score of every response of a row, in the row's order."""
    row = to_device(batch, CPU)
    scores = model(row.tokens, None, None, packed_seq_params=row.params)
    return scores[row.response_order]


def gradients(model, batches: list[MicroBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores of rows, and gradients of their sum weighted by 1, 2, 3, ..."""
    model.zero_grad()
    scores, start = [], 1
    for batch in batches:
        row_scores = scores_of(model, batch)
        weights = torch.arange(start, start + len(row_scores), dtype=torch.float64)
        (row_scores * weights).sum().backward()
        scores.append(row_scores.detach())
        start += len(row_scores)
    return torch.cat(scores), {n: p.grad.clone() for n, p in model.named_parameters()}


def alone(tokens: np.ndarray) -> MicroBatch:
    """One response in a row of its own, scored at its last token."""
    batch = chain(tokens, len(tokens) - 1)
    last = np.array([len(tokens) - 1])
    zero = np.zeros(1, np.int64)
    return MicroBatch(
        **{**vars(batch), "logit_token": last, "target_token": zero, "response": zero}
    )


@pytest.mark.parametrize("how", [collate_packed, collate_padded])
@pytest.mark.parametrize("backend", ["dense", "path"])
def test_scores_and_gradients_are_those_of_each_response_alone(world, forest, backend, how):
    trees, paths = forest
    model = random_model(world, kind="reward", attention_backend=backend)
    sharing = "tree" if how is collate_packed else "response"
    if sharing == "response":  # bundles of one comparison set hold its own responses
        trees = [tree for tree in trees if tree.response_sets.max() == 0]
        paths = [
            paths[i]
            for i in range(len(paths))
            if any(
                np.array_equal(paths[i].tokens, tree.response_tokens(r)[0])
                for tree in trees
                for r in range(tree.num_responses)
            )
        ]
    assert trees
    batch = how(items(trees, sharing), 4, score_targets)
    ours = gradients(model, [batch])
    theirs = gradients(model, [alone(path.tokens) for path in paths])
    assert (ours[0] - theirs[0]).abs().max() <= 1e-12 * theirs[0].abs().max()
    assert len(torch.unique(theirs[0])) > len(theirs[0]) // 2
    assert "score.weight" in ours[1] and not any("output_layer" in name for name in ours[1])
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).abs().max() <= 1e-12 * expected.abs().max(), name


def test_there_is_no_output_layer_and_nothing_is_tied(world):
    model = make_model(world, kind="reward", untie_embeddings_and_output_weights=False)
    assert model.share_embeddings_and_output_weights is False
    assert not hasattr(model, "output_layer") and model.score.weight.shape == (1, 48)
    assert not getattr(model.score.weight, "tensor_model_parallel", False)


def test_initial_weights_are_the_language_models_but_for_the_head(world):
    lm = dict(canonical_parameters(make_model(world)))
    reward = dict(canonical_parameters(make_model(world, kind="reward")))
    assert reward.keys() - lm.keys() == {"score.weight"}
    assert all(torch.equal(x, lm[name]) for name, x in reward.items() if name in lm)
    spread = float(reward["score.weight"].detach().std())
    assert 0.15 < spread < 0.25  # init_method_std is 0.2


def test_bfloat16_scores_are_not_rounded_to_bfloat16(world, forest):
    model = make_model(world, kind="reward", dtype="bfloat16")
    assert model.score.weight.dtype == torch.bfloat16
    scores = scores_of(model, collate_packed(items(forest[0]), 4, score_targets))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.to(torch.bfloat16).float())
