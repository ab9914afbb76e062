"""Every sampler of a run counts the pictures of its data set, however many data sets are joined."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import vision
from tiny_models import tiny_config

from megatron_prefix.config.parts import PictureWork
from megatron_prefix.data.build import BuildOptions, build_dataset
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.estimate.data_costs import KnownModel, planned_sampler
from megatron_prefix.objectives import check
from megatron_prefix.train.row_costs import ModelCosts
from megatron_prefix.train.samplers import (
    evaluation_sampler,
    joint_sampler,
    mismatch_sampler,
    training_sampler,
)


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> PreferenceDataset:
    """Two data sets with mismatches, one picture each."""
    folder, parts = tmp_path_factory.mktemp("costs"), []
    model = vision.make(folder / "model", "llava")
    for number in (1, 2):
        vision.picture(20 * number, 30).save(folder / f"{number}.png")
        rows = [
            {
                "images": [f"{number}.png"],
                "prompt": f"<image> What is {word}?",
                "chosen": f"This is {word}.",
                "rejected": f"No {word}.",
            }
            for word in ("a", "b", "c")
        ]
        source = folder / f"{number}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        build_dataset([source], str(model), folder / f"set{number}", BuildOptions(kto=True))
        parts.append(PreferenceDataset(folder / f"set{number}"))
    return own_responses(join_datasets(parts))


def works_of(sizes, grids, several) -> list[PictureWork]:
    """A tower's work is the width of the picture, a projector's 1."""
    return [
        PictureWork(tower=float(width), projector=1.0, patches=1, projections=1)
        for width in sizes[:, 0]
    ]


@pytest.mark.parametrize("trains_tower", [False, True])
def test_every_sampler_counts_pictures(joined, tmp_path, trains_tower):
    """In training what is frozen counts a third; what is only scored costs all of it."""
    config = tiny_config(str(joined.parts[0].prefix), tmp_path, loss={"loss_type": "kto"})
    objective = check(config.loss)
    source = SimpleNamespace(images=object(), pictures_work=works_of)
    initial = SimpleNamespace(sizes=config.model.sizes(), source=source)
    trained = SimpleNamespace(trains_tower=trains_tower, trains_projector=True)
    costs = ModelCosts(initial, trained)
    training = training_sampler(config, objective, joined, None, None, costs)
    share = 1.0 if trains_tower else 1 / 3
    expected = [share * width + 1.0 for width in (20, 40)]
    assert training.cost.per_picture == pytest.approx(expected)
    for sampler in (
        evaluation_sampler(config, objective, joined, None, costs),
        mismatch_sampler(config, objective, training, "data.train", None, costs),
        joint_sampler(config, objective, training, None, costs),
    ):
        assert sampler.cost.per_picture == (21.0, 41.0)
    known_vision = SimpleNamespace(
        pictures=works_of(joined.images.sizes, None, None), **vars(trained)
    )
    known = KnownModel(config.model.sizes(), joined.vocab_size, vision=known_vision)
    assert planned_sampler(config, objective, joined, 1, known).cost == training.cost


def test_texts_have_no_pictures(joined, tmp_path):
    config = tiny_config(str(joined.parts[0].prefix), tmp_path)
    initial = SimpleNamespace(sizes=config.model.sizes(), source=None)
    costs = ModelCosts(initial).cost_model(joined, "lm", True)
    assert costs.per_picture == () and costs.per_token > 0
