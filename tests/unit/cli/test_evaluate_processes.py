"""evaluate on one process takes the configuration of any layout, and says so."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

from megatron_prefix.cli.evaluate import _for_these_processes
from megatron_prefix.config import ParallelConfig

LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture
def config(tmp_path):
    return tiny_config(
        "set",
        tmp_path,
        model={"num_query_groups": 2},
        parallel={**LAYOUT, "distributed_timeout_minutes": 7.0},
    )


def test_one_process(config, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _for_these_processes(config).parallel == ParallelConfig(distributed_timeout_minutes=7.0)
    printed = capsys.readouterr().err
    assert "parallel.tensor_model_parallel_size = 2, parallel.sequence_parallel = True" in printed


def test_several_processes_keep_the_layout(config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _for_these_processes(config) == config
    assert capsys.readouterr().err == ""
