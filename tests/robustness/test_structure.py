"""Data sets, plans and sidecars with right checksums and wrong structure: exit 2 in every command.

No command may train on them, hang, or end in a traceback. Checksums detect damage, not forgery, so
only the structure can refuse them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from broken_sets import (
    MANIFESTS,
    PLAN_MANIFESTS,
    PLANS,
    SETS,
    change_manifest,
    manifest,
    seal_plan,
    seal_set,
)
from commands import command, refused, write_config
from hang_guard import limited
from safetensors.numpy import load_file, save_file

from megatron_prefix.__main__ import main
from megatron_prefix.data.steps.packed import PackedSteps
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.reference.sidecars import _digest

UNSAVED = {"steps": 2, "save": None, "load": None, "save_interval": None}
ACCEPTED = {"weights that vanish"}
"""Unusual, and right: weights are relative to their sum."""


def copied(dataset: str, folder: Path) -> Path:
    shutil.copytree(Path(dataset).parent, folder)
    return folder / "set"


def set_commands(prefix: Path, folder: Path) -> dict[str, list[str]]:
    config = write_config(folder / "c.yaml", str(prefix), folder / "run", train=UNSAVED)
    rows = ["--row-capacity", "8192", "--global-batch-size", "2"]
    return {
        "inspect": ["inspect", str(prefix)],
        "inspect --verify": ["inspect", str(prefix), "--verify"],
        "inspect --tree": ["inspect", str(prefix), "--tree", "0"],
        "inspect --row": ["inspect", str(prefix), "--row", "0", "--row-capacity", "8192"],
        "pack": ["pack", str(prefix), "--output", str(folder / "plan"), *rows],
        "merge": ["merge", str(prefix), "--output", str(folder / "merged")],
        "plan": ["plan", "--config", config],
        "train": ["train", "--config", config],
        "score": ["score", "--config", config, "--output", str(folder / "ref")],
        "evaluate": ["evaluate", "--config", config, f"data.valid={prefix}"],
    }


def break_set(name: str, prefix: Path) -> None:
    if name in SETS:
        SETS[name](prefix)
        seal_set(prefix)
    else:
        manifest(MANIFESTS[name])(prefix)


CASES = [*SETS, *MANIFESTS]
FEW = ("a wrong length", "a token outside", "groups of nodes overflow", "a length of 10^400")
"""Cases that `make test` gives to every command; all of them are tried by the slow test."""


@pytest.mark.parametrize("name", CASES)
def test_a_forged_data_set_is_refused_from_python(dataset, tmp_path, name):
    prefix = copied(dataset, tmp_path / "copy")
    break_set(name, prefix)
    with limited(name):
        if name in ACCEPTED:
            assert len(PreferenceDataset(prefix)) == 8
            return
        with pytest.raises(InputError, match=str(prefix)):
            data = PreferenceDataset(prefix)
            for group in range(len(data)):
                data[group]
        with pytest.raises(InputError, match=str(prefix)):
            PreferenceDataset.verified(prefix)


@pytest.mark.parametrize("name", FEW)
def test_a_forged_data_set_is_refused_by_every_command(dataset, tmp_path, capsys, name):
    refuse_everywhere(dataset, tmp_path, capsys, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FEW])
def test_every_forged_data_set_is_refused_by_every_command(dataset, tmp_path, capsys, name):
    refuse_everywhere(dataset, tmp_path, capsys, name)


def refuse_everywhere(dataset: str, folder: Path, capsys, name: str) -> None:
    prefix = copied(dataset, folder / "copy")
    break_set(name, prefix)
    for text, argv in set_commands(prefix, folder).items():
        with limited((name, text)):
            if name in ACCEPTED:
                assert command(argv, capsys)[0] == 0, text
            else:
                refused(argv, capsys, prefix)
    if name not in ACCEPTED:
        assert sorted(p.name for p in folder.iterdir()) == ["c.yaml", "copy"], "something is left"


def test_the_sound_data_set_is_accepted_by_every_command(dataset, tmp_path, capsys):
    """Sealed again; otherwise every case above would be refused for its seal."""
    prefix = copied(dataset, tmp_path / "copy")
    before = (tmp_path / "copy" / "set.json").read_text()
    seal_set(prefix)
    assert json.loads((tmp_path / "copy" / "set.json").read_text()) == json.loads(before)
    for text, argv in set_commands(prefix, tmp_path).items():
        assert command(argv, capsys)[0] == 0, text


# Plans


@pytest.fixture(scope="module")
def plan(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "plan"
    rows = ["--row-capacity", "120", "--global-batch-size", "3", "--epochs", "2"]
    assert main(["pack", dataset, "--output", str(folder), *rows]) == 0
    return folder


def plan_commands(dataset: str, folder: Path, place: Path) -> dict[str, list[str]]:
    data = {"global_batch_size": 3, "row_capacity": 120, "plan": str(folder)}
    train = {**UNSAVED, "steps": None, "epochs": 2}
    config = write_config(place / "c.yaml", dataset, place / "run", data=data, train=train)
    return {
        "inspect": ["inspect", str(folder)],
        "inspect --verify": ["inspect", str(folder), "--verify"],
        "inspect --verify --data": ["inspect", str(folder), "--verify", "--data", dataset],
        "train": ["train", "--config", config],
    }


def break_plan(name: str, folder: Path) -> None:
    if name in PLANS:
        file, change = PLANS[name]
        values = np.load(folder / f"{file}.npy")
        np.save(folder / f"{file}.npy", change(values))
        seal_plan(folder)
    else:
        change_manifest(folder / "plan.json", PLAN_MANIFESTS[name])


NEEDS_DATA = ("another fill", "rows of 1 token")
"""Only the lengths of the data set's trees show that these are wrong."""
NEEDS_COUNTS = ("a group twice",)
"""`inspect` alone does not count how often a group occurs."""


