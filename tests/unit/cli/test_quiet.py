"""What a command does not print on a machine with a CUDA compiler and without a GPU."""

from __future__ import annotations

import logging
import warnings

import torch
from torch.utils import cpp_extension

from megatron_prefix.cli import options


def test_a_compiler_without_a_gpu_is_no_warning(monkeypatch):
    """Only this message of this logger is left out, and it is torch's own."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(cpp_extension.__name__)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", "/somewhere")
    assert cpp_extension._find_cuda_home() == "/somewhere"
    assert len(records) == 1, "torch does not warn any more: remove the filter"
    with warnings.catch_warnings():
        options.quiet_megatron()
        options.quiet_megatron()
    assert len(logger.filters) == 1
    cpp_extension._find_cuda_home()
    assert len(records) == 1
    logger.warning("another message")
    assert [record.getMessage() for record in records[1:]] == ["another message"]
