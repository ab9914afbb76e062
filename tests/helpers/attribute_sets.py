"""A data set of responses with several attributes, built from records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_prefix.__main__ import main

NAMES = ("helpfulness", "verbosity", "tone")


def write_attributes(folder: Path, name: str, seed: int, num_groups: int) -> str:
    """PREFIX of lists of responses with three attributes, some of them unknown: how good the
    letters are, how many there are, and chance."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(num_groups):
        answers = []
        for rank in range(int(rng.integers(2, 5))):
            length = int(rng.integers(3, 12))
            answer = {
                "response": "".join(
                    chr(60 + 15 * rank + int(x)) for x in rng.integers(0, 8, length)
                ),
                "helpfulness": 2.0 - rank,
                "verbosity": length / 8,
                "tone": float(rng.normal()),
            }
            if rng.random() < 0.3:
                answer[str(rng.choice(NAMES[1:]))] = None
            answers.append(answer)
        records.append({"prompt": f"Letter {number}: ", "answers": answers})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["build", "--input", str(path), "--tokenizer", "bytes", "--output", str(folder / name)]
    assert main([*argv, "--attributes", *NAMES]) == 0
    return str(folder / name)
