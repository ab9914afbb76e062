"""A sidecar has the reference's log-probability of every response, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import command, lines, refused, write_config
from safetensors.numpy import load_file

from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.reference.sidecars import PartialScores


def known(path: Path) -> dict:
    return {"reference": "precomputed", "ref_logps": str(path)}


def train(folder: Path, dataset: str, name: str = "run", **sections) -> list[str]:
    unsaved = {"save": None, "load": None, "save_interval": None, "steps": 4}
    sections["train"] = {**unsaved, **sections.get("train", {})}
    config = write_config(folder / f"{name}.yaml", dataset, folder / name, **sections)
    return ["train", "--config", config]


def test_training_is_that_with_a_reference_model(dataset, other, sidecar, tmp_path, capsys):
    """To rounding; evaluations too, whose reference is in the same file."""
    settings = {"data": {"valid": other}}
    assert command(train(tmp_path, dataset, "model", **settings), capsys)[0] == 0
    argv = train(tmp_path, dataset, "known", **settings, loss=known(sidecar))
    assert command(argv, capsys)[0] == 0
    history, expected = lines(tmp_path / "known"), lines(tmp_path / "model")
    assert [r["step"] for r in history] == [r["step"] for r in expected] == [0, 1, 2, 3, 4, 4]
    for ours, theirs in zip(history, expected, strict=True):
        for key, value in theirs.items():
            assert abs(ours[key] - value) <= 1e-4 * max(abs(value), 1e-2), (key, ours["step"])


def test_responses_are_in_the_order_of_the_data_set(dataset, sidecar, tmp_path):
    """Each response alone in a row, one after another: group by group, as in the record."""
    from megatron_prefix.checkpoint.starting_model import resolve_starting_model
    from megatron_prefix.config import load_config
    from megatron_prefix.distributed.world import join_world
    from megatron_prefix.engine import score_rows
    from megatron_prefix.engine.batch import to_device
    from megatron_prefix.reference import frozen_model

    config = load_config(write_config(tmp_path / "c.yaml", dataset, tmp_path / "run"))
    data, alone = PreferenceDataset(dataset), []
    for group in range(len(data)):
        tree = data[group]
        for response in range(tree.num_responses):
            path = tree.path(int(tree.response_last[response]))
            parts = [tree.tokens[tree.node_offsets[n] : tree.node_offsets[n + 1]] for n in path]
            first = list(path).index(int(tree.response_first[response]))
            prompt = sum(map(len, parts[:first]))
            tokens = np.concatenate(parts)
            num_targets = len(tokens) - prompt
            alone.append(
                MicroBatch(
                    tokens=tokens,
                    layout=TreeLayout.from_parents([len(tokens)], [-1]),
                    logit_token=np.arange(prompt - 1, len(tokens) - 1),
                    target_token=tokens[prompt:],
                    response=np.zeros(num_targets, np.int64),
                    response_ids=np.array([[group, response]]),
                    response_tokens=np.array([num_targets]),
                    pairs=np.zeros((0, 2), np.int64),
                    pair_ids=np.zeros((0, 2), np.int64),
                    pair_weights=np.zeros(0),
                    pair_margins=np.zeros(0),
                    ranks=np.array([-1]),
                    labels=np.array([np.nan]),
                    members=np.array([[0]]),
                    num_tokens=len(tokens),
                )
            )
    with join_world(config.parallel, config.train.seed) as world:
        initial = resolve_starting_model(config.model, [data])
        model = frozen_model(initial.transformer_config(config.train.seed), world)
        logps = score_rows(model, [to_device(row, world.device) for row in alone])
    expected = np.array([float(x[0]) for x in logps])
    scored = load_file(sidecar)[data.fingerprint]
    assert scored.dtype == np.float64 and scored.shape == expected.shape
    assert np.abs(scored - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    assert np.abs(np.diff(expected)).min() > 1e-3, "responses too similar to see their order"


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"seed": 7, "steps": 2}},
        {"model": {"num_layers": 1}},
        {"model": {"init_method_std": 0.03}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"qk_layernorm": True}},
    ],
    ids=["seed", "layers", "std", "precision", "norm"],
)
def test_another_model_is_refused(sidecar, dataset, tmp_path, capsys, sections):
    """With the fingerprint of the one that made the file, and the run's own."""
    argv = train(tmp_path, dataset, loss=known(sidecar), **sections)
    message = refused(argv, capsys, sidecar, "reference model")
    theirs = json.loads(_header(sidecar)["__metadata__"]["megatron_prefix"])["model"][:16]
    assert theirs in message
    ours = message.split("this run's model has ")[1][:16]
    assert len(ours) == 16 and ours != theirs and set(ours) <= set("0123456789abcdef")


def _header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_damaged_file_is_refused(sidecar, dataset, tmp_path, capsys):
    """By a run; every kind of damage is in tests/unit/reference/test_sidecars.py."""
    data = bytearray(sidecar.read_bytes())
    data[-3] ^= 1
    (tmp_path / "ref").write_bytes(data)
    refused(train(tmp_path, dataset, loss=known(tmp_path / "ref")), capsys, tmp_path / "ref")


@pytest.mark.parametrize("damage", ["cut", "flipped", "another key", "nonsense"])
def test_saved_scores_that_do_not_fit_are_computed_again(
    sidecar, dataset, other, tmp_path, capsys, monkeypatch, damage
):
    """They are never used: the file is the one of a fresh start."""
    path = tmp_path / "ref"
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path, data={"valid": other})
    argv = ["score", "--config", config, "--output", str(path)]
    with monkeypatch.context() as patched:
        patched.setattr(PartialScores, "discard", lambda self: None)
        assert command(argv, capsys)[0] == 0
    kept = next((tmp_path / "ref.partial").iterdir())
    data = bytearray(kept.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[data.index(b"PK", 1500) - 50] ^= 16
    elif damage == "nonsense":
        data = bytearray(b"nothing of the kind")
    else:
        other_key = PartialScores(str(tmp_path / "x"), kept.stem, {"model": "other"}, 3)
        other_key.save(1)
        data = bytearray(next((tmp_path / "x.partial").iterdir()).read_bytes())
        shutil.rmtree(tmp_path / "x.partial")
    kept.write_bytes(data)
    path.unlink()
    assert command(argv, capsys)[0] == 0
    assert path.read_bytes() == sidecar.read_bytes()
    assert not (tmp_path / "ref.partial").exists()


def test_a_file_in_the_place_of_saved_scores_is_named(tmp_path):
    path = tmp_path / "ref"
    (tmp_path / "ref.partial").write_text("not a folder")
    scores = PartialScores(str(path), "train", {"model": "a"}, 3)
    with pytest.raises(RunError, match=f"--output {path}: cannot be written"):
        scores.save(1)
    assert (tmp_path / "ref.partial").read_text() == "not a folder"
