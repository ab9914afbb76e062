"""Read a configuration from YAML, with dotted overrides.

    data:
      train: hh                  # PREFIX that `build` wrote
      global_batch_size: 64
    optimizer: {lr: 5e-6}

    load_config("run.yaml", ["optimizer.lr=1e-6"])

Unknown keys, wrong types and settings that exclude each other are refused with an InputError
that names the setting, its value and what to do. No setting is ever ignored.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_prefix.config.kinds import with_kind_defaults
from megatron_prefix.config.loss import RETIRED
from megatron_prefix.config.rules import check_rules
from megatron_prefix.config.schema import Config
from megatron_prefix.errors import InputError
from megatron_prefix.other_names import other_name

DEPENDENTS = {
    "data.valid": ("train.eval_interval", "train.keep_best"),
    "train.save": (
        "train.save_interval",
        "train.async_save",
        "train.keep_last",
        "train.keep_best",
    ),
    "train.load": ("train.load_fallback",),
    "loss.ref_logps": ("loss.reference",),
}
"""Settings that need another one."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; the stock loader keeps the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                problem = f"{name} is given twice: remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml_loader() -> type[yaml.SafeLoader]:
    """A loader that reads `1e-5` as a number, as YAML 1.2 does; in YAML 1.1 it is a string."""

    class Loader(_UniqueKeys):
        pass

    number = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), tell: Callable[[str], None] = _to_stderr
) -> Config:
    """Read and check a configuration.

    `overrides` are `section.key=value` with the value in YAML; the key may be one of a section in
    that section (`model.vision.freeze_tower=false`). One with the value null also unsets
    the keys of the file that need it (DEPENDENTS), and `tell` gets a line about it. Raises
    InputError.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader())
    except OSError as error:
        raise InputError(
            f"config {path}: {error.strerror}; give --config an existing file"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"config {path}: expected sections (data, model, …), found {_shown(raw)}")
    given = dict(_apply_override(raw, override) for override in overrides)
    for setting in [setting for setting, value in given.items() if value is None]:
        if unset := _unset_dependents(raw, setting, given):
            tell(f"{setting}=null also unsets {', '.join(unset)}")
    # `loss:` with nothing below it is an empty section
    return parse_config({k: {} if v is None else v for k, v in raw.items()}, str(path))


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    """Check nested dictionaries against the sections. Raises InputError naming every fault."""
    try:
        config = TypeAdapter(Config).validate_python(with_kind_defaults(raw))
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors(include_url=False))
        raise InputError(f"{source}: {faults}") from None
    try:
        check_rules(config, raw)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return config


def _unset_dependents(raw: dict[str, Any], setting: str, given: Collection[str]) -> list[str]:
    """Remove what needs `setting` and is not `given` on the command line; returns its names."""
    unset = []
    for dependent in DEPENDENTS.get(setting, ()):
        section, key = dependent.split(".")
        settings = raw.get(section)
        if dependent in given or not isinstance(settings, dict) or settings.get(key) is None:
            continue
        raw[section] = {name: value for name, value in settings.items() if name != key}
        unset.append(dependent)
    return unset


def _apply_override(raw: dict[str, Any], override: str) -> tuple[str, Any]:
    """Returns the setting and its value."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        answer = None if section == "" or dot else _elsewhere((section,))
        raise InputError(
            f"override {_shown(override)}: expected section.key=value, e.g. optimizer.lr=1e-6"
            + (f"; for {section} write {answer}" if answer else "")
        )
    try:
        value = yaml.load(text, _yaml_loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"override {_shown(override)}: the value is not YAML") from None
    *sections, name = path.split(".")
    if not all([*sections, name]):
        raise InputError(f"override {_shown(override)}: {path} has an empty part: correct it")
    inner = raw
    for depth, own in enumerate(sections, 1):
        below = inner.get(own)
        if not isinstance({} if below is None else below, dict):
            place = ".".join(sections[:depth])
            raise InputError(f"override {_shown(override)}: {place} is not a section in the file")
        inner[own] = dict(below or {})  # a copy: YAML may use one mapping in several places
        inner = inner[own]
    inner[name] = value
    return path, value


def _explain(fault: ErrorDetails) -> str:
    """One fault that pydantic reports, as a message: setting, value, reason."""
    # "(list)" and the like name the form of a setting that has several, see schema.py
    location = tuple(part for part in fault["loc"] if not str(part).startswith("("))
    setting = ".".join(str(part) for part in location)
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(location[:-1])
        if location[:-1] == ("loss",) and location[-1] in RETIRED:
            return f"unknown key {setting} (write {RETIRED[str(location[-1])]})"
        if (answer := _elsewhere(location)) is not None:
            return f"unknown key {setting} (write {answer})"
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known) or 'none'}"
        return f"unknown key {setting} ({hint})"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{setting} is missing"
    reason = f"{fault['msg'][0].lower()}{fault['msg'][1:]}"
    return f"{setting} = {_shown(fault['input'])}: {reason}"


def _elsewhere(location: tuple[int | str, ...]) -> str | None:
    """Where the key of `location` is, if it belongs to another section or program."""
    name = str(location[-1])
    sections = [key for key in _known_keys(()) if name in _known_keys((key,))]
    return f"{sections[0]}.{name}" if len(sections) == 1 else other_name(name)


def _shown(value: object) -> str:
    """`value` in at most 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at `location`, e.g. ("model", "rope_scaling")."""
    section: type = Config
    for part in location:
        if isinstance(part, int):  # an entry of a list of sections
            continue
        sections = _sections(get_type_hints(section).get(str(part)))
        if not sections:
            return []
        section = sections[0]
    return [field.name for field in fields(section)]


def _sections(hint: object) -> list[type]:
    """The dataclasses in a type: [TrainSet] in `str | tuple[TrainSet, ...]`."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [section for part in get_args(hint) for section in _sections(part)]
