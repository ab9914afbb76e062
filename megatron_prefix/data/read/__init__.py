"""Files and data sets -> records -> Examples: the texts that are compared.

`formats` has one function per data format and says how to add one.
"""

from __future__ import annotations

from megatron_prefix.data.read.examples import ExampleReader, ReaderState
from megatron_prefix.data.read.mapping import parse_columns
from megatron_prefix.data.read.records import Inputs, Record
from megatron_prefix.data.read.texts import Message, Text, common_prefix

__all__ = [
    "ExampleReader",
    "Inputs",
    "Message",
    "ReaderState",
    "Record",
    "Text",
    "common_prefix",
    "parse_columns",
]
