"""Data sets and plans whose checksums are right and whose structure is wrong.

Each entry of SETS, PLANS and MANIFESTS changes one thing of a sound one; `seal_set` and `seal_plan`
compute all checksums again, as anybody can who can write the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_prefix.data.files.checksums import file_entry, manifest_digest
from megatron_prefix.data.store.index import HEADER
from megatron_prefix.data.store.manifest import fingerprint, suffix_path

Change = Callable[[Path], None]


def seal_set(prefix: Path) -> None:
    """Checksums, sizes and the fingerprint of a data set as its files have them now."""

    def seal(manifest: dict) -> None:
        for name in manifest["files"]:
            manifest["files"][name] = file_entry(suffix_path(prefix, name))
        images = manifest.get("images")
        manifest["fingerprint"] = fingerprint(manifest["files"], manifest["tokenizer"], images)

    change_manifest(suffix_path(prefix, ".json"), seal)


def seal_plan(folder: Path) -> None:
    def seal(manifest: dict) -> None:
        manifest["files"] = {name: file_entry(folder / name) for name in manifest["files"]}

    change_manifest(folder / "plan.json", seal)


def change_manifest(path: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A column replaced by a function of it."""

    def act(prefix: Path) -> None:
        path = suffix_path(prefix, f".tree/{name}.npy")
        np.save(path, change(np.load(path)), allow_pickle=True)

    return act


