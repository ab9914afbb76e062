"""Every backend's record, and its import by name."""

import subprocess
import sys

import pytest
import torch

from megatron_prefix.attention.backends.backend import BACKENDS, Backend, load_backend


def test_every_backend_has_a_record():
    assert BACKENDS[0] == "dense"
    for name in BACKENDS:
        assert isinstance(load_backend(name), Backend), name


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'backend' is unknown; use one of dense, path"):
        load_backend("backend")


def test_backends_are_imported_when_they_are_used():
    code = (
        "import sys\nfrom megatron_prefix.attention.backends import load_backend\n"
        "names = {f'megatron_prefix.attention.backends.{x}' for x in ('dense', 'flex', 'te')}\n"
        "assert not names & set(sys.modules)\nload_backend('dense')\n"
        "assert names & set(sys.modules) == {'megatron_prefix.attention.backends.dense'}\n"
        "assert not {'megatron.core', 'transformer_engine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_soft_caps_are_refused_by_flash_as_long_as_torchs_operator_has_none():
    """A torch whose operator takes a soft cap fails here: then it can be passed on."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert "window_size_left" in names and "softcap" not in names
    lacks = load_backend("flash").obstacle(torch.device("cpu"), torch.bfloat16, 64, ["softcap"])
    assert "no soft cap" in lacks and "flex, path or auto" in lacks
