"""List what this machine lacks for the GPU tests and benchmarks: needed and optional packages.

    python tools/gpu_needs.py

Imports torch only. Exits with 1 if a needed package is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import torch

NEEDED = {
    "megatron.core": "megatron-core==0.16.1",
    "pydantic": "pydantic (with pydantic-core, annotated-types, typing-inspection)",
    "yaml": "PyYAML",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "tqdm": "tqdm",
    "packaging": "packaging",
    "psutil": "psutil",
    "pytest": "pytest (with pluggy, iniconfig, pygments)",
    "pytest_timeout": "pytest-timeout",
}
OPTIONAL = {
    "transformer_engine": "attention_backend te",
    "flash_attn_interface": "flash_version 3",
    "flash_attn.cute.interface": "flash_version 4",
    "triton": "attention_backend flex",
    "sentencepiece": "SentencePiece tokenizers",
    "matplotlib": "figures",
    "tensorboard": "logging.tensorboard",
}


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main() -> int:
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        print(f"device {torch.cuda.get_device_name()}, compute capability {capability}")
    else:
        print("device: torch finds no CUDA device; the tests will be skipped")
    for module, use in OPTIONAL.items():
        if not is_installed(module):
            print(f"not installed, optional: {module} ({use})")
    missing = [wheel for module, wheel in NEEDED.items() if not is_installed(module)]
    for wheel in missing:
        print(f"missing: bring a wheel of {wheel}")
    if not missing:
        print(f"megatron-core {importlib.metadata.version('megatron-core')}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
