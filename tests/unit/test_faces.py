"""Lazy faces: names are imported at first use; unknown names are refused."""

import subprocess
import sys

import pytest

from megatron_prefix import platform
from megatron_prefix.faces import lazy_face


def test_a_name_is_imported_at_its_first_use():
    get = lazy_face("megatron_prefix", layout=["TreeLayout"], data__tree=["build_tree"])
    assert get("TreeLayout").__module__ == "megatron_prefix.layout"
    assert get("build_tree").__module__ == "megatron_prefix.data.tree"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'megatron_prefix.platform' has no attribute 'gpu'"):
        platform.gpu  # noqa: B018


def test_a_light_name_loads_nothing_heavy():
    code = (
        "import sys\nfrom megatron_prefix.platform import end_with_parent\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
