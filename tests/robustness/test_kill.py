"""A kill at any moment loses nothing but time: the same command continues, bit for bit.

Kills are SIGKILLs of both processes, with a distributed optimizer, that save after every step; in
the slow test, of torchrun's process group. A moment is a time after a step's line of metrics was
written, or after the directory of a save appeared, which is inside the save.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from commands import TIMEOUT_S, Launched, command, forked, launch, lines, write_config
from processes import Ranks, start_ranks

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.checkpoint.folder import iteration_dir
from megatron_prefix.reference import scoring as reference
from megatron_prefix.reference import sidecars as sidecar
from megatron_prefix.reference.sidecars import PartialScores
from megatron_prefix.testing import write_random_set

ZERO = {"use_distributed_optimizer": True}
STEPS = 16
LEARNING = {"lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 2}


class Killed:
    """A two-process run that is killed and started again by the same command."""

    def __init__(self, folder: Path, dataset: str, steps: int, torchrun: bool = False) -> None:
        self.folder, self.output, self.torchrun = folder, folder / "run", torchrun
        self.argv = [
            "train",
            "--config",
            write_config(
                folder / "run.yaml",
                dataset,
                self.output,
                parallel=ZERO,
                optimizer=LEARNING,
                train={"steps": steps, "save_interval": 1, "save": str(self.output / "saved")},
            ),
        ]

    def num_lines(self) -> int:
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def saves(self) -> set[Path]:
        return set((self.output / "saved").glob(".iter_*.partial-*"))

    def start(self) -> Launched | Ranks:
        if self.torchrun:
            return launch(self.argv, self.folder / "log")
        return start_ranks(2, partial(main, self.argv), self.folder)

    def kill_at(self, moment: str, delay: float, steps: int) -> str:
        """Start, and kill `delay` seconds after the moment. Returns what was printed."""
        before, old = self.num_lines(), self.saves()
        run = self.start()
        deadline = time.monotonic() + TIMEOUT_S
        while run.is_running() and time.monotonic() < deadline:
            grown = self.num_lines() - before >= steps
            if moment == "start" or (grown and (moment == "step" or self.saves() - old)):
                break
            time.sleep(0.001)
        time.sleep(delay)
        assert run.is_running(), f"the run ended before its kill: {run.text()}"
        run.kill()
        return run.text()

    def finish(self) -> str:
        run = self.start()
        codes = run.wait() if self.torchrun else run.wait(TIMEOUT_S)
        assert codes == (0 if self.torchrun else [0, 0]), run.text()[-3000:]
        return run.text()


def straight(folder: Path, dataset: str, steps: int) -> list[dict]:
    folder.mkdir()
    run = Killed(folder, dataset, steps)
    run.finish()
    return lines(run.output)


def test_a_run_killed_three_times_has_the_history_of_one_that_was_not(dataset, tmp_path):
    expected = straight(tmp_path / "straight", dataset, STEPS)
    run = Killed(tmp_path, dataset, STEPS)
    rng = random.Random(3)
    run.kill_at("step", rng.uniform(0, 0.1), 3)
    for _ in range(2):
        log = run.kill_at("save", rng.uniform(0, 0.02), 2)
        assert "resumed from" in log
    log = run.finish()
    assert "resumed from" in log and "after step" in log
    history = lines(run.output)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert history == expected
    assert not run.saves(), "leftovers of killed saves"


@pytest.mark.slow
def test_twenty_random_kills(dataset, tmp_path):
    expected = straight(tmp_path / "straight", dataset, 150)
    run = Killed(tmp_path, dataset, 150, torchrun=True)
    rng = random.Random(20)
    moments = ["start"] * 2 + ["step"] * 6 + ["save"] * 12
    rng.shuffle(moments)
    inside = 0
    for moment in moments:
        longest = {"start": 8.0, "step": 0.3, "save": 0.05}[moment]
        run.kill_at(moment, rng.uniform(0, longest), rng.randrange(1, 6))
        inside += bool(run.saves())
    run.finish()
    assert lines(run.output) == expected
    assert not run.saves()
    assert inside >= 5, f"only {inside} kills fell into a save"


def test_a_kill_within_a_save_leaves_the_previous_checkpoint(dataset, tmp_path, capsys):
    """At every stage of a save in turn: the earlier checkpoint is loaded, and is whole."""
    stages = [
        ("megatron_prefix.checkpoint.save_load", "make_room"),
        ("os", "fsync"),
        ("megatron_prefix.checkpoint.writing", "save_config"),
        ("megatron_prefix.checkpoint.save_load", "write_checksums"),
        ("megatron_prefix.checkpoint.save_load", "publish"),
    ]
    config = write_config(tmp_path / "a.yaml", dataset, tmp_path / "a", train={"steps": 3})
    assert command(["train", "--config", config], capsys)[0] == 0
    expected = lines(tmp_path / "a")
    for number, (module, name) in enumerate(stages):
        output = tmp_path / f"run{number}"
        argv = [
            "train",
            "--config",
            write_config(tmp_path / "b.yaml", dataset, output, train={"steps": 3}),
        ]
        code = forked(partial(_killed_in, argv, module, name), tmp_path / "log")
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        saved = output / "saved"
        assert (saved / "latest_checkpointed_iteration.txt").read_text() == "1"
        assert command(argv, capsys)[0] == 0
        assert lines(output) == expected, name
        assert not list(saved.glob(".iter*")) and len(list(saved.glob("iter_*"))) == 3


def _killed_in(argv: list[str], module: str, name: str) -> int:
    """Train, and die within the second save, after module.name."""
    owner = importlib.import_module(module)
    begin, saves = checkpoint.make_room, []

    def beginning(directory: Path) -> None:
        saves.append(directory)
        begin(directory)

    def dying(*args):
        if len(saves) == 2 and name == "publish":
            os.replace(
                args[1], iteration_dir(*args[::2])
            )  # in place, and the tracker does not name it yet
            os.kill(os.getpid(), signal.SIGKILL)
        result = action(*args)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    checkpoint.make_room = beginning
    action = getattr(owner, name)
    setattr(owner, name, dying)
    return main(argv)


def test_a_resumed_run_keeps_its_reference(dataset, tmp_path, capsys):
    """Rewards are measured from the initial weights, also after a resume: they are not 0."""
    config = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run", train={"steps": 4})
    argv = ["train", "--config", config]
    assert command([*argv, "train.steps=2"], capsys)[0] == 0
    assert command(argv, capsys)[0] == 0
    rows = {row["step"]: row for row in lines(tmp_path / "run")}
    assert rows[1]["rewards/chosen"] == 0
    assert abs(rows[3]["rewards/chosen"]) > 1e-4


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """PREFIX of 70 conversations: with one a step, scoring saves twice on its way."""
    return write_random_set(tmp_path_factory.mktemp("many") / "set", 2, 70)


@pytest.mark.parametrize("moment", ["first save", "inside a save", "last save", "at the end"])
def test_a_killed_score_ends_in_the_same_file(many, tmp_path, capsys, monkeypatch, moment):
    argv = [
        "score",
        "--config",
        write_config(tmp_path / "c.yaml", many, tmp_path / "run", data={"global_batch_size": 1}),
        "--output",
    ]
    assert main([*argv, str(tmp_path / "straight")]) == 0
    argv.append(str(tmp_path / "killed"))
    assert forked(partial(_score_killed, argv, moment), tmp_path / "log") == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    scored = []
    add = reference._add_scores
    monkeypatch.setattr(
        reference, "_add_scores", lambda *a: scored.append(a[2].plan.step) or add(*a)
    )
    capsys.readouterr()
    assert main(argv) == 0
    first = {"first save": 32, "inside a save": 32, "last save": 70, "at the end": 70}[moment]
    assert scored == list(range(first, 70))
    assert ("continuing after step" in capsys.readouterr().out) == (first > 0)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "straight").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("killed*")) == ["killed"]


def _score_killed(argv: list[str], moment: str) -> int:
    """Score, and die after a save of what is done, or before it is moved into place."""
    save, replace = PartialScores.save, os.replace

    def saving(self, step: int) -> None:
        save(self, step)
        if (moment == "first save") or (moment == "last save" and step == 70):
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source, target) -> None:
        is_partial = str(target).endswith(".npz")
        saved = os.path.exists(target)
        if (moment == "inside a save" and is_partial and saved) or (
            moment == "at the end" and not is_partial
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    PartialScores.save = saving
    sidecar.os.replace = replacing
    return main(argv)
