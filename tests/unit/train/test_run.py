"""A run tells its trackers how it ended. Whole runs: tests/numerics and tests/robustness."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from megatron_prefix.errors import RunError, Stopped
from megatron_prefix.testing import write_random_set
from megatron_prefix.train import run


@pytest.mark.parametrize(
    ("end", "status"),
    [(None, "done"), (Stopped("by a signal"), "stopped"), (RunError("x"), "failed")],
)
def test_the_trackers_get_the_status(tmp_path, monkeypatch, end, status):
    statuses = []

    class Run:
        """In the place of a trainer."""

        step = 2
        held_out = SimpleNamespace(worst_pairs=list)
        config = tiny_config("set", tmp_path)
        initial = SimpleNamespace(sizes=SimpleNamespace(num_moe_experts=0))

        def close(self, status, ends_at_once) -> None:
            assert not ends_at_once
            statuses.append(status)

        def run(self, stop) -> None:
            assert not stop.is_asked()
            if end is not None:
                raise copy(end)  # one that is raised keeps the run's frames

    valid = write_random_set(tmp_path / "valid", 1, 2)
    config = tiny_config(write_random_set(tmp_path / "set", 0, 4), tmp_path, data={"valid": valid})

    def prepare(given, dataset, valid, world, plan):
        assert (given, len(dataset), plan) == (config, 4, None)
        assert [len(held_out) for held_out in valid.values()] == [2]
        return Run()

    monkeypatch.setattr(run, "prepare_trainer", prepare)
    monkeypatch.setattr(run, "report_run", lambda folder: f"{folder}/report.html")
    if end is None:
        run.train(config)
    else:
        with pytest.raises(type(end)):
            run.train(config)
    assert statuses == [status]
