"""How many values functions return and callers expect, read from source files: nothing is run.

torch calls a private function of FlashAttention-4 and unpacks what it returns. From 4.0.0b20 on
that function returns more values than torch 2.11 to 2.13 unpack, which fails in the first forward
pass. Importing the package to look would need CUDA and compile kernels.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path


def returned_values(module: str, function: str) -> int | None:
    """The most values that `function` of `module` returns together; None if this cannot be read."""
    for node in _nodes(module):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            returns = [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
            sizes = [len(x.elts) for x in returns if isinstance(x, ast.Tuple)]
            return max(sizes, default=None)
    return None


def unpacked_values(module: str, function: str) -> int | None:
    """Into how many names `module` unpacks what a call of `function` returns; None if it takes any
    number, or if this cannot be read."""
    for node in _nodes(module):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        called, names = node.value.func, node.targets[0]
        if isinstance(called, ast.Attribute) and called.attr == function:
            if isinstance(names, ast.Tuple):
                takes_any = any(isinstance(x, ast.Starred) for x in names.elts)
                return None if takes_any else len(names.elts)
            return None
    return None


def _nodes(module: str) -> Iterator[ast.AST]:
    """The syntax tree of `module`, without importing the module itself; nothing if it is absent."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # a parent package is missing, or fails
        return
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return
    yield from ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
