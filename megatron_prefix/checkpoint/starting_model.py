"""The model that policy and reference start from: its sizes, weights and tokenizer.

`model.hf` is a Hugging Face directory. `model.checkpoint` is a distributed checkpoint; if it was
imported from Hugging Face, its folder `hf/` has config.json and tokenizer. With neither, the sizes
are given and the weights are drawn. Checkpoints of the run get the same `hf/`, so that they can be
exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.adapter_state import SavedAdapter
from megatron_prefix.checkpoint.save_load import load_trained, load_weights, resolve_checkpoint
from megatron_prefix.checkpoint.starting_adapter import (
    StartingAdapter,
    open_adapter,
    with_settings_of,
)
from megatron_prefix.checkpoint.vocabulary import compare_vocabularies
from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.config.lora import FEED_FORWARD_TARGETS, LoraConfig, lora_size_faults
from megatron_prefix.data.images import ImageProcessor
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.model import (
    TreeTransformerConfig,
    load_hf_weights,
    transformer_config,
    unwrap,
)
from megatron_prefix.model.adapters import start_saved_modules
from megatron_prefix.model.hf import HFModel, write_hf_folder
from megatron_prefix.model.parameters import model_fingerprint
from megatron_prefix.text import counted

HF_FOLDER = "hf"
"""Folder of a checkpoint with config.json and tokenizer in the form of Hugging Face."""


@dataclass(frozen=True, kw_only=True)
class StartingModel:
    """The model that a run starts from: `config` is the model section, `vocab_size` is unpadded.

    With `lora` it is the frozen base of adapters, and `adapter` the ones to start from.

    `source` has config.json and tokenizer; it is None for a model from sizes. `longest` is the
    longest path of the run's data, in tokens. With `draws_head`, a reward model takes a language
    model's weights, and its head is drawn. `vocabulary_note` tells the user if the model's
    tokenizer could not be compared with that of the data.
    """

    config: ModelConfig
    sizes: ModelSizes
    vocab_size: int
    source: HFModel | None
    longest: int
    draws_head: bool = False
    vocabulary_note: str | None = None
    lora: LoraConfig | None = None
    adapter: StartingAdapter | None = None
    reads_images: bool = False
    """Whether the data has images, and the model a part that reads them."""

    @property
    def draws_rewards(self) -> bool:
        """Whether a reward model starts from a head that is drawn."""
        is_drawn = self.config.hf is None and self.config.checkpoint is None
        return self.config.kind == "reward" and (self.draws_head or is_drawn)

    def transformer_config(
        self, seed: int, parallel: ParallelConfig | None = None
    ) -> TreeTransformerConfig:
        """Megatron-Core's configuration; `seed` draws the weights that are not loaded, and the
        adapters."""
        drawn = self.config.hf is None and self.config.checkpoint is None
        return transformer_config(
            self.config,
            sizes=self.sizes,
            vocab_size=self.vocab_size,
            seed=seed if drawn else None,
            head_seed=seed if self.draws_head else None,
            parallel=parallel,
            lora=self.lora,
            adapter_seed=seed,
            source=self.source,
            reads_images=self.reads_images,
        )

    @staticmethod
    def resolve_lora(
        lora: LoraConfig, sizes: ModelSizes, kind: str, source: HFModel | None
    ) -> tuple[LoraConfig, StartingAdapter | None]:
        """A lora section with every setting, some from the adapter that it names, and that adapter.
        Raises InputError if the model of `sizes`, which `source` describes, does not have what it
        adapts."""
        adapter = None
        if lora.adapter is not None:
            adapter = open_adapter(lora.adapter)
            lora = with_settings_of(adapter.lora, lora, sizes)
        if faults := list(lora_size_faults(lora, sizes, kind)):
            raise InputError("; ".join(faults))
        lora = lora.resolved(sizes.num_moe_experts > 0, sizes.num_layers)
        if source is not None:
            check_targets(lora, source)
        return lora, adapter

    def load(self, chunks: list[torch.nn.Module]) -> SavedAdapter | None:
        """Load the weights to start from into models made from `transformer_config`. Collective.

        Returns what a checkpoint of the run says about its adapters; None without `lora`.
        """
        if self.config.hf is not None:
            assert self.source is not None
            for chunk in chunks:
                model = unwrap(chunk)
                keeps_head = self.draws_head and model.post_process
                load_hf_weights(model, self.source.directory, self.sizes, keeps_head)
        elif self.config.checkpoint is not None:
            load_weights(self.config.checkpoint, chunks, self.draws_head)
        if self.lora is None:
            return None
        for chunk in chunks:
            start_saved_modules(unwrap(chunk))
        saved = SavedAdapter.of(self.lora, model_fingerprint(chunks), self._base())
        if self.adapter is not None:
            self.adapter.load(chunks, saved)
        return saved

    def load_trained(
        self, path: str | Path, chunks: list[torch.nn.Module], adapter: SavedAdapter | None
    ) -> dict:
        """Load what a run that started from this model has saved, and return what its objective
        kept; `adapter` is what `load` returned, which comes first if there is any. Collective.
        Raises InputError."""
        return load_trained(path, chunks, adapter)

    def _base(self) -> dict[str, str]:
        """The base of the adapters, as `SavedAdapter` has it."""
        base = {}
        if self.config.hf is not None:
            base["hf"] = _absolute(self.config.hf)
        elif self.config.checkpoint is not None:
            base["checkpoint"] = _absolute(self.config.checkpoint)
        return base

    def note(self, seed: int) -> str | None:
        """Messages for the user about the weights and the vocabulary, one a line, if there are
        any."""
        notes = [self.vocabulary_note, self._origin_note(), self._head_note(seed)]
        notes.append(self._images_note())
        notes.append(None if self.adapter is None else self.adapter.note)
        return "\n".join(note for note in notes if note is not None) or None

    def _origin_note(self) -> str | None:
        path = self.config.checkpoint
        if path is None or not torch_dist.is_foreign(resolve_checkpoint(path)):
            return None
        return (
            f"model.checkpoint = {path} has no checksums and no sizes of a model: names and shapes "
            "of its tensors are compared with the model section, other sizes (norm_epsilon, "
            "rotary_base, …) are those given"
        )

    def _images_note(self) -> str | None:
        if self.source is None or self.source.images is None or self.reads_images:
            return None
        unused = "" if self.config.vision is None else ": model.vision has no effect"
        return (
            f"the model in {self.source.directory} reads images, and no data set has any: it is "
            f"trained as a text model, and what reads images stays as it is{unused}"
        )

    def _head_note(self, seed: int) -> str | None:
        if not self.draws_head:
            return None
        origin = f"model.hf = {self.config.hf}"
        if self.config.hf is None:
            origin = f"model.checkpoint = {self.config.checkpoint}"
        return f"{origin} is a language model: the reward head is drawn from train.seed = {seed}"

    def attach(self, directory: Path) -> None:
        """Put config.json and tokenizer into a checkpoint of this run, for `convert export`."""
        write_hf_folder(
            directory / HF_FOLDER,
            self.source,
            sizes=self.sizes,
            vocab_size=self.vocab_size,
            max_positions=self.longest,
            model=self.config,
        )


def resolve_starting_model(
    model: ModelConfig, datasets: Sequence[PreferenceDataset], lora: LoraConfig | None = None
) -> StartingModel:
    """Find the model that section `model` describes, and check it against the data sets.

    The vocabulary is the model's if it has a config.json, else the data sets'. Section `lora` is
    resolved, from the adapter that it names. Raises InputError.
    """
    longest = max(int(dataset.response_lengths.max()) for dataset in datasets)
    source, sizes, vocabulary_note = _source(model), model.sizes(), None
    if source is None:
        if sizes is None:
            raise InputError(
                f"model.checkpoint = {model.checkpoint} has no {HF_FOLDER}/config.json that gives "
                "the model's sizes: give them (model.num_layers, …)"
            )
        vocab_size, draws_head = datasets[0].vocab_size, _draws_head(model, None)
    else:
        draws_head = _draws_head(model, source.kind)
        if source.images is not None and model.num_labels > 1:
            raise InputError(
                f"model.num_labels = {model.num_labels} and the model in {source.directory} reads "
                "images: it can have one score only, set model.num_labels: 1"
            )
        if not draws_head and source.num_labels != model.num_labels:
            raise InputError(
                f"{source.source}: a sequence classifier with {source.num_labels} labels, and "
                f"model.num_labels is {model.num_labels}: set model.num_labels: "
                f"{source.num_labels}"
            )
        if sizes is not None:
            _check_same_sizes(model, sizes, source)
        sizes, vocab_size = source.sizes, source.vocab_size
        for dataset in datasets:
            _check_vocabulary(dataset, vocab_size, source.directory)
        if not model.allow_other_tokenizer:
            vocabulary_note = compare_vocabularies(source.directory, datasets)
        if model.vision is not None and source.images is None:
            raise InputError(
                f"model.vision is set, and the model in {source.directory} reads no images: "
                "remove it"
            )
        if model.kind == "reward" and source.images is None and source.family.classifier is None:
            raise InputError(
                f"model.kind = reward with the model in {source.directory}: transformers has no "
                f"sequence classifier of model_type {source.config['model_type']}, so it could not "
                "be exported: take a model of another type"
            )
    _check_longest_path(sizes, longest)
    reads_images = _check_images(source, datasets)
    adapter = None
    if lora is not None:
        lora, adapter = StartingModel.resolve_lora(lora, sizes, model.kind, source)
    return StartingModel(
        reads_images=reads_images,
        lora=lora,
        adapter=adapter,
        config=model,
        sizes=sizes,
        vocab_size=vocab_size,
        source=source,
        longest=longest,
        draws_head=draws_head,
        vocabulary_note=vocabulary_note,
    )


def _absolute(path: str) -> str:
    """A directory's absolute path; the id of a model on the Hub stays."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def check_targets(lora: LoraConfig, source: HFModel) -> None:
    """Refuse adapters of linear layers that the family joins or names in another way: PEFT would
    make one adapter for a joined layer, and here every part has its own. Raises InputError."""
    names = list(source.family.linears.values())
    for target in lora.target_modules or ():
        if source.sizes.num_moe_experts and target in FEED_FORWARD_TARGETS:
            fits = not source.sizes.architecture.expert_bias
        else:
            fits = names.count(target) == 1
        if not fits:
            raise InputError(
                f"lora.target_modules has {target}, and linear layers of model_type "
                f"{source.config['model_type']} are {', '.join(dict.fromkeys(names))}: adapters of "
                "joined layers, of layers without gate and of experts with biases are not "
                "supported: leave it out"
            )


