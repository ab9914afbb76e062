"""Installs the package `megatron_prefix` and the program `megatron-prefix`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-prefix",
    version="0.1.0",
    description="Preference training on Megatron-Core that computes every prompt once, exactly.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_prefix", "megatron_prefix.*"]),
    package_data={
        "megatron_prefix.attention": ["auto_table.json"],
        "megatron_prefix.report": ["page.html.jinja"],
    },
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16,<0.20",  # from 0.17 on it needs Python 3.12
        # From 0.18 on Megatron-Core imports it and does not require it.
        'triton; sys_platform == "linux" and python_version >= "3.12"',
        "numpy",
        "packaging",
        "datasets",
        "pyarrow",
        "sentencepiece",
        "transformers>=5",
        "huggingface_hub",
        "safetensors",
        "pydantic>=2",
        "PyYAML",
        "jinja2",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "psutil",  # without it Megatron-Core's checkpoint writer hangs
    ],
    extras_require={
        "wandb": ["wandb"],
        # From what Megatron-Core 0.16 names to the newest whose calls were read. A run on another
        # version prints a line (train/machine_notes.py).
        "te": ["transformer-engine[pytorch]>=2.9,<2.21"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "trl>=1.14",  # Python 3.10 gets 1.14, newer ones 1.16
            "peft",
            "hypothesis",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["megatron-prefix = megatron_prefix.__main__:main"]},
)
