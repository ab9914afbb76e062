"""Whatever a command raises ends in one line and an exit code, and the traceback in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.cli import plan


class Panic(BaseException):
    """As libraries in Rust raise it."""


def ends(error: BaseException, monkeypatch, capsys) -> str:
    """What the program prints if a command raises `error`."""

    def fail(args) -> None:
        raise error

    monkeypatch.setattr(plan, "run", fail)
    assert main(["plan", "--config", "absent.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "error", [KeyError("x\ny"), RecursionError(), OSError(5, "I/O"), Panic("p"), AssertionError()]
)
def test_a_fault_is_one_line_that_names_the_file_of_its_traceback(
    error, folder, monkeypatch, capsys
):
    line = ends(error, monkeypatch, capsys)
    assert line.startswith(f"megatron-prefix plan: error: {type(error).__name__}")
    assert "This is a fault of megatron_prefix, not of your input" in line
    (file,) = folder.glob("megatron-prefix-*.traceback.txt")
    assert line.endswith(str(file))
    assert "in fail" in file.read_text() and type(error).__name__ in file.read_text()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_memory_that_is_full_is_no_fault_of_the_program(error, folder, monkeypatch, capsys):
    line = ends(error, monkeypatch, capsys)
    assert ": error: out of memory (" in line and "megatron-prefix plan" in line
    assert "fault of megatron_prefix" not in line


def test_a_rank_names_itself_and_the_line_comes_without_a_file_too(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    line = ends(KeyError("x"), monkeypatch, capsys)
    assert re.search(r"error: rank 3: KeyError: 'x'\. .*no file \(No such file.*in fail", line)


@pytest.mark.parametrize("argv", [["plan", "--config", "absent.yaml"], ["plan", "--colour"], []])
def test_wrong_input_makes_the_file_of_a_launch_script(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_PREFIX_REFUSED", str(tmp_path / "refused"))
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and (tmp_path / "refused").exists()
    last = (tmp_path / "refused").read_text(encoding="utf-8")
    assert ": error: " in last and capsys.readouterr().err.endswith(last)
