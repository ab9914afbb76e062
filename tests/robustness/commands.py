"""The program as a user runs it: commands here, in a fork, or on two processes by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import processes

from megatron_prefix.__main__ import main
from megatron_prefix.train.pace import MEASURED

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
TIMEOUT_S = 120
MARK = "MEGATRON_PREFIX_TEST_RUN"
"""Environment variable by which a run's processes are found, whoever their parent is."""


def write_config(path: Path, dataset: str, output: Path, **sections: dict) -> str:
    """A run of eight steps of two groups, saved in `output`/saved after each; returns the path."""
    saved = str(output / "saved")
    defaults: dict[str, dict] = {
        "data": {"train": dataset, "global_batch_size": 2, "row_capacity": 8192},
        "model": SIZES,
        "parallel": {},
        "loss": {},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 8, "save": saved, "load": saved, "save_interval": 1},
        "logging": {"output": str(output)},
    }
    assert sections.keys() <= defaults.keys()
    merged = {name: {**keys, **sections.get(name, {})} for name, keys in defaults.items()}
    path.write_text(json.dumps(merged))
    return str(path)


def command(argv: list[str], capsys) -> tuple[int, str]:
    """Run the program in this process. Returns its exit code and its error message."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


def refused(argv: list[str], capsys, *words: str) -> str:
    """Check that the program exits with 2 and one message that has `words`; returns it."""
    code, message = command(argv, capsys)
    assert code == 2, (code, message)
    assert "Traceback" not in message and message.count(": error: ") == 1, message
    assert all(str(word) in message for word in words), message
    return message


def lines(output: Path) -> list[dict]:
    """A run's metrics without what a clock wrote; every line has to be whole."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def forked(action: Callable[[], int | None], log: Path) -> int:
    """Run `action` in another process. Returns its exit code, below 0 for a signal."""
    return processes.forked(action, log, TIMEOUT_S)


@dataclass
class Launched:
    """A run on two processes that torchrun watches over."""

    process: subprocess.Popen
    mark: str
    log: Path

    def pids(self) -> list[int]:
        """Every process of the run that is alive, torchrun too."""
        wanted, pids = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                if wanted in (folder / "environ").read_bytes().split(b"\0") and not is_zombie:
                    pids.append(int(folder.name))
            except OSError:
                continue
        return pids

    def is_running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        """What torchrun and the ranks printed."""
        return self.log.read_text()

    def ranks(self) -> list[int]:
        return [pid for pid in self.pids() if pid != self.process.pid]

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end: {self.log.read_text()[-2000:]}") from None

    def kill(self) -> None:
        """SIGKILL to torchrun's process group; every rank has to end by it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        deadline = time.monotonic() + 10
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.02)
        left = self.pids()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"{len(left)} processes outlived the run"


def launch(
    argv: list[str],
    log: Path,
    program: tuple[str, ...] = ("-m", "megatron_prefix"),
    flags: tuple[str, ...] = (),
) -> Launched:
    """Start a program on two processes, in a process group of their launcher's own; `flags` are
    torchrun's."""
    from megatron_prefix.testing import free_port

    mark = uuid.uuid4().hex
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*torchrun, f"--master-port={free_port()}", *flags, *program, *argv],
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Launched(process, mark, log)
