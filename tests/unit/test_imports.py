"""The house's rules for imports, read from the source: order, circles, faces.

A package's face is what its `__init__` lists in `__all__`. Code outside a package imports from
its face only; code inside it may import its modules.

    from megatron_prefix.data.steps import Sampler            # from the face: everywhere
    from megatron_prefix.data.steps.sampler import Sampler    # only inside data/steps/
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "megatron_prefix"
LEVELS = (
    ("errors", "faces", "faults", "launcher", "other_names", "config", "layout", "platform")
    + ("text", "kernels"),
    ("attention", "objectives"),
    ("data", "model"),
    ("engine", "checkpoint", "distributed"),
    ("reference",),
    ("train", "trackers", "report"),
    ("estimate", "cli", "bridge"),
    ("__main__", "testing"),
)
"""Each may import from the levels before its own, and from its own without a circle."""
FEWEST, MOST = 3, 8
"""Names of a face."""


@dataclass(frozen=True)
class Import:
    """One imported name: `module` is what it is imported from, which may be a package."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name} from {self.module}"


class Package:
    """All modules below a folder, by dotted name without the package's own name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {self._dotted(p): p for p in sorted(folder.rglob("*.py"))}
        self.packages = {m for m, p in self.paths.items() if p.name == "__init__.py"}
        self._faces: dict[str, list[str]] = {}

    def _dotted(self, path: Path) -> str:
        parts = path.relative_to(self.folder).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of the package's own modules, also inside functions."""
        return [x for module in self.paths for x in self._imports_of(module)]

    def _imports_of(self, module: str) -> Iterator[Import]:
        for node in ast.walk(ast.parse(self.paths[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == NAME for a in node.names), module
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != NAME:
                continue
            assert node.level == 0, f"{module}: relative import"
            source = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                if inner in self.paths:
                    yield Import(module, inner, "(the module)", node.lineno)
                else:
                    yield Import(module, source, alias.name, node.lineno)

    def package_of(self, module: str) -> str:
        """The innermost package that holds `module`; a package is its own."""
        return module if module in self.packages else module.rpartition(".")[0]

    def face(self, package: str) -> list[str]:
        """`__all__` of a package, as written."""
        if package not in self._faces:
            self._faces[package] = self._read_face(package)
        return self._faces[package]

    def _read_face(self, package: str) -> list[str]:
        tree = ast.parse(self.paths[package].read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return ast.literal_eval(node.value)
        return []


def level_of(module: str) -> int:
    top = module.split(".")[0]
    return next(i for i, names in enumerate(LEVELS) if top in names)


def upward(package: Package) -> list[str]:
    """Imports from a later level."""
    return [
        str(x)
        for x in package.imports
        if x.importer and x.module and level_of(x.module) > level_of(x.importer)
    ]


def around_faces(package: Package) -> list[str]:
    """Imports from outside a package that do not go through its face."""
    wrong = []
    for x in package.imports:
        home = package.package_of(x.module)
        is_inside = home == "" or f"{x.importer}.".startswith(f"{home}.")
        if is_inside or x.importer == "":
            continue
        if x.module not in package.packages or x.name not in package.face(x.module):
            wrong.append(str(x))
    return wrong


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(edges.get(node, ())):
            if path_back := walk(target, [*path, node]):
                return path_back
        done.add(node)
        return []

    return next((cycle for node in sorted(edges) if (cycle := walk(node, []))), [])


def module_edges(package: Package) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for x in package.imports:
        edges.setdefault(x.importer or "(root)", set()).add(x.module or "(root)")
    return edges


def package_edges(package: Package, folder: str) -> dict[str, set[str]]:
    """Imports between the members of `folder`: its modules and packages."""
    prefix = f"{folder}." if folder else ""

    def member(module: str) -> str | None:
        return module[len(prefix) :].split(".")[0] if module.startswith(prefix) else None

    edges: dict[str, set[str]] = {}
    for x in package.imports:
        ours, theirs = member(x.importer), member(x.module)
        if ours and theirs and ours != theirs:
            edges.setdefault(ours, set()).add(theirs)
    return edges


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / NAME)


def test_every_module_has_a_level(package):
    tops = {module.split(".")[0] for module in package.paths if module}
    assert tops <= {name for names in LEVELS for name in names}


def test_no_import_goes_upward(package):
    assert upward(package) == []


def test_no_circle_among_modules(package):
    assert circle(module_edges(package)) == []


def test_no_circle_among_the_members_of_a_package(package):
    circles = {folder: circle(package_edges(package, folder)) for folder in package.packages}
    assert not {folder: path for folder, path in circles.items() if path}


def test_code_outside_a_package_imports_from_its_face(package):
    assert around_faces(package) == []


def test_a_face_has_few_names_that_exist(package):
    for name in sorted(package.packages - {"", "cli"}):
        face = package.face(name)
        assert FEWEST <= len(face) <= MOST, f"{name} exports {len(face)} names: {face}"
        module = importlib.import_module(f"{NAME}.{name}")
        assert all(hasattr(module, exported) for exported in face), name


def test_no_module_has_the_name_of_something_that_its_package_exports(package):
    for name in sorted(package.packages - {""}):
        modules = {m.rpartition(".")[2] for m in package.paths if m.rpartition(".")[0] == name}
        assert not modules & set(package.face(name)), name


@pytest.mark.parametrize(
    ("importer", "text", "check"),
    [
        ("config/load.py", "from megatron_prefix.data.store import PreferenceDataset", upward),
        ("engine/x.py", "from megatron_prefix.data.store.dataset import Y", around_faces),
        ("engine/x.py", "from megatron_prefix.data.store import Y", around_faces),
        ("engine/x.py", "from megatron_prefix.data.store import dataset", around_faces),
    ],
)
def test_a_wrong_import_is_found(tmp_path, importer, text, check):
    files = {
        "__init__.py": "",
        "data/__init__.py": "",
        "data/store/__init__.py": '__all__ = ["PreferenceDataset"]',
        "data/store/dataset.py": "",
        "config/__init__.py": "",
        "engine/__init__.py": "",
        importer: text,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert len(check(Package(tmp_path))) == 1
    (tmp_path / importer).write_text("")
    assert check(Package(tmp_path)) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_a_model_needs_no_triton():
    """torch for CPUs comes without it, so kernels are imported when they are used."""
    early = set()
    for path in (ROOT / "megatron_prefix").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module == "megatron_prefix.kernels":
                early |= {alias.name for alias in node.names}
    assert early == {"why_no_kernels"}
