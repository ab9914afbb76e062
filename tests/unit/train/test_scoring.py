"""Scoring refuses what it cannot do before it builds a model, and prints how far it is."""

from itertools import count
from types import SimpleNamespace

import pytest
from tiny_models import tiny_config

from megatron_prefix.errors import InputError
from megatron_prefix.train import score_reference
from megatron_prefix.train.scoring import _progress


def test_a_reward_model_has_no_reference_to_score(tmp_path):
    config = tiny_config("set", tmp_path, model={"kind": "reward"})
    with pytest.raises(InputError, match="has no reference, .* use evaluate --per-response"):
        score_reference(config, str(tmp_path / "ref"))


def test_the_directory_of_the_file_has_to_exist(tmp_path):
    with pytest.raises(InputError, match="--output .*absent/ref: no such directory"):
        score_reference(tiny_config("set", tmp_path), str(tmp_path / "absent" / "ref"))


def test_progress_is_a_line_every_ten_seconds(capsys, monkeypatch):
    seconds = count(step=4)
    monkeypatch.setattr("megatron_prefix.train.scoring.time.monotonic", lambda: next(seconds))
    tell = _progress("prefs", SimpleNamespace(is_main=True))
    for step in range(3, 8):  # of a scoring that continues after step 2
        tell(step, 10)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "prefs: step 3/10"
    assert second == "prefs: step 6/10  left 0:00:16", "16 seconds for 4 steps"
    assert _progress("prefs", SimpleNamespace(is_main=False)) is None
