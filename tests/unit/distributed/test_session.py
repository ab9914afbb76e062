"""The set-up of every command: process groups end with it, and kernels are checked before work."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config

from megatron_prefix.distributed import open_session
from megatron_prefix.errors import InputError


def test_process_groups_end_with_the_context(tmp_path):
    config = tiny_config("set", tmp_path)
    for _ in range(2):
        with pytest.raises(KeyError), open_session(config) as world:
            assert torch.distributed.is_initialized() and world.is_main
            raise KeyError("inside")
        assert not torch.distributed.is_initialized()


def test_a_kernel_that_is_not_there_is_refused(tmp_path):
    config = tiny_config("set", tmp_path, model={"attention_backend": "flash", "flash_version": 4})
    with (
        pytest.raises(InputError, match="model.flash_version 4 cannot be used: "),
        open_session(config),
    ):
        raise AssertionError("entered")
    assert not torch.distributed.is_initialized()
