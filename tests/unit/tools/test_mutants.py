"""The lists of mutants match the code: every text to replace occurs once, every test exists."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from mutant_list import MUTANTS  # noqa: E402
from mutant_list_cuda import CUDA_MUTANTS  # noqa: E402
from mutant_list_data import DATA_MUTANTS  # noqa: E402
from mutant_list_faults import FAULT_MUTANTS  # noqa: E402
from mutant_list_lora import LORA_MUTANTS  # noqa: E402
from mutant_list_models import MODEL_MUTANTS  # noqa: E402
from mutant_list_objectives import OBJECTIVE_MUTANTS  # noqa: E402
from mutant_list_plan import PLAN_MUTANTS  # noqa: E402
from mutant_list_references import REFERENCE_MUTANTS  # noqa: E402
from mutant_list_steps import STEP_MUTANTS  # noqa: E402
from mutant_list_windows import WINDOW_MUTANTS  # noqa: E402

LISTS = {
    "mutant_list": MUTANTS,
    "mutant_list_data": DATA_MUTANTS,
    "mutant_list_faults": FAULT_MUTANTS,
    "mutant_list_lora": LORA_MUTANTS,
    "mutant_list_models": MODEL_MUTANTS,
    "mutant_list_objectives": OBJECTIVE_MUTANTS,
    "mutant_list_plan": PLAN_MUTANTS,
    "mutant_list_references": REFERENCE_MUTANTS,
    "mutant_list_steps": STEP_MUTANTS,
    "mutant_list_windows": WINDOW_MUTANTS,
    "mutant_list_cuda": CUDA_MUTANTS,
}
ALL = [mutant for mutants in LISTS.values() for mutant in mutants]


def test_every_list_is_run():
    lists = {path.stem for path in (ROOT / "tools").glob("mutant_list*.py")}
    assert lists == set(LISTS), "a list that nobody imports"


def test_names_are_unique():
    names = [mutant.name for mutant in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_has_its_tests(mutant):
    path = ROOT / "megatron_prefix" / mutant.file
    assert path.is_file(), f"megatron_prefix/{mutant.file} does not exist"
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    assert mutant.old and count == 1, f"{count} times in {mutant.file}: {mutant.old!r}"
    assert mutant.new != mutant.old
    ast.parse(text.replace(mutant.old, mutant.new))
    tests, _, name = mutant.tests.partition("::")
    assert (ROOT / "tests" / tests).is_file(), f"tests/{tests} does not exist"
    if name:
        assert f"def {name}(" in (ROOT / "tests" / tests).read_text(encoding="utf-8"), name
