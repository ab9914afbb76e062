"""parallel.tp_comm_overlap: what a run with it must have."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prefix.config.schema import Config

RECIPES = ("delayed", "tensorwise")
"""Those of FP8 whose operands Transformer Engine's buffers hold for rows of any length."""


def overlap_faults(config: Config) -> Iterator[str]:
    """Settings with which rows have several lengths, or layers do not use the buffers."""
    if not config.parallel.tp_comm_overlap:
        return
    setting, model = "parallel.tp_comm_overlap = True", config.model
    if config.data.pad_rows != "capacity":
        yield (
            f"{setting} with data.pad_rows: {config.data.pad_rows}: its buffers fit rows of one "
            "length: set data.packing: true and data.pad_rows: capacity, or remove it"
        )
    if model.dtype != "bfloat16":
        yield f"{setting} with model.dtype: {model.dtype}: set model.dtype: bfloat16, or remove it"
    if model.recipe not in (None, *RECIPES):
        yield (
            f"{setting} with model.fp8_recipe: {model.recipe}: Transformer Engine overlaps "
            f"{' and '.join(RECIPES)} only: choose one of them, or remove it"
        )
    if config.lora is not None:
        yield (
            f"{setting} with a lora section: adapters gather the input of a layer for themselves, "
            "so that nothing is saved: remove it, or train without adapters"
        )
    if config.train.generate is not None:
        yield (
            f"{setting} with train.generate, whose rows grow with the answers: remove one of them"
        )
