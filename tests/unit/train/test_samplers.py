"""Data sets are checked before a run, and samplers follow the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.samplers import (
    evaluation_sampler,
    open_plan,
    open_verified,
    plan_settings,
    training_sampler,
)

ALONE = SimpleNamespace(
    beat=lambda doing: None,
    once=lambda action: action(),
    once_per_node=lambda action: [action()],
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("samplers") / "set", 0, 6)


def test_a_sound_data_set_is_opened(prefix):
    assert len(open_verified(prefix, "data.train", ALONE)) == 6


def test_damage_names_the_setting_and_the_file(prefix, tmp_path):
    damaged = Path(write_random_set(tmp_path / "set", 0, 6))
    data = bytearray(damaged.with_suffix(".bin").read_bytes())
    data[0] ^= 1
    damaged.with_suffix(".bin").write_bytes(data)
    with pytest.raises(InputError, match=rf"data\.valid: .*{damaged}\.bin"):
        open_verified(str(damaged), "data.valid", ALONE)
    planned = SimpleNamespace(is_of_these_files=lambda dataset: True)
    assert len(open_verified(str(damaged), "data.valid", ALONE, planned)) == 6, "read again"


def test_a_node_with_another_data_set_is_named(prefix):
    nodes = SimpleNamespace(**vars(ALONE))
    nodes.once_per_node = lambda action: [action(), "f" * 64]
    with pytest.raises(InputError, match=rf"data\.train: the nodes have different .*{prefix}"):
        open_verified(prefix, "data.train", nodes)


def test_unpaired_responses_have_nothing_to_compare(tmp_path):
    rows = [{"prompt": "p" * n, "completion": "c", "label": True} for n in (1, 2)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_dataset([tmp_path / "in.jsonl"], "bytes", tmp_path / "set")
    with pytest.raises(InputError, match=r"data\.train: .* has 2 responses and no pair"):
        open_verified(str(tmp_path / "set"), "data.train", ALONE)


def test_a_plan_that_is_not_there_is_refused(prefix, tmp_path):
    assert open_plan(tiny_config(prefix, tmp_path), ALONE) is None
    config = tiny_config(prefix, tmp_path, data={"plan": str(tmp_path / "absent")})
    with pytest.raises(InputError, match=r"data\.plan: .*absent"):
        open_plan(config, ALONE)


def test_samplers_follow_the_configuration(prefix, tmp_path):
    data = {"global_batch_size": 2, "sharing": "pair", "seed": 9, "packing_method": "best-fit"}
    config = tiny_config(prefix, tmp_path, data=data, loss={"weighting": "group"})
    dataset = PreferenceDataset(prefix)
    objective = check(config.loss)
    settings = plan_settings(config, objective)
    assert (settings.seed, settings.global_batch_size, settings.row_capacity) == (9, 2, 512)
    ranks = {"num_ranks": 2, "row_multiple": 4, "count_multiple": 3}
    sampler = training_sampler(config, objective, dataset, SimpleNamespace(sampler_layout=ranks))
    assert (sampler.sharing, sampler.weighting) == ("pair", "group")
    assert (sampler.packing_method, sampler.cost is None) == ("best-fit", False)
    assert {name: getattr(sampler, name) for name in ranks} == ranks
    held_out = evaluation_sampler(config, objective, dataset, None, None)
    groups = [held_out.step(i).groups.tolist() for i in range(3)]
    assert groups == [[0, 1], [2, 3], [4, 5]], "the data set's own order"
