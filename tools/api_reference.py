"""docs/api.md, written from the docstrings of the names that `megatron_prefix` exports.

python tools/api_reference.py            # write it
python tools/api_reference.py --check    # exit with 1 if it is not current

The source is read and not imported, so the page is the same with every version of Python, torch and
Megatron-Core.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
NAME = "megatron_prefix"
HEAD = """# API reference

The names of `import megatron_prefix as mp`, written from their docstrings by `python
tools/api_reference.py`. [library.md](library.md) shows them at work. Other names are the program's
own and may change at any time. Shapes: T tokens of a row, N heads, G groups or key/value heads, H
size of a head, R responses, P pairs.
"""
TOPICS = {
    "data": "Data sets, rows and steps",
    "layout": "Layout of a row",
    "attention": "Attention",
    "model": "Models",
    "objectives": "Objectives",
    "engine": "Steps of training",
    "reference": "Reference log-probabilities",
    "checkpoint": "Hugging Face models and checkpoints",
    "config": "Configuration",
    "platform": "Platform",
}
"""Heading by the first part of a module's name, in the order of the page."""
SETTINGS = {"LossConfig": "loss", "ModelConfig": "model"}
"""Sections of a configuration: settings.md has their fields."""
Definition = ast.ClassDef | ast.FunctionDef


def page() -> str:
    """The whole page."""
    by_topic: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for name, module in public_names().items():
        by_topic[module.split(".")[0]].append(name)
    parts = [HEAD]
    for topic, title in TOPICS.items():
        parts.append(f"## {title}\n")
        for name in sorted(by_topic[topic], key=str.lower):
            parts += described(name, name, public_names()[name])
    return "\n".join(parts).rstrip() + "\n"


@cache
def public_names() -> dict[str, str]:
    """Public name -> the module that it is imported from, without the package's own name; a module
    that is public by itself has its own name."""
    source = tree_of("")
    (listed,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    origins = imports_of(source)
    return {
        name: origins[name] or name for name in listed if name != "__version__" and name in origins
    }


def described(title: str, name: str, module: str) -> Iterator[str]:
    """A heading, the signature, the docstring, then fields and methods of a class; of a module what
    its face has."""
    yield f"### {title}\n"
    if name == module:
        yield text_of(tree_of(module))
        for inner in sorted(public_of(module)):
            yield from described(f"{name}.{inner}", inner, module)
        return
    definition = defined(name, module)
    if isinstance(definition, ast.FunctionDef):
        yield f"```python\n{signature(definition)}\n```\n"
        yield text_of(definition)
        return
    bases = ", ".join(ast.unparse(base) for base in definition.bases)
    yield f"```python\nclass {definition.name}{f'({bases})' * bool(bases)}\n```\n"
    yield text_of(definition)
    if name in SETTINGS:
        section = SETTINGS[name]
        yield f"Its fields are the settings of [section `{section}`](settings.md#{section}).\n"
    else:
        yield from fields_of(definition)
    yield from methods_of(definition)


def fields_of(definition: ast.ClassDef) -> Iterator[str]:
    """A table of the public fields that the class declares."""
    rows = []
    following = [*definition.body[1:], None]
    for node, after in zip(definition.body, following, strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not node.target.id.startswith("_"):
                default = f" = {ast.unparse(node.value)}" if node.value is not None else ""
                shown = f"{node.target.id}: {ast.unparse(node.annotation)}{default}"
                rows.append(f"| `{cell(shown)}` | {cell(note(after))} |")
    if rows:
        yield "\n".join(["| field | meaning |", "| --- | --- |", *rows]) + "\n"


def methods_of(definition: ast.ClassDef) -> Iterator[str]:
    """The public methods and properties that have a docstring, and the constructor."""
    rows = []
    for node in definition.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if (text := ast.get_docstring(node)) is None:
            continue
        kinds = {ast.unparse(x).rpartition(".")[2] for x in node.decorator_list}
        if kinds & {"property", "cached_property"}:
            returns = f": {ast.unparse(node.returns)}" if node.returns is not None else ""
            rows.append(f"- `{node.name}{returns}`: {' '.join(text.split())}")
        else:
            rows.append(f"- `{one_line(node)}`: {' '.join(text.split())}")
    if rows:
        yield "\n".join(rows) + "\n"


def signature(function: ast.FunctionDef) -> str:
    """On one line, or on a line for each parameter if that is too long."""
    line = one_line(function)
    if len(line) <= 100:
        return line
    arguments = function.args
    parts = [ast.unparse(x) for x in arguments.posonlyargs + arguments.args]
    defaults = [f" = {ast.unparse(x)}" for x in arguments.defaults]
    parts = [
        part + default
        for part, default in zip(parts, [""] * (len(parts) - len(defaults)) + defaults, strict=True)
    ]
    if arguments.vararg is not None:
        parts.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(ast.unparse(argument) + (f" = {ast.unparse(value)}" if value else ""))
    if arguments.kwarg is not None:
        parts.append(f"**{ast.unparse(arguments.kwarg)}")
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    inner = "".join(f"    {part},\n" for part in parts)
    return f"{function.name}(\n{inner}){returns}"


def one_line(function: ast.FunctionDef) -> str:
    """`name(arguments) -> result`, without self and cls."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    arguments = ast.unparse(function.args)
    for own in ("self, ", "cls, ", "self", "cls"):
        if arguments == own or (own.endswith(" ") and arguments.startswith(own)):
            arguments = arguments.removeprefix(own)
            break
    return f"{function.name}({arguments}){returns}"


def defined(name: str, module: str) -> Definition:
    """The definition of a name, through the faces that pass it on."""
    while True:
        source = tree_of(module)
        for node in source.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
        module = imports_of(source)[name]


def public_of(module: str) -> list[str]:
    """The functions and classes that the face of a package has."""
    return [name for name, origin in imports_of(tree_of(module)).items() if origin]


@cache
def tree_of(module: str) -> ast.Module:
    """The source of a module, by its name without the package's own."""
    path = ROOT.joinpath(NAME, *module.split(".")) if module else ROOT / NAME
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(source: ast.Module) -> dict[str, str]:
    """Name -> the module of the package that it comes from; "" for a module of the package."""
    origins = {}
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                origins[alias.name] = (node.module or "").partition(".")[2]
    return origins


def text_of(node: Definition | ast.Module) -> str:
    """The docstring as a paragraph of the page."""
    return inspect.cleandoc(ast.get_docstring(node) or "") + "\n"


def note(node: ast.stmt | None) -> str:
    """The text below a field."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return textwrap.dedent(str(node.value.value))
    return ""


def cell(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
