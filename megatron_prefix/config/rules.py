"""What the settings of a configuration must agree on, beyond the bounds of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_prefix.config.bounds import MOST_PROFILED
from megatron_prefix.config.fp8 import fp8_faults
from megatron_prefix.config.fusions import fusion_faults
from megatron_prefix.config.kinds import kind_faults
from megatron_prefix.config.lora import lora_faults, lora_size_faults
from megatron_prefix.config.model import REQUIRED_SIZES, SIZES, ModelConfig
from megatron_prefix.config.overlap import overlap_faults
from megatron_prefix.config.parallel import layout_faults, parallel_faults
from megatron_prefix.config.schema import Config, DataConfig
from megatron_prefix.errors import InputError


def check_rules(config: Config, raw: dict[str, Any]) -> None:
    """Refuse settings that exclude each other or do not divide, all in one InputError.

    `raw` are the settings as given, before defaults.
    """
    faults = [*_data_faults(config.data), *_size_faults(raw.get("model"))]
    if not faults:
        faults = [
            *_set_faults(config),
            *_model_faults(config.model),
            *fusion_faults(config.model),
            *fp8_faults(config.model),
            *_run_faults(config),
            *kind_faults(config.model.kind, raw),
            *(lora_faults(config.lora, config.model.kind) if config.lora else ()),
            *_vision_faults(config),
            *overlap_faults(config),
        ]
        faults += parallel_faults(config.parallel)
    if not faults and (sizes := config.model.sizes()) is not None:
        faults = [*sizes.faults(), *layout_faults(config.model, sizes, config.parallel)]
        if config.lora is not None:
            faults += lora_size_faults(config.lora, sizes, config.model.kind)
    if faults:
        raise InputError("; ".join(faults))


def _data_faults(data: DataConfig) -> Iterator[str]:
    if data.packing and data.row_capacity is None:
        yield "data.row_capacity is missing: packing needs the size of a row in tokens"
    if data.packing and data.micro_batch_size is not None:
        yield (
            f"data.micro_batch_size = {data.micro_batch_size} has no effect with packing: "
            "remove it, or set data.packing: false"
        )
    if not data.packing and data.micro_batch_size is None:
        yield "data.micro_batch_size is missing: data.packing: false needs it"
    if not data.packing and data.rows_per_step is not None:
        yield (
            f"data.rows_per_step = {data.rows_per_step} counts packed rows: "
            "set data.packing: true, or use data.global_batch_size"
        )
    if not data.packing and (data.plan is not None or data.packing_method != "first-fit"):
        yield (
            f"data.plan = {data.plan} and data.packing_method = {data.packing_method} are for "
            "packed rows: set data.packing: true, or leave them out"
        )
    if data.pad_rows == "capacity" and not data.packing:
        yield ("data.pad_rows = capacity is for packed rows, and data.packing is false: remove one")
    if (
        data.oversized == "split"
        and not data.packing
        and data.row_capacity is None
        and data.sharing in ("tree", "pair")
    ):
        yield (
            f"data.oversized = split has no effect with data.packing: false, data.sharing: "
            f"{data.sharing} and no data.row_capacity: set data.row_capacity, or remove it"
        )
    if (data.global_batch_size is None) == (data.rows_per_step is None):
        yield (
            f"data.global_batch_size = {data.global_batch_size} and "
            f"data.rows_per_step = {data.rows_per_step}: give exactly one"
        )


def _set_faults(config: Config) -> Iterator[str]:
    """Several data sets: weights or epochs, and what each of them needs."""
    data, train = config.data, config.train
    if data.valid == {}:
        yield "data.valid = {}: name at least one data set, or leave it out"
    if data.train == ():
        yield "data.train = []: list at least one data set"
    if isinstance(data.train, str):
        return
    prefixes = [item.prefix for item in data.train]
    for prefix in sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
        yield f"data.train lists {prefix} twice: give it one entry"
    kinds = [(item.weight is not None, item.epochs is not None) for item in data.train]
    for item, kind in zip(data.train, kinds, strict=True):
        if sum(kind) != 1:
            yield (
                f"data.train: {item.prefix} has weight = {item.weight} and epochs = "
                f"{item.epochs}: give exactly one"
            )
            return
    if len(set(kinds)) > 1:
        yield "data.train has entries with weight and entries with epochs: give all the same"
        return
    if data.set_epochs and train.epochs != 1:
        yield (
            f"train.epochs = {train.epochs} and train.steps = {train.steps}: a data.train with "
            "epochs is one pass of its own, set train.epochs: 1"
        )
    if data.weights:
        if train.steps is None:
            yield "train.steps is missing: a data.train with weights has no end of its own"
        if data.global_batch_size is None:
            yield (
                f"data.rows_per_step = {data.rows_per_step}: a data.train with weights shares out "
                "the groups of a step, use data.global_batch_size"
            )
        if data.sort_by_length:
            yield (
                "data.sort_by_length = True: a data.train with weights fixes how many groups of "
                "each set a step has, remove it"
            )


def _size_faults(raw: object) -> Iterator[str]:
    """Sizes given together with `model.hf`, or neither of them."""
    if not isinstance(raw, dict):
        return
    if raw.get("hf") is not None:
        for key in (*SIZES, "checkpoint"):
            if raw.get(key) is not None:
                yield (
                    f"model.{key} = {raw[key]!r} with model.hf = {raw['hf']!r}, which sets it: "
                    "remove one"
                )
        return
    given = [key for key in SIZES if raw.get(key) is not None]
    if raw.get("checkpoint") is not None and not given:
        return  # an imported checkpoint gives them
    missing = [key for key in REQUIRED_SIZES if key not in given]
    if missing:
        yield f"model.{missing[0]} is missing: give the model's sizes, or model.hf"


def _model_faults(model: ModelConfig) -> Iterator[str]:
    if model.num_labels > 1 and model.kind == "lm":
        yield (
            f"model.num_labels = {model.num_labels}: scores of a reward model, and model.kind is "
            "lm: set model.kind: reward, or remove it"
        )
    if model.rope_scaling is not None:
        yield from model.rope_scaling.faults()
    if model.flash_version != "auto" and model.attention_backend != "flash":
        yield (
            f"model.flash_version = {model.flash_version} has no effect with "
            f"model.attention_backend: {model.attention_backend}: leave it out, or choose flash"
        )
    if model.allow_other_tokenizer and model.hf is None and model.checkpoint is None:
        yield (
            "model.allow_other_tokenizer = True has no effect on a model without a tokenizer: "
            "remove it, or give model.hf or model.checkpoint"
        )
    if model.moe_count != "tokens" and not model.moe_aux_loss_coeff:
        yield (
            f"model.moe_count = {model.moe_count} has no effect while model.moe_aux_loss_coeff = "
            "0.0: set the coefficient, or remove moe_count"
        )
    recomputed = model.recompute_num_layers
    if recomputed is not None and model.num_layers is not None and recomputed > model.num_layers:
        yield f"model.recompute_num_layers = {recomputed} is above num_layers = {model.num_layers}"
    full = model.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        if (getattr(model, key) is not None) != full:
            yield (
                f"model.{key} = {getattr(model, key)}: needed with "
                "model.recompute_granularity: full, and only there"
            )


def _vision_faults(config: Config) -> Iterator[str]:
    vision = config.model.vision
    if vision is None:
        return
    if config.model.hf is None and config.model.checkpoint is None:
        yield (
            "model.vision is set and the model section gives the sizes of a model that reads no "
            "images: start from model.hf or model.checkpoint, or remove model.vision"
        )
    for key in ("freeze_tower", "freeze_projector"):
        if config.lora is not None and getattr(vision, key) is False:
            yield (
                f"model.vision.{key} = False with a lora section: beside adapters everything else "
                "is frozen: leave it out, or train without adapters"
            )


def _run_faults(config: Config) -> Iterator[str]:
    if config.model.num_labels > 1 and config.data.oversized == "split":
        yield (
            f"data.oversized = split with model.num_labels = {config.model.num_labels}: scores of "
            "several attributes are not gathered over parts: set data.oversized: error and a "
            "data.row_capacity for the largest group, or model.num_labels: 1"
        )
    train = config.train
    if config.model.num_labels > 1 and train.shadow_steps:
        yield (
            f"train.shadow_steps = {train.shadow_steps} with model.num_labels = "
            f"{config.model.num_labels}: the second run has one score per response: set "
            "train.shadow_steps: 0, or model.num_labels: 1"
        )
    yield from _reference_faults(config)
    if (train.steps is None) == (train.epochs is None):
        yield f"train.steps = {train.steps} and train.epochs = {train.epochs}: give exactly one"
    yield from config.optimizer.faults()
    if train.save_interval is not None and train.save is None:
        yield "train.save_interval is set but train.save is not: name a directory"
    for key in ("keep_last", "keep_best"):
        if getattr(train, key) is not None and train.save is None:
            yield f"train.{key} is set but train.save is not: name a directory, or remove it"
    if train.async_save and train.save is None:
        yield "train.async_save is set but train.save is not: name a directory, or remove it"
    if train.keep_best is not None and config.data.valid is None:
        yield "train.keep_best is set but data.valid is not: name a data set, or remove keep_best"
    if train.generate is not None and config.model.kind == "reward":
        yield "train.generate is set with model.kind: reward, which writes no text: remove it"
    if train.profile is not None:
        first, last = train.profile
        if not first <= last < first + MOST_PROFILED:
            yield (
                f"train.profile = [{first}, {last}]: give the first and the last step, at most "
                f"{MOST_PROFILED} steps"
            )
    if train.load_fallback and train.load is None:
        yield "train.load_fallback is set but train.load is not: name a directory, or remove it"
    if train.eval_interval is not None and config.data.valid is None:
        yield "train.eval_interval is set but data.valid is not: name a data set"


def _reference_faults(config: Config) -> Iterator[str]:
    """Where the reference's log-probabilities come from; which references is objectives' matter."""
    loss = config.loss
    if loss.references is None:
        if (loss.reference == "precomputed") != (loss.ref_logps is not None):
            yield (
                f"loss.ref_logps = {loss.ref_logps}: needed with loss.reference: precomputed, "
                "and only there"
            )
        return
    if loss.ref_logps is not None:
        yield (
            f"loss.ref_logps = {loss.ref_logps} with loss.references, which name their own files: "
            "remove one"
        )
    weights = loss.reference_weights
    if weights in ("validation_confidence", "validation_accuracy") and config.data.valid is None:
        yield (
            f"loss.reference_weights = {weights} and data.valid is not set: name the data set that "
            "the references are judged on"
        )
