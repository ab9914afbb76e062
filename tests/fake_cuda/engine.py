"""Transformer Engine's own Python over C++ that is not there.

Its wheel without the compiled part is a directory (`make test-fake-cuda` installs it). What the C++
would compute has only shapes and dtypes here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.machinery
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine_overlap import OVERLAP
from engine_shapes import FUNCTIONS


class Extension(types.ModuleType):
    """`transformer_engine_torch`: functions that do nothing, except those set on it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=name)
        setattr(self, name, value)
        return value


def import_engine(folder: Path) -> Extension:
    """Import Transformer Engine from `folder`, on a device that torch says is there; returns the
    module in the place of its C++."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # then it looks for no compiled libraries
    sys.path.insert(0, str(folder))
    extension = Extension("transformer_engine_torch")
    sys.modules["transformer_engine_torch"] = extension
    export = "transformer_engine.pytorch.onnx_extensions"
    spec = importlib.machinery.ModuleSpec(export, None)
    sys.modules[export] = mock.MagicMock(name=export, __spec__=spec)
    for function in (*FUNCTIONS, *OVERLAP):
        setattr(extension, function.__name__, function)
    _enumerations(extension, folder / "transformer_engine" / "pytorch")
    import transformer_engine.common as common

    with _device(), mock.patch.object(common, "load_framework_extension", lambda name: None):
        import transformer_engine.pytorch  # noqa: F401
    _take_fake_tensors()
    return extension


@contextlib.contextmanager
def _device() -> Iterator[None]:
    """What is asked of the device when the modules are imported."""
    properties = types.SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132)
    answers = {"current_device": 0, "get_device_capability": (9, 0), "is_available": True}
    answers["get_device_properties"] = properties
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            answer = mock.patch.object(torch.cuda, name, lambda *_, value=value: value)
            stack.enter_context(answer)
        yield


def _take_fake_tensors() -> None:
    """Let the choice of a kernel take fake tensors for ordinary ones."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    choose = utils.get_attention_backend

    def chosen(params: Any) -> Any:
        return choose(dataclasses.replace(params, qkv_type=torch.Tensor))

    utils.get_attention_backend = chosen


def _enumerations(extension: Extension, source: Path) -> None:
    """The enumerations of the C++ that its Python mirrors and compares when it is imported."""
    text = (source / "constants.py").read_text()
    names = re.findall(r"^    (k\w+)\s*=", text[text.index("class DType") :], re.M)
    extension.DType = enum.IntEnum("DType", [(x, i) for i, x in enumerate(names)])
    text = (source / "cpp_extensions" / "fused_attn.py").read_text()
    text = text[text.index("class FusedAttnBackend") :]
    names = re.findall(r"^    (\w+)\s*=", text[: text.index("assert")], re.M)
    members = [(f"NVTE_{x}", i) for i, x in enumerate(names)]
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", members)
