"""Data sets and a finished run that the tests of robustness damage copies of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from commands import write_config

from megatron_prefix.testing import write_random_set


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """PREFIX of eight conversations."""
    return write_random_set(tmp_path_factory.mktemp("data") / "set", 0, 8)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """PREFIX of five other ones."""
    return write_random_set(tmp_path_factory.mktemp("other") / "other", 1, 5)


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Path:
    """A run of two steps, with a checkpoint after each, and `hf/` in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_prefix.__main__ import main
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "run.yaml", dataset, folder, train={"steps": 2})
    assert main(["train", "--config", config]) == 0
    return folder


@pytest.fixture(scope="session")
def sidecar(dataset, other, tmp_path_factory) -> Path:
    """Reference log-probabilities of both data sets under the initial weights."""
    from megatron_prefix.__main__ import main

    folder = tmp_path_factory.mktemp("sidecar")
    config = write_config(folder / "c.yaml", dataset, folder, data={"valid": other})
    assert main(["score", "--config", config, "--output", str(folder / "ref")]) == 0
    return folder / "ref"
