"""What the numerics tests share: process groups, data sets, runs."""

from __future__ import annotations

import gzip
import itertools
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.steps.sharing import group_lengths
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.tree import PrefixTree, ResponsePath, build_tree
from megatron_prefix.testing import random_group, write_random_set

OPTIONS = BuildOptions(max_length=16384, overflow="drop")


@pytest.fixture(scope="module")
def world():
    """Process groups for tests that hold a model; `train` makes its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_prefix.config import ParallelConfig
        from megatron_prefix.distributed.world import join_world
    with join_world(ParallelConfig(), seed=0) as world:
        yield world


@pytest.fixture(scope="session")
def random_set(tmp_path_factory) -> str:
    """PREFIX of twelve random conversations of 15 to 100 tokens."""
    return write_random_set(tmp_path_factory.mktemp("random") / "set", 0, 12)


@pytest.fixture(scope="session")
def other_random_set(tmp_path_factory) -> str:
    """PREFIX of another twelve."""
    return write_random_set(tmp_path_factory.mktemp("other") / "set", 1, 12)


def _smallest_groups(source: Path, folder: Path, num_groups: int, num_read: int) -> str:
    """Build those of a file's first `num_read` groups that are least work for what they hold:
    with the fewest unshared tokens a comparison set."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = list(itertools.islice(file, num_read))
    (folder / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    build_dataset([folder / "all.jsonl"], "bytes", folder / "all", OPTIONS)
    built = PreferenceDataset(folder / "all")
    sets = np.array([built[group].response_sets.max() + 1 for group in range(len(built))])
    smallest = np.argsort(group_lengths(built, "none") / sets, kind="stable")[:num_groups]
    records = sorted(int(built.group_records[g]) for g in smallest)
    (folder / "few.jsonl").write_text("".join(lines[r] for r in records), encoding="utf-8")
    build_dataset([folder / "few.jsonl"], "bytes", folder / "few", OPTIONS)
    return str(folder / "few")


@pytest.fixture(scope="session")
def few_hh(data_dir, tmp_path_factory) -> str:
    """PREFIX of twelve short HH-RLHF pairs, in bytes."""
    folder = tmp_path_factory.mktemp("few_hh")
    return _smallest_groups(data_dir / "hh_pairs.jsonl.gz", folder, 12, 200)


@pytest.fixture(scope="session")
def few_oasst(data_dir, tmp_path_factory) -> str:
    """PREFIX of eight small OpenAssistant trees, one to five comparison sets each, in bytes."""
    folder = tmp_path_factory.mktemp("few_oasst")
    return _smallest_groups(data_dir / "oasst_trees.jsonl.gz", folder, 8, 75)


@pytest.fixture(scope="session")
def forest() -> tuple[list[PrefixTree], list[ResponsePath]]:
    """Five random conversations over 61 tokens, and the paths of all their responses in order."""
    rng = np.random.default_rng(11)
    groups = [random_group(rng, vocab_size=61) for _ in range(5)]
    return [build_tree(*group) for group in groups], [path for paths, _ in groups for path in paths]


@pytest.fixture(scope="module")
def alone(world, forest):
    """Outcome of every response of the forest alone, under a variant, by the dense backend."""
    from small_models import VARIANTS, chain, outcome, random_model

    @cache
    def compute(variant: str):
        model = random_model(world, attention_backend="dense", **VARIANTS[variant])
        return outcome(model, [chain(path.tokens, path.loss_start) for path in forest[1]])

    return compute
