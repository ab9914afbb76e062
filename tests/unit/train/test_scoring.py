"""Scoring refuses what it cannot do before it builds a model."""

import pytest
from tiny_models import tiny_config

from megatron_prefix.errors import InputError
from megatron_prefix.train import score_reference


def test_a_reward_model_has_no_reference_to_score(tmp_path):
    config = tiny_config("set", tmp_path, model={"kind": "reward"})
    with pytest.raises(InputError, match="has no reference, .* use evaluate --per-response"):
        score_reference(config, str(tmp_path / "ref"))


def test_the_directory_of_the_file_has_to_exist(tmp_path):
    with pytest.raises(InputError, match="--output .*absent/ref: no such directory"):
        score_reference(tiny_config("set", tmp_path), str(tmp_path / "absent" / "ref"))
