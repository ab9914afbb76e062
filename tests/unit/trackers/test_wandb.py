"""Weights & Biases: what is sent, under which axis, and how a resumed run goes on.

The service's client is a stand-in with its calls, so that the test needs neither the package nor
a network; the last test runs the package offline where it is installed.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from test_trackers import run_config

from megatron_prefix.config import parse_config
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.trackers import configured_trackers
from megatron_prefix.trackers.wandb import WandbTracker

SETTINGS = {"project": "alignment", "name": "first", "mode": "offline"}


class Client:
    """Stands in for the package: keeps what it is given."""

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.codes: list[int] = []
        self.fault: Exception | None = None
        self.run = SimpleNamespace(
            id="abc", define_metric=lambda *x, **y: None, log=self.log, finish=self.finish
        )

    def Settings(self, **settings) -> dict:  # noqa: N802 (the package's name)
        return settings

    def Image(self, path: str) -> str:  # noqa: N802
        return f"image of {path}"

    def init(self, **given):
        if self.fault is not None:
            raise self.fault
        self.started.append(given)
        return self.run

    def log(self, values: dict) -> None:
        if self.fault is not None:
            raise self.fault
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


@pytest.fixture
def client(monkeypatch) -> Client:
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def started(output, step: int = 0) -> WandbTracker:
    output.mkdir(exist_ok=True)
    tracker = WandbTracker()
    tracker.start(run_config(output, wandb=SETTINGS), step)
    return tracker


def test_values_figures_and_the_end_are_sent(client, tmp_path):
    tracker = started(tmp_path / "run")
    tracker.log(1, {"loss": 0.5})
    tracker.log(1, {"eval_loss": 0.25})
    tracker.figure("row", "row.png")
    tracker.finish("done")
    assert client.logged == [
        {"step": 1, "loss": 0.5},
        {"step": 1, "eval_loss": 0.25},
        {"step": 1, "row": "image of row.png"},
    ]
    (given,) = client.started
    assert {key: given[key] for key in SETTINGS} == SETTINGS and given["id"] is None
    assert given["config"]["optimizer"]["lr"] == 0.001 and client.codes == [0]


def test_a_resumed_run_goes_on_under_its_id(client, tmp_path):
    started(tmp_path / "run").finish("failed")
    started(tmp_path / "run", 2)
    started(tmp_path / "run")
    assert [given["id"] for given in client.started] == [None, "abc", None] and client.codes == [1]
    (tmp_path / "run" / "wandb.json").write_text("[")
    started(tmp_path / "run", 2)
    assert client.started[-1]["id"] is None, "a damaged file is as none"


def test_faults_are_named(client, tmp_path):
    tracker = started(tmp_path / "run")
    client.fault = OSError("no network")
    with pytest.raises(RunError, match=r"logging.wandb: step 3 could not be logged \(no network"):
        tracker.log(3, {"loss": 1.0})
    with pytest.raises(InputError, match="could not be started .* set logging.wandb.mode: offline"):
        started(tmp_path / "run")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        started(tmp_path / "run")


def test_the_section(client, tmp_path):
    config = run_config(tmp_path, wandb={"project": "p"})
    assert config.logging.wandb.mode == "online"
    assert parse_config(json.loads(json.dumps(_dumped(config)))) == config
    names = [type(x).__name__ for x in configured_trackers(config, 3)._trackers]
    assert names == ["JsonlTracker", "WandbTracker", "ProgressTracker"]
    for wrong in ({}, {"project": ""}, {"project": "p", "mode": "on"}, {"project": "p", "x": 1}):
        with pytest.raises(InputError, match="logging.wandb"):
            run_config(tmp_path, wandb=wrong)


def _dumped(config) -> dict:
    import yaml

    return yaml.safe_load(config.to_yaml())


def test_the_package_writes_offline(tmp_path):
    pytest.importorskip("wandb")
    tracker = started(tmp_path / "run")
    tracker.log(1, {"loss": 0.5})
    tracker.finish("done")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
