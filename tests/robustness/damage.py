"""Seeded damage to files: what disks, networks and hands do to bytes, and to JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

# Damage to bytes: each takes a random source and the bytes, and returns others.


def flip(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(len(data))]


def _slice(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice([1, 2, 8, 64, 1000]))


def duplicate(rng: random.Random, data: bytearray) -> bytearray:
    start, end = _slice(rng, data)
    return data[:end] + data[start:end] + data[end:]


def delete(rng: random.Random, data: bytearray) -> bytearray:
    start, end = _slice(rng, data)
    return data[:start] + data[end:]


def insert(rng: random.Random, data: bytearray) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 8, 100])) + data[at:]


def overwrite(rng: random.Random, data: bytearray) -> bytearray:
    start, end = _slice(rng, data)
    data[start:end] = rng.choice([bytes(end - start), b"\xff" * (end - start)])
    return data


ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    2**70,
    "",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
    "NaN",
    {"a": 1},
)


def odd_values(rng: random.Random, value: dict) -> None:
    """Another value, a key missing or renamed, two values swapped, somewhere in a JSON value."""
    places = list(_places(value))
    owner, key = rng.choice(places)
    change = rng.randrange(4)
    if change == 0 and isinstance(owner, dict):
        del owner[key]
    elif change == 1 and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    elif change == 2:
        second, at = rng.choice(places)
        if not _inside(owner[key], second) and not _inside(second[at], owner):
            owner[key], second[at] = second[at], owner[key]
    else:
        owner[key] = copy.deepcopy(rng.choice(ODD))


def change_json(rng: random.Random, data: bytearray) -> bytearray:
    """`odd_values` of a JSON text, or of one of its lines."""
    lines = bytes(data).splitlines(keepends=True) if data[:1] == b"{" else [bytes(data)]
    number = rng.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        value = None
    if not isinstance(value, dict | list):  # a line of a text over many lines, such as "0,"
        lines, number, value = [b""], 0, json.loads(data)
    odd_values(rng, value)
    lines[number] = json.dumps(value).encode() + b"\n"
    return bytearray(b"".join(lines))


def _places(value: object) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _inside(value: object, owner: object) -> bool:
    if value is owner:
        return True
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(_inside(x, owner) for x in inner)


BYTES = (flip, flip, truncate, duplicate, delete, insert, overwrite)


def damaged(rng: random.Random, path: Path, others: list[Path]) -> str:
    """Damage a file in place, or put another one there. Returns what was done."""
    data = path.read_bytes()
    kinds: list[Callable | str] = [*BYTES, "swap", "remove"]
    if path.suffix in (".json", ".yaml", ".jsonl"):
        kinds += [change_json] * 6
    kind = rng.choice(kinds)
    if kind == "remove":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(rng.choice(others).read_bytes())
    else:
        path.write_bytes(kind(rng, bytearray(data)))
    return f"{path.name}: {kind if isinstance(kind, str) else kind.__name__}"
