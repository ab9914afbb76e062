"""Lines at the start of a run on CUDA: what is slower there, or not tested, and what to install."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.version import Version

from megatron_prefix.model import TreeTransformerConfig

TESTED = Version("2.9"), Version("2.21")
"""Transformer Engine from the first to below the second; the same in the extra `te` of setup.py."""


def transformer_engine_version() -> str | None:
    """The version that is installed, if any."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_notes(
    config: TreeTransformerConfig, is_on_cuda: bool, engine: str | None
) -> Iterator[str]:
    """The lines of a run whose model is `config`; `engine` is the installed version of Transformer
    Engine. Nothing on CPU, where there is no faster way."""
    if not is_on_cuda:
        return
    least, below = TESTED
    if engine is not None and not least <= Version(engine) < below:
        yield (
            f"Transformer Engine {engine} is installed, and {least} or newer, below {below}, was "
            "tested: a layer may take a slower path without a message. Install "
            f"'transformer-engine[pytorch]>={least},<{below}'"
        )
    if config.fp8 and config.fp8_recipe == "delayed":
        yield (
            "model.fp8_recipe: delayed: checkpoints have no scales, so the first step after a "
            "start or a resume runs with scales of 1, in which small gradients vanish; tensorwise "
            "and blockwise have no such step"
        )
    if config.num_moe_experts and not config.moe_grouped_gemm:
        yield f"experts are computed one after another: {_why_not_grouped(config, engine)}"


def _why_not_grouped(config: TreeTransformerConfig, engine: str | None) -> str:
    if engine is None:
        return (
            "Transformer Engine, which computes all of a rank's experts in one call, is not "
            "installed. Install 'transformer-engine[pytorch]'"
        )
    if not config.architecture.is_plain:
        return "Transformer Engine's layers do not have all parts of this model"
    return "adapters of experts need one module for each expert"