def _check_images(source: HFModel | None, datasets: Sequence[PreferenceDataset]) -> bool:
    """Whether the data has images. Raises InputError if the model cannot read them."""
    own = None
    for dataset in datasets:
        if dataset.images is None:
            continue
        if source is None or source.images is None:
            name = "without config.json" if source is None else f"in {source.directory}"
            raise InputError(
                f"data set {dataset.prefix} has images, and the model {name} reads none: give the "
                f"{dataset.images.processor['family']} model that it was built for as model.hf"
            )
        own = own or ImageProcessor.open(source.directory).describe()
        theirs = dataset.images.processor
        if theirs["fingerprint"] != own["fingerprint"]:
            differing = ", ".join(_differing(theirs, own)) or "settings"
            raise InputError(
                f"data set {dataset.prefix} was built with another image processor than that in "
                f"{source.directory} ({differing}): build it with --tokenizer {source.directory}"
            )
    return own is not None


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What two descriptions of image processors have different."""
    flat = [{**entry.get("settings", {}), **entry} for entry in (theirs, ours)]
    names = sorted({*flat[0], *flat[1]} - {"settings", "fingerprint"})
    return [
        f"{name} {flat[0].get(name)!r} and {flat[1].get(name)!r}"[:100]
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _check_longest_path(sizes: ModelSizes, longest: int) -> None:
    """Refuse paths for which rotary frequencies depend on the length of the path: then a prompt
    that responses of several lengths share has no frequencies of its own."""
    for scaling in (sizes.rope_scaling, sizes.architecture.local_rope_scaling):
        limit = None if scaling is None else scaling.longest_path
        if scaling is not None and limit is not None and longest > limit:
            raise InputError(
                f"rotary scaling {scaling.type} of the model: beyond {counted(limit, 'token')} "
                "(original_max_position_embeddings, or max_position_embeddings) frequencies depend "
                f"on the length of the path, and the data's longest path has {longest}: build the "
                f"data set with --max-length {limit}"
            )


def _draws_head(model: ModelConfig, hf_kind: str | None) -> bool:
    """Whether a reward model starts from a language model's weights. Raises InputError if a
    language model is asked to start from a reward model's."""
    if model.hf is not None and (hf_kind, model.kind) == ("reward", "lm"):
        raise InputError(
            f"model.hf = {model.hf} is a reward model without a language-model head, but "
            "model.kind is lm: set model.kind: reward, or give a language model"
        )
    if model.kind != "reward":
        return False
    if model.checkpoint is None:
        return hf_kind == "lm"
    return torch_dist.model_kind(resolve_checkpoint(model.checkpoint)) == "lm"


