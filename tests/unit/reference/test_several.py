"""Several references: files of any model, the anchor, heads, and the check of a resumed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked_sets import write_ranked_set
from reference_files import drawn_model, write_drawn

from megatron_prefix.config import LossConfig
from megatron_prefix.config.loss import ReferenceFile
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.compositions import GroupBatches, with_comparisons
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.engine.batch import to_device
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.reference.several import SeveralReferences, read_references
from megatron_prefix.reference.sidecars import read_sidecar, sidecar_model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset(write_ranked_set(tmp_path_factory.mktemp("data") / "set", 0, 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate("abc"):
        write_drawn(folder / name, name, [data], seed, skill=3.0 * seed)
    return folder


def references(folder: Path, data: PreferenceDataset, own: str = "b", **loss) -> SeveralReferences:
    files = tuple(ReferenceFile(name=name, ref_logps=str(folder / name)) for name in "abc")
    config = LossConfig(references=files, **loss)
    mixture = check(config).mixture
    sampler = Sampler(
        dataset=with_comparisons(data, loss.get("comparisons", "all")),
        composition=GroupBatches(len(data), 2, data.fingerprint, 1),
        row_capacity=200,
    )
    return read_references(
        config,
        mixture,
        drawn_model(own),
        [data],
        0.0,
        sampler=sampler,
        valid=[data],
        seed=3,
    )


def test_models_and_anchor(folder, data):
    ours = references(folder, data)
    assert ours.models == tuple(map(drawn_model, "abc"))
    assert ours.anchor == 1 and ours.starts_policy
    assert ours.identity["loss.references"] == {name: drawn_model(name) for name in "abc"}
    assert ours.identity["loss.reference_anchor"] == "b"
    other = references(folder, data, reference_anchor="c")
    assert other.anchor == 2 and not other.starts_policy
    with pytest.raises(InputError, match="none of them has .* set loss.reference_anchor"):
        references(folder, data, own="d")


def test_rows_get_their_responses(folder, data):
    ours = references(folder, data, reference_weights=[1.0, 1.0, 2.0])
    sampler = Sampler(
        dataset=data,
        composition=GroupBatches(len(data), 3, data.fingerprint, 1),
        row_capacity=200,
    )
    rows = sampler.micro_batches(sampler.step(0))
    batches = ours.attach(rows, [to_device(row, torch.device("cpu")) for row in rows], 0)
    for row, batch in zip(rows, batches, strict=True):
        for k, (group, response) in enumerate(row.response_ids):
            index = int(data.group_responses[group]) + int(response)
            for j, name in enumerate("abc"):
                value = read_sidecar(str(folder / name), None, data)[index]
                assert float(batch.references.logps[j, k]) == value
        assert torch.equal(batch.ref_logps, batch.references.logps[1])
        assert batch.references.weights.tolist() == [0.25, 0.25, 0.5]
        inputs = batch.loss_inputs(torch.zeros(row.num_responses, dtype=torch.float64))
        assert inputs.references is batch.references


def test_weights_by_rule(folder, data):
    for rule in ("validation_accuracy", "validation_confidence"):
        weights = references(folder, data, reference_weights=rule).weights(0)
        assert weights[0] < weights[2] and weights.sum() == pytest.approx(1)
    assert references(folder, data).weights(5).tolist() == [1 / 3] * 3
    assert references(folder, data, reference_weights="adaptive").weights(5) is None
    window = references(folder, data, reference_weights="sliding_window", reference_window=4)
    assert window.weights(0).tolist() == [1 / 3] * 3 != window.weights(4).tolist()
    thompson = references(folder, data, reference_weights="thompson")
    assert sorted(thompson.weights(3).tolist()) == [0, 0, 1]


def test_only_selected_pairs_count(folder, data):
    every, some = (
        references(folder, data, reference_weights="sliding_window", comparisons=comparisons)
        for comparisons in ("all", "best_vs_worst")
    )
    assert sum(every.state(1)["counts"]) > sum(some.state(1)["counts"])


def test_state_is_compared(folder, data):
    ours = references(folder, data, reference_weights="thompson")
    state = ours.state(7)
    ours.check_state(state, 7)
    references(folder, data, reference_weights="thompson").check_state(state, 7)
    ours.check_state(None, 7)  # a checkpoint of an older version has none
    assert ours.saved_weights(state, "x").tolist() == state["weights"]
    wrong = {**state, "counts": (np.array(state["counts"]) + 1).tolist()}
    with pytest.raises(InputError, match="counts after step 7 .* in the checkpoint"):
        ours.check_state(wrong, 7)
    with pytest.raises(InputError, match="has no weights of this rule"):
        references(folder, data, reference_weights="sliding_window").saved_weights(state, "x")
    adaptive = references(folder, data, reference_weights="adaptive")
    assert adaptive.state(7) is None and adaptive.check_state(state, 7) is None


def test_another_data_set_is_refused(folder, data, tmp_path):
    other = PreferenceDataset(write_ranked_set(tmp_path / "other", 9, 3))
    with pytest.raises(InputError, match="made from data sets .* score again"):
        references(folder, other)


def test_heads_of_every_reference(folder, data):
    with pytest.raises(InputError, match="made without loss.ld_alpha"):
        read_references(
            LossConfig(references=(ReferenceFile(name="a", ref_logps=str(folder / "a")),)),
            replace(references(folder, data).mixture, names=("a",)),
            drawn_model("a"),
            [data],
            0.0,
            with_heads=True,
        )
    assert sidecar_model(str(folder / "a")) == drawn_model("a")
