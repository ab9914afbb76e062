"""A checkpoint by Megatron-Core's own saver, as Megatron-LM writes it, gives its weights and
executes nothing."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from small_models import make_model

from megatron_prefix.checkpoint.save_load import load_weights
from megatron_prefix.checkpoint.starting_model import StartingModel
from megatron_prefix.checkpoint.writing import write_checksums
from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.distributed.world import join_world

pytestmark = pytest.mark.sample


class Payload:
    """Creates the directory `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def starting_from(folder: Path) -> StartingModel:
    config = ModelConfig(
        checkpoint=str(folder),
        **{"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6},
    )
    sizes = config.sizes()
    assert sizes is not None
    return StartingModel(config=config, sizes=sizes, vocab_size=61, source=None, longest=9)


def test_the_weights_of_megatron_cores_own_saver_are_read(tmp_path):
    folder, marker = tmp_path / "iter_0000007", tmp_path / "executed"
    folder.mkdir()
    with join_world(ParallelConfig(), seed=0) as world:
        theirs, ours = make_model(world, seed=1), make_model(world, seed=2)
        state = {
            "model": theirs.sharded_state_dict(),
            "args": Namespace(num_layers=3),
            "iteration": 7,
            "checkpoint_version": 3.0,
        }
        dist_checkpointing.save(state, str(folder))
        common = folder / "common.pt"
        if common.exists():
            raw = torch.load(common, weights_only=False)
            torch.save(raw | {"payload": Payload(marker)}, common)
        else:  # from 0.19 on: a pickled object beside the tensors
            text = (folder / ".metadata").read_bytes()
            assert b"BytesStorageMetadata" in text and b"common_state" in text
        load_weights(folder, [ours])
        note = starting_from(folder).note(1)
        assert note is not None and "compared with the model section" in note
        write_checksums(folder)
        assert starting_from(folder).note(1) is None, "a checkpoint of this package has checksums"
        assert b"SavePlan" in (folder / ".metadata").read_bytes()
        weights = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    assert not marker.exists()
