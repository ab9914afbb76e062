"""Every command line of README, the guide and the other pages is one that the program takes: its
command, its flags, and the names of the settings that it overrides."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_prefix.__main__ import COMMANDS, _parse
from megatron_prefix.config import parse_config
from megatron_prefix.config.load import _known_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")]
)
BEGINS = re.compile(
    r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*"
    r"(?:torchrun .*?-m megatron_prefix|python -m megatron_prefix|examples/launch/torchrun\.sh"
    r"|megatron-prefix)\s+(?=[a-z])"
)


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of each command of a page; lines that end with a backslash go on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = []
    for line in text.splitlines():
        if (begin := BEGINS.match(line)) is not None:
            words = shlex.split(line[begin.end() :], comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>", ">>", "&")]
            lines.append(words[: min(ends, default=len(words))])
    return lines


ALL = [(page, words) for page in PAGES for words in commands_of(page) if words[0] in COMMANDS]


def test_the_configuration_of_the_guide_is_accepted():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    config = parse_config(yaml.safe_load(block))
    assert config.train.generate is not None and config.loss.ref_logps == "prefs.ref"


def test_pages_have_commands():
    assert len(ALL) > 40
    assert {words[0] for _, words in ALL} >= {*COMMANDS} - {"compare"}


@pytest.mark.parametrize(
    "page, words", ALL, ids=[f"{page.name} {' '.join(words)[:60]}" for page, words in ALL]
)
def test_a_command_is_one_that_the_program_takes(page, words):
    args = _parse(words)
    for override in getattr(args, "overrides", []):
        setting = override.partition("=")[0].split(".")
        assert "=" in override and setting[-1] in _known_keys(tuple(setting[:-1])), override
    config = getattr(args, "config", None)
    if config is not None and config.startswith("examples/"):
        assert (ROOT / config).is_file(), config
