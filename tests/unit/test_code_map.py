"""The documentation's lists and links: docs/code_map.md has every file, and no link is broken."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_prefix"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRY = re.compile(r"(?P<indent> +)(?P<name>[\w.]+/?)  +\S")
"""A file or folder (with a slash), and the first letter of its phrase."""
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def listed_paths(page: str) -> list[str]:
    """Paths of the tree that a page draws, in its order; folders end with a slash.

    "    megatron_prefix/  …", "      data/  …", "        tree.py  …"
        -> megatron_prefix/, megatron_prefix/data/, megatron_prefix/data/tree.py
    """
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    is_tree = False
    for line in page.splitlines():
        is_tree = line.startswith("    ") and (is_tree or line.split()[0] == f"{PACKAGE.name}/")
        if not is_tree:
            continue
        entry = ENTRY.match(line)
        assert entry, f"neither a file nor a folder with a phrase: {line!r}"
        indent = len(entry["indent"])
        folders = [(i, folder) for i, folder in folders if i < indent]
        paths.append((folders[-1][1] if folders else "") + entry["name"])
        if entry["name"].endswith("/"):
            folders.append((indent, paths[-1]))
    return paths


def existing_paths() -> set[str]:
    """Files of the package; a folder with a slash for its `__init__.py`."""
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return {
        f"{(p.parent if p.name == '__init__.py' else p).relative_to(ROOT).as_posix()}"
        + "/" * (p.name == "__init__.py")
        for p in files
    }


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to a file or heading that does not exist."""
    broken = []
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if ":" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        exists = path.exists() and (not anchor or anchor in anchors(path))
        if not exists:
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


def test_every_file_is_listed_once():
    listed = Counter(listed_paths((ROOT / "docs/code_map.md").read_text(encoding="utf-8")))
    assert set(listed) == existing_paths()
    assert max(listed.values()) == 1


def test_the_tree_of_the_readme_exists():
    listed = listed_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    assert listed and set(listed) <= existing_paths() | {f"{PACKAGE.name}/"}
    packages = {path for path in existing_paths() if path.count("/") == 2 and path[-1] == "/"}
    assert packages <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    assert broken_links(page) == []


def test_what_is_wrong_is_found(tmp_path):
    tree = "    megatron_prefix/  x\n      data/  x\n        tree.py  x\n      layout.py  x\n"
    names = ["", "data/", "data/tree.py", "layout.py"]
    assert listed_paths(tree) == [f"megatron_prefix/{name}" for name in names]
    with pytest.raises(AssertionError, match="with a phrase"):
        listed_paths(tree + "      faces.py\n")
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[1](#a-heading) [2](#b) [3](page.md#a-heading) [4](x.md)")
    assert broken_links(page) == ["#b", "x.md"]