@pytest.mark.parametrize("name", [*PLANS, *PLAN_MANIFESTS])
def test_a_forged_plan_is_refused_by_every_command(dataset, plan, tmp_path, capsys, name):
    folder = tmp_path / "plan"
    shutil.copytree(plan, folder)
    break_plan(name, folder)
    for text, argv in plan_commands(dataset, folder, tmp_path).items():
        with limited((name, text)):
            reads_data = "--data" in text or text == "train"
            is_accepted = (name in NEEDS_DATA and not reads_data) or (
                name in NEEDS_COUNTS and text == "inspect"
            )
            if is_accepted:
                assert command(argv, capsys)[0] == 0, text
            else:
                refused(argv, capsys)


def test_the_sound_plan_is_accepted_by_every_command(dataset, plan, tmp_path, capsys):
    for text, argv in plan_commands(dataset, plan, tmp_path).items():
        assert command(argv, capsys)[0] == 0, text
    assert len(PackedSteps(plan).columns["groups"]) == 16


# Sidecars


def reseal(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change header and arrays of a sidecar, and compute its checksum again."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["megatron_prefix"])
    arrays = load_file(path)
    change(header, arrays)
    if isinstance(header, dict) and "sha256" in header:
        header["sha256"] = _digest(header, arrays)
    save_file(arrays, path, {"megatron_prefix": json.dumps(header)})


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, dict], None]:
    def act(header: dict, arrays: dict) -> None:
        for name, values in arrays.items():
            arrays[name] = np.ascontiguousarray(change(values))

    return act


def with_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.concatenate([[value], values[1:]])


SIDECARS: dict[str, Callable[[dict, dict], None]] = {
    "a value of NaN": each(with_first(np.nan)),
    "an infinite value": each(with_first(-np.inf)),
    "a value above 0": each(with_first(0.5)),
    "a value too many": each(lambda v: np.append(v, -1.0)),
    "no value": each(lambda v: v[:0]),
    "in two dimensions": each(lambda v: v[:, None]),
    "as float32": each(lambda v: v.astype(np.float32)),
    "as bytes": each(lambda v: v.view(np.uint8)),
    "no array": lambda header, arrays: arrays.clear(),
    "no data set": lambda header, arrays: header.update(datasets={}),
    "data sets as a list": lambda header, arrays: header.update(datasets=[]),
    "data sets as numbers": lambda header, arrays: header.update(
        datasets=dict.fromkeys(header["datasets"], 1)
    ),
    "the model as a number": lambda header, arrays: header.update(model=3),
    "the model as a list": lambda header, arrays: header.update(model=[]),
    "no model": lambda header, arrays: header.pop("model"),
    "no checksum": lambda header, arrays: header.pop("sha256"),
    "another version": lambda header, arrays: header.update(version=1),
    "nothing": lambda header, arrays: header.clear(),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_forged_sidecar_is_refused(dataset, sidecar, tmp_path, capsys, name):
    path = tmp_path / "ref"
    shutil.copy(sidecar, path)
    reseal(path, SIDECARS[name])
    loss = {"reference": "precomputed", "ref_logps": str(path)}
    config = write_config(tmp_path / "c", dataset, tmp_path / "run", train=UNSAVED, loss=loss)
    for argv in (["train"], ["evaluate", f"data.valid={dataset}"]):
        with limited((name, argv)):
            refused([argv[0], "--config", config, *argv[1:]], capsys, path)
