"""Mutation tests: break one thing at a time in a copy of the repository; its tests must fail.

A mutant is a file, a text that occurs in it once, its replacement, and the tests that must fail.
If pytest reports failed tests the mutant is killed; if they pass it survives.

    python tools/mutants.py            # all of them
    python tools/mutants.py leaky      # those whose name or file has "leaky" in it
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutant_list import MUTANTS, Mutant
from mutant_list_cuda import CUDA_MUTANTS
from mutant_list_data import DATA_MUTANTS
from mutant_list_faults import FAULT_MUTANTS
from mutant_list_lora import LORA_MUTANTS
from mutant_list_models import MODEL_MUTANTS
from mutant_list_objectives import OBJECTIVE_MUTANTS
from mutant_list_plan import PLAN_MUTANTS
from mutant_list_references import REFERENCE_MUTANTS
from mutant_list_steps import STEP_MUTANTS
from mutant_list_windows import WINDOW_MUTANTS

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache")
IGNORED = (".git", ".venv", ".venv-oldest", *CACHES)
OUTPUTS = ("build", "quickstart")
"""Ignored in the repository's root only: `data/build` is a package."""
TESTS_FAILED = 1  # pytest's exit code
TIMEOUT_S = 900


def _ignored(folder: str, names: list[str]) -> set[str]:
    """Names that are not copied, as `shutil.copytree` asks for them."""
    ignored = {*IGNORED, *OUTPUTS} if Path(folder) == ROOT else set(IGNORED)
    return ignored & set(names)


def run(mutant: Mutant, scratch: Path) -> str:
    """`killed`, `survived`, or the reason why it was not tried."""
    copy = scratch / "repository"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=_ignored)
    path = copy / "megatron_prefix" / mutant.file
    text = path.read_text(encoding="utf-8")
    if mutant.old and text.count(mutant.old) != 1:
        return f"not applied: its text occurs {text.count(mutant.old)} times in {mutant.file}"
    if mutant.old:
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    data = os.environ.get("MEGATRON_PREFIX_DATA", str(ROOT.parent / "shared" / "data"))
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MEGATRON_PREFIX_DATA": data,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu", f"tests/{mutant.tests}"]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"not tried: no answer in {TIMEOUT_S} s"
    if done.returncode == TESTS_FAILED:
        return "killed"
    if done.returncode == 0:
        return "survived"
    return f"not tried: pytest exits with {done.returncode}: {done.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only mutants with one of these in name or file")
    args = parser.parse_args()
    chosen = [
        m
        for m in (
            *MUTANTS,
            *DATA_MUTANTS,
            *OBJECTIVE_MUTANTS,
            *PLAN_MUTANTS,
            *FAULT_MUTANTS,
            *LORA_MUTANTS,
            *MODEL_MUTANTS,
            *REFERENCE_MUTANTS,
            *STEP_MUTANTS,
            *WINDOW_MUTANTS,
            *CUDA_MUTANTS,
        )
        if not args.names or any(n in m.name or n in m.file for n in args.names)
    ]
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for tests in sorted({mutant.tests for mutant in chosen}):
            unbroken = Mutant("nothing", "__init__.py", "", "", tests)
            if (outcome := run(unbroken, Path(scratch))) != "survived":
                print(f"tests/{tests} must pass before anything is broken: {outcome}")
                return 1
        for mutant in chosen:
            outcome = run(mutant, Path(scratch))
            killed += outcome == "killed"
            print(f"{outcome:9} {mutant.name} ({mutant.file}; {mutant.tests})", flush=True)
    print(f"killed {killed} / {len(chosen)}")
    return killed != len(chosen)


if __name__ == "__main__":
    sys.exit(main())
