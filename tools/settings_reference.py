"""docs/settings.md, written from the schema: every setting with its type, default and meaning.

python tools/settings_reference.py            # write it
python tools/settings_reference.py --check    # exit with 1 if it is not current
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from megatron_prefix.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Every key of a run's YAML file, written from `megatron_prefix/config` by `python
tools/settings_reference.py`. A key without a default must be given, or its text tells the default.
`null` means that it is not set. Numbers out of their bounds are refused.
"""
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in fields(Config):
        kinds = sections_in(get_type_hints(Config)[section.name])
        parts += described(section.name, kinds[0], docstrings(Config).get(section.name, ""))
    return "\n".join(parts)


def described(name: str, section: type, note: str) -> Iterator[str]:
    """A heading, what the section is, and a table; then the sections within it."""
    yield f"## {name}\n"
    yield cell(note or inspect.getdoc(section) or "") + "\n"
    yield "| key | values | default | meaning |\n| --- | --- | --- | --- |"
    notes, hints, bare = docstrings(section), hints_of(section), get_type_hints(section)
    inner: list[tuple[str, type]] = []
    for field in fields(section):
        meaning = cell(notes.get(field.name, ""))
        yield f"| `{field.name}` | {values(hints[field.name])} | {default(field)} | {meaning} |"
        inner += [(f"{name}.{field.name}", kind) for kind in sections_in(bare[field.name])]
    yield ""
    for path, kind in inner:
        yield from described(path, kind, "")


def docstrings(section: type) -> dict[str, str]:
    """The text below each field, its own and those of its bases."""
    notes: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        name = ""
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
                notes[name] = str(node.value.value)
                name = ""
            else:
                name = ""
    return notes


def hints_of(section: type) -> dict[str, Any]:
    """The types of the fields, bounds included."""
    return get_type_hints(section, include_extras=True)


def sections_in(hint: Any) -> list[type]:
    """The dataclasses in a type."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [section for part in get_args(hint) for section in sections_in(part)]


def values(hint: Any, bounds: tuple = ()) -> str:
    """A type in words: its choices, or its kind and bounds."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return values(parts[0], (*parts[1:], *bounds))
    if origin in (Union, UnionType):
        return ", ".join(dict.fromkeys(values(p, bounds) for p in parts if p is not NoneType))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts if part is not None)
    if origin is tuple or origin is list:
        kinds = [part for part in parts if part is not Ellipsis]
        inner = ["sections, see below" if is_dataclass(x) else values(x) for x in kinds]
        return f"list of {' and '.join(dict.fromkeys(inner))}"
    if origin is not None and issubclass(origin, typing.Mapping):
        return f"names, each with {values(parts[1])}"
    if is_dataclass(hint):
        return "a section, see below"
    names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    limits = [f"{SIGNS[key]} {number(x)}" for b in bounds for key, x in limits_of(b)]
    return " ".join(
        [names.get(hint, getattr(hint, "__name__", str(hint))), ", ".join(limits)]
    ).strip()


def limits_of(bound: Any) -> list[tuple[str, Any]]:
    """Of a pydantic Field or one of its constraints: [("ge", 1), …]."""
    constraints = getattr(bound, "metadata", [bound])
    return [
        (key, getattr(x, key))
        for x in constraints
        for key in SIGNS
        if getattr(x, key, None) is not None
    ]


def number(value: float) -> str:
    """A limit as people write it: 2^31 and not 2147483648."""
    if isinstance(value, int) and value >= 1024 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default(field: Any) -> str:
    """Its default, in YAML's words."""
    value = field.default
    if isinstance(value, FieldInfo):  # pydantic's Field(default_factory=…)
        return "its defaults" if value.default_factory is not None else str(value.default)
    if value is MISSING:
        return "" if field.default_factory is MISSING else "its defaults"
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str) -> str:
    """A docstring as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
