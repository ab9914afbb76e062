"""What a reward model is asked of a row: the last token of every response, on its own path."""

import numpy as np
import pytest
from data_sets import three_responses
from test_collate import COLLATES, random_items

from megatron_prefix.data.steps.collate import score_targets, tree_targets
from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.testing import visibility_by_walking, write_random_set


def test_the_docstrings_example():
    # p p | a a | b b b: rows 3 and 6
    prompt, a, b = [1, 2], [3, 4], [5, 6, 7]
    paths = [ResponsePath(tokens=np.array(prompt + own), loss_start=2, set_id=0) for own in (a, b)]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)])
    rows, tokens, responses = score_targets(tree)
    assert rows.tolist() == [3, 6] and responses.tolist() == [0, 1]
    assert tokens.tolist() == [0, 0]
    assert all(x.dtype == np.int64 for x in (rows, tokens, responses))


def test_a_response_that_ends_inside_another_is_scored_there():
    """The first response is the beginning of the second, so its last row has children."""
    paths = [
        ResponsePath(tokens=np.array([1, 2, 3]), loss_start=1, set_id=0),
        ResponsePath(tokens=np.array([1, 2, 3, 4]), loss_start=1, set_id=0),
    ]
    rows, _, _ = score_targets(build_tree(paths, [Pair(chosen=0, rejected=1)]))
    assert rows.tolist() == [2, 3]


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("how", COLLATES)
@pytest.mark.parametrize("seed", range(4))
def test_the_scored_row_sees_its_whole_response_and_no_more(seed, how, sharing):
    items, given = random_items(seed, sharing)
    batch = COLLATES[how](items, 4, score_targets)
    assert sorted(batch.response.tolist()) == list(range(batch.num_responses))
    assert (np.diff(batch.logit_token) >= 0).all() and not batch.target_token.any()
    visible = visibility_by_walking(batch.layout.lengths, batch.layout.parents)
    for row, response in zip(batch.logit_token, batch.response, strict=True):
        group, number = batch.response_ids[response]
        path = given[group][0][number].tokens
        assert batch.tokens[visible[row]].tolist() == path.tolist()


def test_rows_and_pairs_do_not_depend_on_the_targets():
    items, _ = random_items(0, "tree")
    lm, reward = (COLLATES["packed"](items, 4, t) for t in (tree_targets, score_targets))
    assert (lm.tokens == reward.tokens).all() and (lm.pairs == reward.pairs).all()
    assert reward.num_projected <= reward.num_responses < lm.num_projected


def test_the_sampler_uses_score_targets(tmp_path):
    dataset = PreferenceDataset(write_random_set(tmp_path / "set", 0, 5))
    order = GroupBatches(5, 5, dataset.fingerprint, 1)
    sampler = Sampler(dataset=dataset, composition=order, row_capacity=4096, targets=score_targets)
    rows = sampler.micro_batches(sampler.step(0))
    assert sum(len(row.logit_token) for row in rows) == len(dataset.response_lengths)


def test_an_empty_row_has_no_target():
    batch = COLLATES["packed"]([], 4, score_targets)
    assert len(batch.logit_token) == batch.num_projected == 0


def test_three_responses_of_one_prompt():
    """5 6 | 7 | 8 | 9 2, the third response being the first token of the other two."""
    rows, _, _ = score_targets(three_responses())
    assert rows.tolist() == [3, 5, 2]
