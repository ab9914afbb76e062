"""Mutants of deadlines and of what is read; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

FAULT_MUTANTS = (
    Mutant(
        "the last deadline does not end the process",
        "distributed/liveness.py",
        "            if is_over:\n",
        "            if is_over and is_told:\n",
        "unit/distributed/test_last_deadline.py",
    ),
    Mutant(
        "failures on other nodes not raised",
        "distributed/world.py",
        '            if kind != "result":\n',
        '            if kind == "nothing":\n',
        "unit/distributed/test_world.py",
    ),
    Mutant(
        "different data sets on the nodes accepted",
        "train/samplers.py",
        "if {*fingerprints, dataset.fingerprint} != {dataset.fingerprint}:",
        "if not {*fingerprints, dataset.fingerprint}:",
        "unit/train/test_samplers.py",
    ),
    Mutant(
        "files outside a checkpoint's folder read",
        "checkpoint/torch_dist.py",
        "if Path(place.relative_path).name != str(place.relative_path):",
        "if not Path(place.relative_path).name:",
        "robustness/test_payloads.py",
    ),
)
