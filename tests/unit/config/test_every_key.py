"""Every key of the schema with wrong values: accepted or an InputError that names it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from test_config import GOOD

from megatron_prefix.config import Config, ModelConfig, load_config, parse_config
from megatron_prefix.errors import InputError

LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def keys(section: type = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All keys, those of nested sections too, e.g. ("model", "rope_scaling", "factor")."""
    hints = get_type_hints(section)
    for field in fields(section):
        own = (*path, field.name)
        yield own
        for hint in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(hint, type) and is_dataclass(hint):
                yield from keys(hint, own)


KEYS = list(keys())
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 1 << 31, 10**18, -(10**18), 10**400, -(10**400), 10**5000),
    *(0.0, -0.0, -1.5, 0.5, 1.0, 1e-300, 1e300, -1e300, float("nan"), float("inf"), -float("inf")),
    *("", "1", "x", "\0", "nan", "é" * 1000, b"x", [], [1], {}, {"x": 1}, {1: 2}, {None: None}),
    *((), {1}, object(), [[[]]], {"type": "llama3"}),
]
TOO_LARGE = (10**400, 1e300, float("inf"))
WIDE = ("lr", "min_lr", "weight_decay", "clip_grad", "init_method_std", "moe_aux_loss_coeff")
"""Numbers that may be as large as float32 holds; so may all of the loss section."""


def with_value(path: tuple[str, ...], value: Any) -> dict:
    raw: dict = copy.deepcopy(GOOD)
    if path[:2] == ("model", "rope_scaling"):
        raw["model"]["rope_scaling"] = dict(LLAMA3)
    target = raw
    for part in path[:-1]:
        target = target.setdefault(part, {})
    target[path[-1]] = value
    return raw


def is_number(path: tuple[str, ...]) -> bool:
    section: Any = Config
    for part in path[:-1]:
        hint = get_type_hints(section)[part]
        section = next(x for x in (hint, *get_args(hint)) if is_dataclass(x))
    hint = get_type_hints(section)[path[-1]]
    return bool({int, float} & {hint, *get_args(hint)})


NUMBERS = [path for path in KEYS if is_number(path)]


def test_the_keys_are_those_of_the_sections():
    names = {".".join(path) for path in KEYS}
    assert {"data.seed", "model.rope_scaling.factor", "parallel.cp_comm", "logging.output"} <= names
    assert {"optimizer.lr", "train.steps", "model.num_layers"} <= {".".join(p) for p in NUMBERS}
    assert len(NUMBERS) > 40


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_any_value_is_accepted_or_refused(path):
    for value in WRONG:
        try:
            config = parse_config(with_value(path, value))
        except InputError as error:
            assert 0 < len(str(error)) < 5000
        else:
            text = config.to_yaml()
            assert parse_config(yaml.safe_load(text)) == config, (path, value)


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_a_number_has_bounds(path):
    for value in (*TOO_LARGE, float("nan"), -1, True, False, "3", [3]):
        with pytest.raises(InputError) as caught:
            parse_config(with_value(path, value))
        shown = repr(value) if not isinstance(value, int) or value < 1e20 else "1000000"
        assert f"{'.'.join(path)} = {shown}" in str(caught.value), value


PATHS = [
    *("data.train", "data.valid", "data.plan", "loss.ref_logps", "train.save", "train.load"),
    *("logging.output", "model.hf", "model.checkpoint"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["", "a\0b", "a" * 5000, "\ud800"])
def test_no_path(path, value):
    with pytest.raises(InputError, match=f"{path} = .*expected a path"):
        parse_config(with_value(tuple(path.split(".")), value))


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_the_message_names_the_bound(path):
    value = 10**39 if path[-1] in WIDE or path[0] == "loss" else 2**63
    with pytest.raises(InputError, match=r"less than (or equal to )?[0-9.e+]+"):
        parse_config(with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.seed", 2**63 - 1),
        ("train.seed", 2**63 - 1),
        ("data.row_capacity", 2**31 - 1),
        ("train.steps", 999_999_999),
        ("data.global_batch_size", 1_000_000),
        ("optimizer.lr", 1e30),
        ("optimizer.adam_eps", 1e-37),
        ("optimizer.adam_beta1", 0.0),
        ("parallel.distributed_timeout_minutes", 0.001),
        ("parallel.distributed_timeout_minutes", 1440),
        ("model.rotary_base", 1e9),
        ("model.norm_epsilon", 1e-12),
        ("model.make_vocab_size_divisible_by", 1),
        ("model.init_method_std", 1e-12),
        ("loss.beta", 1e-3),
    ],
)
def test_what_runs_use_is_within_the_bounds(path, value):
    parse_config(with_value(tuple(path.split(".")), value))


@pytest.mark.parametrize("key", ["global_batch_size", "rows_per_step", "micro_batch_size"])
def test_a_step_that_would_never_end_is_refused(key):
    with pytest.raises(InputError, match=f"data.{key} = 2147483647: .* 1048576"):
        parse_config(with_value(("data", key), 2**31 - 1))


def test_keys_that_are_not_text():
    for raw in ({1: {}}, {**GOOD, 1: {}}, {**GOOD, "model": {**GOOD["model"], 1: 2}}):
        with pytest.raises(InputError):
            parse_config(raw)


@pytest.mark.parametrize("value", ["1" * 5000, "1" * 400, "[" * 5000, "&a [*a]", "2026-01-01", "~"])
def test_values_as_yaml_reads_them(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    step = 40 if value.startswith("[[") else 1  # PyYAML takes most of a second to refuse this one
    for key in map(".".join, KEYS[::step]):
        try:
            load_config(path, [f"{key}={value}"])
        except InputError as error:
            assert len(str(error)) < 5000


def test_scaling_needs_an_order():
    with pytest.raises(InputError, match="high_freq_factor = 1.0 must be above low_freq_factor"):
        parse_config(with_value(("model", "rope_scaling", "high_freq_factor"), 1.0))


def test_a_configuration_that_an_older_run_wrote():
    """`config.yaml` as version 0.1.0 wrote it, every default included."""
    path = Path(__file__).with_name("old_config.yaml")
    config = load_config(path)
    assert (config.model.num_layers, config.train.seed, config.optimizer.adam_beta2) == (4, 7, 0.95)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_a_derived_size_out_of_bounds_is_refused():
    sizes = {"num_layers": 2, "ffn_hidden_size": 64, "hidden_size": 2**20}
    with pytest.raises(InputError, match="heads of 262144 channels, above 65536"):
        ModelConfig(**sizes, num_attention_heads=4).sizes()
