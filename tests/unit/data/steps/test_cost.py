"""The cost of bundles from columns, against the rows that are run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import vision
from data_sets import random_group, write_groups

from megatron_prefix.config import ModelConfig
from megatron_prefix.config.parts import PictureWork
from megatron_prefix.data import PreferenceDataset
from megatron_prefix.data.build import build_dataset
from megatron_prefix.data.steps.collate import collate_packed
from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.cost import CostModel, bundle_work
from megatron_prefix.data.steps.rows import row_items
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES, bundles_of
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.estimate.flops import forward_flops

SIZES = dict(num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    groups = [random_group(np.random.default_rng([2, seed])) for seed in range(20)]
    return write_groups(tmp_path_factory.mktemp("work") / "random", groups)


def test_the_docstrings_example(tmp_path):
    paths = [
        ResponsePath(tokens=np.array([5, 6, 3, 4]), loss_start=2),
        ResponsePath(tokens=np.array([5, 6, 2]), loss_start=2),
    ]
    assert build_tree(paths, [Pair(chosen=0, rejected=1)]).num_tokens == 5
    dataset = write_groups(tmp_path / "one", [(paths, [Pair(chosen=0, rejected=1)])])
    assert bundle_work(dataset, bundles_of(dataset, 0, "tree")[0], "tree") == (5, 13, 2, 0)


@pytest.mark.parametrize(
    "windows", [{}, {"window_size": [4, 0], "window_attn_skip_freq": [1, 1, 0]}]
)
@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_columns_tell_what_a_row_costs(dataset, sharing, windows):
    model = ModelConfig(**SIZES, **windows).sizes()
    cost = CostModel.of_model(model, dataset.vocab_size)
    num_lower = 0
    for group in range(len(dataset)):
        for bundle in bundles_of(dataset, group, sharing):
            work = bundle_work(dataset, bundle, sharing, cost)
            row = collate_packed(row_items(dataset, [bundle], sharing, "pair"))
            area = row.layout.area()
            if windows:  # two of three layers see five tokens
                area = (2 * row.layout.area(5) + area) / 3
                num_lower += area < row.layout.area()
            assert work.area == pytest.approx(area, rel=1e-12)
            assert work[:3:2] == (row.num_tokens, row.num_projected)
            flops = forward_flops(model, dataset.vocab_size, row)
            assert work.cost(cost) == pytest.approx(flops.total, rel=1e-12)
            assert work.tokens == row.num_tokens
    assert num_lower > 5 or not windows


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_pictures_cost_what_a_row_encodes(tmp_path, sharing):
    folder = vision.make(tmp_path / "model", "llava")
    for name, size in {"a": (30, 40), "b": (56, 28)}.items():
        vision.picture(*size).save(tmp_path / f"{name}.png")
    records = []
    for images in (["a.png"], ["b.png", "a.png", "b.png"], []):
        prompt = "<image>" * len(images) + " What?"
        records.append({"images": images, "prompt": prompt, "chosen": "Yes.", "rejected": "No."})
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset([source], str(folder), tmp_path / "set")
    dataset = PreferenceDataset(tmp_path / "set")
    works = [PictureWork(tower=7.0, projector=0.5, patches=1, projections=1)] * 2
    model = ModelConfig(**SIZES).sizes()
    text = CostModel.of_model(model, dataset.vocab_size)
    cost = replace(text, per_picture=(7.5, 7.5))
    for group, most in enumerate((1, 2, 0)):
        for bundle in bundles_of(dataset, group, sharing):
            row = collate_packed(row_items(dataset, [bundle], sharing, "pair"))
            flops = forward_flops(model, dataset.vocab_size, row, pictures=works)
            work = bundle_work(dataset, bundle, sharing, cost)
            assert work.cost(cost) == pytest.approx(flops.total, rel=1e-12)
            sides = 2 if sharing in ("none", "response") else 1
            assert work.pictures == 7.5 * most * sides
            assert bundle_work(dataset, bundle, sharing, text).pictures == 0


def test_ranks_get_similar_cost_and_not_similar_tokens(tmp_path):
    """One long answer costs as much attention as many short ones of as many tokens."""
    rng = np.random.default_rng(0)

    def pair(length):
        sides = [rng.integers(0, 7, length) for _ in range(2)]
        sides[1][0] = (sides[0][0] + 1) % 7
        paths = [ResponsePath(tokens=np.array([1, *own]), loss_start=1) for own in sides]
        return paths, [Pair(chosen=0, rejected=1)]

    dataset = write_groups(tmp_path / "set", [pair(400) for _ in range(2)] + [pair(20)] * 60)
    quadratic = CostModel(per_token=1.0, per_entry=1.0, per_logit_token=0.0)

    def unevenness(cost):
        order = GroupBatches(len(dataset), len(dataset), dataset.fingerprint, 0)
        sampler = Sampler(
            dataset=dataset, composition=order, row_capacity=1000, num_ranks=2, cost=cost
        )
        plan = sampler.step(0)
        costs = [
            sum(bundle_work(dataset, b, "tree").cost(quadratic) for row in share for b in row)
            for share in plan.rows
        ]
        if cost is not None:
            assert plan.costs == costs
        return max(costs) / np.mean(costs)

    assert unevenness(quadratic) < 1.02
