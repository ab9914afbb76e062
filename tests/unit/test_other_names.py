"""Settings of other programs are answered with settings that exist, and documented."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_prefix import other_names
from megatron_prefix.__main__ import main
from megatron_prefix.config import Config, parse_config
from megatron_prefix.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "names.md"
SECTIONS = {
    name: {x.name for kind in (hint, *get_args(hint)) if is_dataclass(kind) for x in fields(kind)}
    for name, hint in get_type_hints(Config).items()
}
GOOD = {"data": {"train": "x", "row_capacity": 8, "global_batch_size": 1}, "model": {"hf": "y"}}
GOOD |= {"optimizer": {"lr": 1.0}, "train": {"steps": 1}, "logging": {"output": "z"}}


def test_every_answer_names_settings_that_exist():
    for name, answer in other_names.OTHER_NAMES.items():
        for section, key in re.findall(r"\b([a-z]+)\.([a-z_0-9]+)", answer):
            if section in SECTIONS and key != "jsonl":
                assert key in SECTIONS[section], (name, answer)


def test_no_answered_name_is_a_setting_of_its_own_section():
    own = set().union(*SECTIONS.values())
    assert not own & set(other_names.OTHER_NAMES)


@pytest.mark.parametrize("table", ["TRL", "MEGATRON", "OTHERS"])
def test_the_page_has_the_table(table):
    lines = [f"| `{k}` | {v} |" for k, v in sorted(getattr(other_names, table).items())]
    assert "\n".join(lines) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("section", "key", "answer"),
    [
        ("train", "max_steps", "write train.steps"),
        ("optimizer", "warmup_ratio", "write optimizer.lr_warmup_fraction"),
        ("model", "tensor_model_parallel_size", "write parallel.tensor_model_parallel_size"),
        ("train", "zzz", "known keys: steps, epochs"),
    ],
)
def test_an_unknown_key_is_answered(section, key, answer):
    raw = copy.deepcopy(GOOD)
    raw[section][key] = 1
    with pytest.raises(InputError, match=re.escape(f"unknown key {section}.{key} ({answer}")):
        parse_config(raw)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--learning-rate", "1e-6"], "for --learning-rate write optimizer.lr"),
        (["--lora-alpha", "8"], "for --lora-alpha write lora.lora_alpha=…"),
        (["--sequence-parallel"], "for --sequence-parallel write parallel.sequence_parallel=…"),
        (["--bla=1"], "settings are section.key=value"),
    ],
)
def test_an_unknown_flag_is_answered(flags, answer, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "x.yaml", *flags])
    assert ended.value.code == 2 and answer in capsys.readouterr().err


def test_the_versions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.match(r"megatron-prefix .*, megatron-core .*, torch ", capsys.readouterr().out)
