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
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_prefix", "megatron_prefix.*"]),
    package_data={"megatron_prefix.attention": ["auto_table.json"]},
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16,<0.20",
        "numpy",
        "datasets",
        "pyarrow",
        "sentencepiece",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "pydantic>=2",
        "PyYAML",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "psutil",  # without it Megatron-Core's checkpoint writer hangs
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "test": [
            "pytest",
            "pytest-timeout",
            "ruff",
            "trl>=1.16",
            "hypothesis",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["megatron-prefix = megatron_prefix.__main__:main"]},
)
