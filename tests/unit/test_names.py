"""Names say what a variable holds: `found` or `here` could be anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMPTY_NAMES = {"found", "here", "said", "what"}


def assigned_names(source: str) -> list[tuple[int, str]]:
    """Line and name of every variable, attribute, argument, function, class and import.

    "x = 1\\ndef f(y): ..." -> [(1, "x"), (2, "f"), (2, "y")]
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.append((node.lineno, name))
            case ast.arg(arg=name):
                names.append((node.lineno, name))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.append((node.lineno, name))
            case ast.ClassDef(name=name) | ast.alias(asname=str(name)):
                names.append((node.lineno, name))
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                names.append((node.lineno, name))
    return sorted(names)


@pytest.mark.parametrize("folder", ["megatron_prefix", "tools", "tests"])
def test_names_say_what_they_hold(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    empty = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files
        for line, name in assigned_names(file.read_text(encoding="utf-8"))
        if name in EMPTY_NAMES
    ]
    assert files and empty == []


def test_every_way_to_assign_is_seen():
    lines = [
        "found = 1",
        "a, (*found, b) = c",
        "if found := d: pass",
        "for found in e: pass",
        "with f() as found: pass",
        "def found(): pass",
        "class found: pass",
        "lambda found: 1",
        "def g(*, found=1): pass",
        "import h as found",
        "[1 for found in i]",
        "self.found = 1",
        "found: int = 1",
        "try: pass\nexcept E as found: pass",
        "match j:\n    case [found]: pass",
    ]
    for line in lines:
        assert "found" in [name for _, name in assigned_names(line)], line
    assert assigned_names("print(found, what=self.here)") == []


def test_no_two_test_files_share_a_name():
    """pytest imports them as top-level modules, and would refuse the second one."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
