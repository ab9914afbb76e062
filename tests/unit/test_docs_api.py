"""docs/api.md is current and has every public name, with a text that a reader can use."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import megatron_prefix

ROOT = Path(__file__).resolve().parents[2]


def reference():
    spec = importlib.util.spec_from_file_location("api", ROOT / "tools" / "api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert reference().page() == written, "run python tools/api_reference.py"


def test_every_public_name_has_a_text():
    """A heading for each, and below it a sentence that is no code, table or list."""
    sections = re.split(r"^### ", reference().page(), flags=re.M)[1:]
    texts = {}
    for section in sections:
        name, _, rest = section.partition("\n")
        texts[name] = re.sub(r"```python\n.*?```", "", rest, flags=re.S).strip()
    public = {name for name in megatron_prefix.__all__ if name != "__version__"}
    assert public == {name for name in texts if "." not in name}
    assert "platform.adapted" in texts
    for name, text in texts.items():
        assert re.match(r"[A-Z`(]", text) and "." in text, name


def test_signatures():
    page = reference().page()
    for line in (
        "score_targets(tree: PrefixTree) -> TreeTargets",
        "    backend: str = 'auto',\n",
        ") -> PreferenceDataset\n",
        "class TreeTransformerConfig(TransformerConfig)",
        "- `from_parents(",
        "[section `loss`](settings.md#loss)",
    ):
        assert line in page, line
    assert "self" not in re.findall(r"\w+", "".join(re.findall(r"```python\n.*?```", page, re.S)))