def _check_vocabulary(dataset: PreferenceDataset, vocab_size: int, source: Path) -> None:
    """Refuse a data set with tokens that the model does not have.

    A tokenizer may have more tokens than its model, which were added and never trained. The data
    set is refused only if it uses them.
    """
    if dataset.vocab_size <= vocab_size:
        return
    # A model of 100 tokens and a tokenizer of 102: a data set whose highest token is 99 is taken.
    highest = int(dataset.tokens.max())
    if highest >= vocab_size:
        raise InputError(
            f"data set {dataset.prefix} has a vocabulary of {dataset.vocab_size} and uses token "
            f"{highest}; the model in {source} has a vocabulary of {vocab_size}: build the data "
            "set with the model's tokenizer"
        )


def _source(model: ModelConfig) -> HFModel | None:
    if model.hf is not None:
        return HFModel.open(model.hf)
    folder = None if model.checkpoint is None else hf_folder(model.checkpoint)
    return None if folder is None else HFModel.read(folder)


def hf_folder(path: str) -> Path | None:
    """The folder with config.json of a checkpoint; None if it has no such folder."""
    folder = resolve_checkpoint(path) / HF_FOLDER
    return folder if (folder / "config.json").is_file() else None


def _check_same_sizes(model: ModelConfig, given: ModelSizes, source: HFModel) -> None:
    """Refuse sizes that differ from the checkpoint's: a wrong epsilon would go unnoticed."""
    for key, known in vars(source.sizes).items():
        if key == "untie_embeddings_and_output_weights" and model.kind == "reward":
            continue  # it has no output layer
        if key == "ffn_hidden_size" and source.sizes.num_moe_experts:
            continue  # it is the size of layers without experts, and there are none
        if (value := getattr(given, key)) != known:
            raise InputError(
                f"model.{key} = {value}, but {source.source} of model.checkpoint has {known}: "
                "leave the sizes out, the checkpoint has them"
            )
