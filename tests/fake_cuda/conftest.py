"""Runs on a fake CUDA device, each a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prefix.testing import write_random_set

HERE = Path(__file__).parent
HAS_CUDA_BUILD = torch.version.cuda is not None
COMPILER = shutil.which("g++") or (shutil.which("cc") if HAS_CUDA_BUILD else None)
ENGINE = os.environ.get("FAKE_CUDA_ENGINE")
"""Transformer Engine's Python, without its C++; `make test-fake-cuda` installs it."""


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    """A library that stands in for CUDA's driver, or for the guard of its devices."""
    if COMPILER is None or sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("needs a C++ compiler, Linux, and no GPU")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    if HAS_CUDA_BUILD:
        command += ["-x", "c", str(HERE / "driver.c")]
    else:
        root = Path(torch.__file__).parent
        command += ["-std=c++20", f"-I{root / 'include'}", str(HERE / "guard.cpp")]
        command += [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-lc10"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def steps(driver, tmp_path):
    """`steps(processes, sections, *plant)`: the finished process; with `has_engine` Transformer
    Engine is there."""

    def steps(
        size: int, sections: dict, *plant: str, has_engine: bool = False
    ) -> subprocess.CompletedProcess:
        if has_engine and (ENGINE is None or not HAS_CUDA_BUILD):
            pytest.skip("needs Transformer Engine's Python: make test-fake-cuda")
        data = write_random_set(tmp_path / "set", 5, 16)
        settings = {
            "data": {"train": data, "row_capacity": 256, "global_batch_size": 8},
            "model": {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512}
            | {"num_attention_heads": 4, "num_query_groups": 2, "dtype": "bfloat16"}
            | {"attention_backend": "flash"}
            | sections.get("model", {}),
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2},
            "logging": {"output": str(tmp_path / "run")},
        }
        settings["data"] |= sections.get("data", {})
        settings |= {key: x for key, x in sections.items() if key not in ("model", "data")}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, str(HERE / "fake_run.py"), str(path), str(size), *plant]
        preload = {"LD_PRELOAD": str(driver)} if HAS_CUDA_BUILD else {}
        preload |= {"FAKE_ENGINE": str(ENGINE)} if has_engine else {}
        return subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "FAKE_CUDA_LIBRARY": str(driver)} | preload,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return steps
