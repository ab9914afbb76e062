"""What is known on this machine: the data sets of a run, the sizes of its model, its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_prefix.config import Config, ModelConfig
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.data.store.verify import verify_tokens
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.data_costs import KnownModel
from megatron_prefix.estimate.vision import KnownVision
from megatron_prefix.model.hf import HFModel


def row_bound(config: Config) -> int | None:
    """Tokens that no row or padded micro batch exceeds, if the configuration gives a bound."""
    data = config.data
    if data.row_capacity is None:
        return None
    return data.row_capacity * (data.micro_batch_size or 1)


def known_dataset(config: Config, missing: list[str]) -> PreferenceDataset | None:
    """The joined data sets of `data.train`; None, with a line in `missing`, if one is not here."""
    prefixes = [item.prefix for item in config.data.train_sets]
    absent = [prefix for prefix in prefixes if not Path(f"{prefix}.json").exists()]
    if not absent:
        datasets = [PreferenceDataset(prefix) for prefix in prefixes]
        for dataset in datasets:
            verify_tokens(dataset)
        return own_responses(join_datasets(datasets))
    missing.append(
        f"data.train = {', '.join(absent)} is not on this machine: tokens, rows, what sharing saves"
    )
    return None


def known_model(
    config: ModelConfig, dataset: PreferenceDataset | None, missing: list[str]
) -> KnownModel | None:
    """The sizes of the model; None if they are not on this machine."""
    folder = _config_folder(config)
    if folder is not None:
        model = HFModel.read(folder)
        return KnownModel(model.sizes, model.vocab_size)
    sizes = config.sizes()
    if sizes is None:
        source = f"model.hf = {config.hf}"
        if config.hf is None:
            source = f"model.checkpoint = {config.checkpoint}"
        missing.append(
            f"{source} has no config.json on this machine: parameters, memory, operations; fetch "
            "that one file, or give the sizes (model.num_layers, …)"
        )
        return None
    if dataset is None:
        missing.append("the vocabulary's size comes from data.train: parameters, memory")
        return KnownModel(sizes, None)
    return KnownModel(sizes, dataset.vocab_size)


def with_adapters(config: Config, model: KnownModel, missing: list[str]) -> KnownModel | None:
    """The model with the adapters of the lora section; None if they come from an adapter that is
    not on this machine."""
    lora = config.lora
    if lora is None:
        return model
    if lora.adapter is not None and not Path(lora.adapter).exists():
        missing.append(
            f"lora.adapter = {lora.adapter} is not on this machine: parameters, memory, "
            "operations; leave it out and give lora.r, lora.target_modules, …"
        )
        return None
    # imported only in this case, because it loads Megatron-Core
    from megatron_prefix.checkpoint import StartingModel

    folder = _config_folder(config.model)
    source = None if folder is None else HFModel.read(folder)
    resolved, _ = StartingModel.resolve_lora(lora, model.sizes, config.model.kind, source)
    return replace(model, lora=resolved)


def with_images(config: Config, model: KnownModel, dataset: PreferenceDataset | None) -> KnownModel:
    """The model with the part that reads images, if its directory describes one, and the work of
    the pictures of the data set. Raises InputError if the data set has images and the model cannot
    read them."""
    folder = _config_folder(config.model)
    source = None if folder is None else HFModel.read(folder)
    vision = None if source is None else KnownVision.of(source, config)
    store = None if dataset is None else dataset.images
    if store is not None and vision is None:
        raise InputError(
            f"data set {store.prefix} has images, and the model section describes a model that "
            f"reads none: give the {store.processor['family']} model that it was built for as "
            "model.hf"
        )
    if source is None or vision is None:
        return model
    if store is not None:
        pictures = source.pictures_work(store.sizes, store.grids, store.several)
        vision = replace(vision, pictures=pictures)
    elif dataset is not None:  # a run on texts trains none of it
        vision = replace(vision, trains_tower=False, trains_projector=False)
    return replace(model, vision=vision)


def _config_folder(model: ModelConfig) -> Path | None:
    """The folder of config.json, if it is on this machine; nothing is fetched."""
    if model.hf is not None:  # a directory, else an id OWNER/NAME in the Hub's cache
        if (Path(model.hf) / "config.json").is_file():
            return Path(model.hf)
        if model.hf.count("/") != 1 or model.hf.startswith((".", "/", "~")):
            return None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.hf, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    if model.checkpoint is not None and Path(model.checkpoint).exists():
        # imported only in this case, because it loads Megatron-Core
        from megatron_prefix.checkpoint import hf_folder

        return hf_folder(model.checkpoint)
    return None
