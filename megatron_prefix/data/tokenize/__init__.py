"""Examples -> token paths: tokenizers, chat templates, and where the loss of a response starts."""

from __future__ import annotations

from megatron_prefix.data.tokenize.base import Tokenizer
from megatron_prefix.data.tokenize.paths import PathEncoder
from megatron_prefix.data.tokenize.rendering import WARNINGS
from megatron_prefix.data.tokenize.selection import OVERFLOW_MODES, Selection, TooLong, select
from megatron_prefix.data.tokenize.tokenizers import load_tokenizer

__all__ = [
    "OVERFLOW_MODES",
    "WARNINGS",
    "PathEncoder",
    "Selection",
    "TooLong",
    "Tokenizer",
    "load_tokenizer",
    "select",
]
