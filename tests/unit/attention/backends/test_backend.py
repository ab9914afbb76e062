"""Every backend's record, and its import by name."""

import subprocess
import sys

import pytest

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