def entry(name: str, at: int | tuple[int, int], value: float) -> Change:
    """One entry of a column."""

    def change(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return array(name, change)


def tokens(change: Callable[[np.ndarray], None]) -> Change:
    def act(prefix: Path) -> None:
        path = suffix_path(prefix, ".bin")
        values = np.fromfile(path, np.uint16)
        change(values)
        values.tofile(path)

    return act


def index(offset: int, dtype: str, value: int) -> Change:
    """One number of the index, at a byte."""

    def act(prefix: Path) -> None:
        path = suffix_path(prefix, ".idx")
        data, number = bytearray(path.read_bytes()), np.array([value], dtype).tobytes()
        data[offset : offset + len(number)] = number
        path.write_bytes(data)

    return act


def manifest(change: Callable[[dict], object]) -> Change:
    return lambda prefix: change_manifest(suffix_path(prefix, ".json"), change)


def cycle(values: np.ndarray) -> np.ndarray:
    values[1:3] = 2, 1
    return values


def equal_pair(values: np.ndarray) -> np.ndarray:
    values[0, 1] = values[0, 0]
    return values


def overflowing(values: np.ndarray) -> np.ndarray:
    """Offsets whose differences overflow to numbers above 0."""
    values[1:3] = np.iinfo(np.int64).max, -5
    return values


BIG = 1 << 40
SETS: dict[str, Change] = {
    "parents in a cycle": array("node_parents", cycle),
    "a node is its own parent": entry("node_parents", 1, 1),
    "a parent below -1": entry("node_parents", 1, -5),
    "a parent far away": entry("node_parents", 1, 2**31 - 1),
    "a parent that is not on the path": array("node_parents", lambda v: np.where(v > 1, 1, v)),
    "a first node outside": entry("response_first", 0, 10**6),
    "a first node below 0": entry("response_first", 0, -1),
    "a last node outside": entry("response_last", 0, 10**6),
    "a last node below 0": entry("response_last", 0, -1),
    "first nodes in reverse order": array("response_first", lambda v: v[::-1].copy()),
    "a response against itself": array("pair_responses", equal_pair),
    "a pair outside": entry("pair_responses", (0, 1), 10**6),
    "a pair below 0": entry("pair_responses", (0, 0), -1),
    "a weight of NaN": entry("pair_weights", 0, np.nan),
    "an infinite weight": entry("pair_weights", 0, np.inf),
    "a weight below 0": entry("pair_weights", 0, -1.0),
    "weights of 0": array("pair_weights", lambda v: v * 0),
    "weights whose sum overflows": array("pair_weights", lambda v: v * 0 + 1e308),
    "weights that vanish": array("pair_weights", lambda v: v * 0 + 1e-300),
    "an infinite margin": entry("pair_margins", 0, np.inf),
    "an infinite score": entry("response_scores", 0, -np.inf),
    "a rank below -1": entry("response_ranks", 0, -2),
    "groups of nodes descend": array("group_nodes", lambda v: np.r_[v[0], v[2], v[1], v[3:]]),
    "groups of nodes below 0": entry("group_nodes", 1, -3),
    "groups of nodes far away": entry("group_nodes", 1, BIG),
    "groups of nodes end far away": entry("group_nodes", -1, BIG),
    "groups of nodes begin late": entry("group_nodes", 0, 1),
    "groups of nodes overflow": array("group_nodes", overflowing),
    "groups of responses far away": entry("group_responses", 1, BIG),
    "groups of responses overflow": array("group_responses", overflowing),
    "a group without a pair": array("group_pairs", lambda v: np.r_[v[0], v[0], v[2:]]),
    "records descend": array("group_records", lambda v: v[::-1].copy()),
    "records overflow": array("group_records", overflowing),
    "a record below 0": entry("group_records", 0, -1),
    "a group of no record": entry("group_num_records", 0, 0),
    "a group of very many records": entry("group_num_records", 0, 1 << 62),
    "a comparison set of its own": entry("response_sets", 0, 5),
    "a comparison set below 0": array("response_sets", lambda v: v * 0 - 1),
    "comparison sets far away": array("response_sets", lambda v: v * 0 + (2**31 - 1)),
    "a wrong length": entry("response_lengths", 0, 10**6),
    "lengths below 0": array("response_lengths", lambda v: -v),
    "lengths of 0": array("response_lengths", lambda v: v * 0),
    "prompts of 0": array("response_prompts", lambda v: v * 0),
    "prompts too long": array("response_prompts", lambda v: v + 10**6),
    "a token outside": tokens(lambda v: v.__setitem__(0, 60000)),
    "all tokens outside": tokens(lambda v: v.fill(300)),
    "the first id outside": tokens(lambda v: v.__setitem__(0, 258)),
    "parents as floats": array("node_parents", lambda v: v.astype("<f4")),
    "parents as int64": array("node_parents", lambda v: v.astype("<i8")),
    "parents of the other byte order": array("node_parents", lambda v: v.astype(">i4")),
    "parents as texts": array("node_parents", lambda v: v.astype("U8")),
    "parents in two dimensions": array("node_parents", lambda v: v[:, None].copy()),
    "pairs by columns": array("pair_responses", np.asfortranarray),
    "a parent missing": array("node_parents", lambda v: v[:-1].copy()),
    "a parent too many": array("node_parents", lambda v: np.r_[v, v[-1:]]),
    "a node of length 0": index(HEADER, "<i4", 0),
    "a node of length -1": index(HEADER, "<i4", -1),
    "a node of length 2^31 - 1": index(HEADER, "<i4", 2**31 - 1),
    "an index of 2^40 nodes": index(18, "<u8", BIG),
    "an index of 2^64 - 1 groups": index(26, "<u8", 2**64 - 1),
    "an index of another type": index(17, "<u1", 4),
}
"""Files; they are sealed afterwards."""


def set_item(*path: str, value: object) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


def without(*path: str) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


def vocabulary(size: object) -> Callable[[dict], None]:
    return set_item("tokenizer", "vocab_size", value=size)


MANIFESTS: dict[str, Callable[[dict], object]] = {
    "2^40 groups": set_item("counts", "groups", value=BIG),
    "2^4000 groups": set_item("counts", "groups", value=1 << 4000),
    "9 groups of 8": set_item("counts", "groups", value=9),
    "no group": set_item("counts", "groups", value=0),
    "no pair": set_item("counts", "pairs", value=0),
    "nothing": lambda m: m["counts"].update(dict.fromkeys(m["counts"], 0)),
    "counts are true": lambda m: m["counts"].update(dict.fromkeys(m["counts"], True)),
    "tokens missing": without("tokens"),
    "lengths missing": without("lengths"),
    "lengths of NaN": set_item("lengths", value=float("nan")),
    "a length as a text": set_item("lengths", "path", "max", value="9"),
    "a length of 10^400": set_item("lengths", "path", "max", value=10**400),
    "report missing": without("report"),
    "a report as a list": set_item("report", value=[]),
    "a report of wrong drops": set_item("report", value={"dropped": {"a": 1}}),
    "a report of wrong duplicates": set_item("report", value={"duplicates": {"records": [1]}}),
    "a report with another number of records": set_item("report", value={"num_records": "9"}),
    "a report with half a character": set_item("report", value={"notes": {"\ud800": 1}}),
    "tokens as a text": set_item("tokens", value="x"),
    "options as a list": set_item("options", value=["a"]),
    "inputs as a number": set_item("options", "inputs", value=3),
    "a tokenizer without a name": without("tokenizer", "name"),
    "a kind of tokenizer as a number": set_item("tokenizer", "kind", value=3),
    "a tokenizer as a list": set_item("tokenizer", value=[]),
    "a tokenizer that adds text": set_item("tokenizer", "end_of_text", value={"mode": 1}),
    "a vocabulary of 1": vocabulary(1),
    "a vocabulary of 0": vocabulary(0),
    "a vocabulary of 2^60": vocabulary(1 << 60),
    "a vocabulary of 258.0": vocabulary(258.0),
    "a vocabulary of true": vocabulary(True),
    "an unknown key": set_item("zzz", value=[1]),
    "another type of tokens": set_item("dtype", value="int32"),
    "a file outside": set_item("files", "../../x", value={"bytes": 1, "sha256": "0"}),
    "a file as a number": set_item("files", ".bin", value=7),
    "a column of another shape": set_item("columns", "pair_responses", value={"shape": [1 << 60]}),
    "a version as a number with a point": set_item("version", value=3.0),
}
PLANS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "a group outside": ("groups", lambda v: np.r_[10**6, v[1:]]),
    "a group below 0": ("groups", lambda v: np.r_[-1, v[1:]]),
    "a group twice": ("groups", lambda v: np.r_[v[1], v[1:]]),
    "steps descend": ("step_groups", lambda v: np.r_[v[0], v[2], v[1], v[3:]]),
    "steps overflow": ("step_groups", overflowing),
    "a step without rows": ("step_rows", lambda v: np.r_[v[0], v[0], v[2:]]),
    "rows end early": ("row_items", lambda v: np.r_[v[:-1], v[-1] - 1]),
    "rows far away": ("row_items", lambda v: np.r_[v[0], BIG, v[2:]]),
    "a bundle twice": ("items", lambda v: np.r_[v[1], v[1:]]),
    "a bundle outside": ("items", lambda v: np.r_[np.int32(10**6), v[1:]]),
    "a bundle below 0": ("items", lambda v: np.r_[np.int32(-1), v[1:]]),
    "bundles as floats": ("items", lambda v: v.astype("<f4")),
    "bundles in two dimensions": ("items", lambda v: v[:, None].copy()),
    "bundles missing": ("items", lambda v: v[:-1].copy()),
}
"""A file of a plan and what becomes of it."""
PLAN_MANIFESTS: dict[str, Callable[[dict], object]] = {
    "no settings": without("settings"),
    "settings as a list": set_item("settings", value=[]),
    "an unknown setting": set_item("settings", "speed", value=1),
    "rows of 0 tokens": set_item("settings", "row_capacity", value=0),
    "rows of 1 token": set_item("settings", "row_capacity", value=1),
    "rows as a text": set_item("settings", "row_capacity", value="900"),
    "steps of two sizes": set_item("settings", "rows_per_step", value=3),
    "another sharing mode": set_item("settings", "sharing", value="all"),
    "2^60 steps": set_item("counts", "steps", value=1 << 60),
    "another number of steps": set_item("counts", "steps", value=3),
    "no rows": set_item("counts", "rows", value=0),
    "whole steps beyond the end": set_item("counts", "whole_steps", value=10**6),
    "a fill of NaN": set_item("fill", value=float("nan")),
    "another fill": set_item("fill", value=0.5),
    "a file outside": set_item("files", "../../x", value={"bytes": 1, "sha256": "0"}),
    "data as a text": set_item("data", value="x"),
    "fewer groups": set_item("data", "groups", value=3),
    "more groups": set_item("data", "groups", value=10**12),
    "an unknown key": set_item("zzz", value=0),
}
