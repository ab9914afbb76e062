"""docs/settings.md is current, and says something of every setting."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def reference():
    path = ROOT / "tools" / "settings_reference.py"
    spec = importlib.util.spec_from_file_location("settings_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    page = reference().page()
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == written, "run python tools/settings_reference.py"


def test_every_page_is_in_the_site():
    listed = re.findall(r"[a-z_]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_bounds_defaults_and_texts():
    page = reference().page()
    for line in (
        "| `row_capacity` | whole number ≥ 1, < 2^31 | null | Largest number of tokens in a row.",
        "| `sharing` | `tree`, `pair`, `response`, `none` | `tree` |",
        "| `temperature` | number ≥ 0, ≤ 100 | `0.0` |",
        "## train.generate",
        "| `prefix` | text |  | The PREFIX given to `build --output`. |",
    ):
        assert line in page, line
