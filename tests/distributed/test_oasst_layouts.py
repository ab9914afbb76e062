"""Every layout of test_layouts.py on OpenAssistant's trees: five steps equal to one process's."""

from __future__ import annotations

import gzip

import pytest
from runs import NUM_GROUPS, TIMEOUT_S, Runs, assert_same_history, on_processes
from test_layouts import OF_FOUR, OF_TWO, QWEN, REWARD, command

from megatron_prefix.data.build.builder import BuildOptions, build_dataset

pytestmark = pytest.mark.slow
ONES = {"one": {}, "one qwen": QWEN, "one reward": REWARD}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> Runs:
    """All layouts of two and of four processes, each count in one launch."""
    folder = tmp_path_factory.mktemp("oasst")
    with gzip.open(data_dir / "oasst_trees.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = sorted(file, key=len)[: NUM_GROUPS + 2]  # one or two lose all pairs
    (folder / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    options = BuildOptions(max_length=2048, overflow="drop")
    build_dataset([folder / "few.jsonl"], "bytes", folder / "few", options)
    runs = Runs(folder, str(folder / "few"), row_capacity=8192)
    ones = [command(runs, name, {}, sizes) for name, sizes in ONES.items()]
    on_processes(1, folder, ones, 2 * TIMEOUT_S)
    for count, layouts in ((2, OF_TWO), (4, OF_FOUR)):
        commands = [command(runs, n, layout, sizes) for n, (layout, sizes, _) in layouts.items()]
        on_processes(count, folder, commands, 10 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", [*OF_TWO, *OF_FOUR])
def test_a_layout_follows_one_process(runs, name, record_property):
    """`--junitxml FILE` keeps how near each layout came to the tolerance."""
    follows = {**OF_TWO, **OF_FOUR}[name][2]
    largest = assert_same_history(runs.lines(name), runs.lines(follows))
    record_property("largest share of the tolerance", f"{largest:.3f}")
