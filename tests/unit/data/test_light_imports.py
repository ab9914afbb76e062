"""The data packages load neither torch nor Megatron-Core nor matplotlib."""

import subprocess
import sys

HEAVY = ("torch", "megatron", "matplotlib")


def loaded_after(code):
    """Which of HEAVY a fresh interpreter has loaded after `code`."""
    report = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", f"{code}; {report}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_of_data_is_light():
    code = "import megatron_prefix.data as data; [getattr(data, name) for name in data.__all__]"
    assert loaded_after(code) == "[]"


def test_every_package_below_data_is_light():
    packages = ("build", "files", "inspect", "read", "steps", "steps.packed", "store", "tokenize")
    names = [f"megatron_prefix.data.{name}" for name in (*packages, "store.verify")]
    assert loaded_after(f"import {', '.join(names)}") == "[]"


def test_the_check_sees_a_heavy_import():
    assert loaded_after("import matplotlib") == "['matplotlib']"
