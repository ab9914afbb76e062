"""Damage of every kind to everything that is read: a clear refusal, or nothing happened.

Written files (data sets, sidecars, checkpoints) have to notice any change of what they say. A
text that is still valid input is another valid input. What is never allowed is another exception
than InputError, a hang, or a silently different result.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from commands import write_config
from fuzz_images import EveryFuzz
from fuzz_kinds import Fuzz

from megatron_prefix.config import load_config
from megatron_prefix.data.build.builder import build_dataset
from megatron_prefix.distributed.world import join_world
from megatron_prefix.reference.sidecars import HEADER

SHARES = {
    "inputs": 30,
    "data_set": 30,
    "column": 20,
    "scores": 15,
    "saved": 20,
    "config": 15,
    "forged_set": 15,
    "plan": 10,
    "forged_plan": 10,
    "forged_scores": 5,
    "hugging_face": 5,
    "template": 5,
    "adapter": 5,
    "image_records": 5,
    "picture": 5,
    "image_set": 5,
}
"""Of 200 cases."""
KINDS = tuple(SHARES)


@pytest.fixture(scope="module")
def fuzz(finished, sidecar, dataset, other, tmp_path_factory) -> Iterator[Fuzz]:
    settings = load_config(write_config(tmp_path_factory.mktemp("c") / "c.yaml", dataset, finished))
    folder = tmp_path_factory.mktemp("fuzz")
    with join_world(settings.parallel, settings.train.seed) as world:
        yield EveryFuzz(folder, finished, sidecar, (dataset, other), world)


def run(fuzz: Fuzz, kind: str, num_cases: int, seed: int) -> None:
    refused, wrong = 0, []
    for number in range(num_cases):
        case = (kind, seed, number)
        try:
            refused += getattr(fuzz, kind)(random.Random(f"{kind} {seed} {number}"), case) is None
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join([f"{len(wrong)} of {num_cases}:", *wrong[:20]])
    assert refused >= num_cases // 3, "hardly anything was damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_cases(fuzz, kind):
    run(fuzz, kind, SHARES[kind], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_cases(fuzz, kind):
    run(fuzz, kind, 10 * SHARES[kind], seed=1)


def test_the_sound_inputs_are_accepted(fuzz, tmp_path):
    """The undamaged inputs are accepted; otherwise every case above would be refused."""
    for number, text in enumerate(fuzz.texts):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        build_dataset([path], "bytes", tmp_path / f"set{number}")
    assert sum(SHARES.values()) == 200
    assert HEADER.encode() in fuzz.sidecar.read_bytes()
