"""The frozen base model of adapters on disk: a Hugging Face directory or a checkpoint.

It is read one tensor at a time, and recognised by the fingerprint that a checkpoint of adapters
has of it. That is a fingerprint of the weights in the precision of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.checkpoint.adapter_state import SavedAdapter
from megatron_prefix.checkpoint.by_tensor import CheckpointTensors
from megatron_prefix.checkpoint.save_load import TRACKER, resolve_checkpoint
from megatron_prefix.checkpoint.torch_dist import COMPLETE
from megatron_prefix.errors import InputError
from megatron_prefix.model import REWARD_HEAD
from megatron_prefix.model.hf import HFModel, WeightMap
from megatron_prefix.model.parameters import Fingerprint


class BaseWeights(Protocol):
    """The weights of a base model, without a reward model's head."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole parameters."""

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's names and tensors, in the order of `WeightMap.hf_shapes`."""

    def hf_dtypes(self) -> dict[str, torch.dtype]:
        """Their precisions, in the same order."""


class DirectoryBase:
    """The base in a Hugging Face directory; a classifier's head is not read. Raises InputError if
    its tensors are not those of `weights`."""

    def __init__(self, directory: Path, weights: WeightMap) -> None:
        self._weights, self._names = weights, base_names(weights)
        self._tensors = weights.tensors(directory)
        shapes, head = weights.hf_shapes(), {}
        if REWARD_HEAD in self._tensors.shapes and weights.kind == "reward":
            head = {REWARD_HEAD: self._tensors.shapes[REWARD_HEAD]}
        own = {x: shapes[x] for name in self._names for x in weights.hf_names(name)}
        self._tensors.match(own | head, not weights.sizes.untie_embeddings_and_output_weights)
        self._own = list(own)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            yield name, self._weights.read(name, self._tensors.read)

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._tensors.read(name)) for name in self._own)

    def hf_dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._tensors.dtypes[name] for name in self._own}


class CheckpointBase:
    """The base in a distributed checkpoint. Raises InputError if its tensors are not those of
    `weights`."""

    def __init__(self, path: Path, weights: WeightMap) -> None:
        self._weights, self._names = weights, base_names(weights)
        self._tensors = CheckpointTensors(path, weights)
        self._tensors.check(self._names)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._tensors.read(name)) for name in self._names)

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return hf_tensors(self._weights, self._tensors, self._names)

    def hf_dtypes(self) -> dict[str, torch.dtype]:
        names = self._names
        return {x: self._tensors.dtype(n) for n in names for x in self._weights.hf_names(n)}


def hf_tensors(
    weights: WeightMap, checkpoint: CheckpointTensors, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under Hugging Face's names, those of the canonical `names`."""
    wanted = set(names)
    for group in weights.groups():
        if group[0] not in wanted:
            continue
        read = ((name, checkpoint.read(name)) for name in group)
        if weights.has_all_experts(group[0]):
            yield from weights.join_experts(read).items()
            continue
        for name, parameter in read:
            yield from weights.split(name, parameter).items()


def as_files(
    weights: WeightMap, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names that they have in files."""
    return ((weights.file_name(name), tensor) for name, tensor in tensors)


def base_names(weights: WeightMap) -> list[str]:
    """The canonical parameters of the frozen base: a reward model's head is trained."""
    return [name for name in weights.names() if name != REWARD_HEAD]


def stored_dtype(base: BaseWeights) -> torch.dtype:
    """Precision of the base's weights on disk, of which most have one: the widest."""
    return max(set(base.hf_dtypes().values()), key=lambda dtype: dtype.itemsize)


def dtype_of_runs(base: BaseWeights) -> torch.dtype:
    """The `model.dtype` in which a run keeps this base as it is, or nearly so."""
    return torch.float32 if stored_dtype(base).itemsize >= 4 else torch.bfloat16


def fingerprints(base: BaseWeights, dtypes: set[torch.dtype]) -> dict[torch.dtype, str]:
    """`model_fingerprint` of runs with this base, by their precision; one reading."""
    by_dtype = {dtype: Fingerprint() for dtype in dtypes}
    for name, parameter in base.parameters():
        for dtype, own in by_dtype.items():
            own.add(name, parameter.to(dtype).contiguous())
    return {dtype: own.value for dtype, own in by_dtype.items()}


def open_base(
    path: Path, saved: SavedAdapter, given: str | None, weights: WeightMap, dtype: torch.dtype
) -> BaseWeights:
    """The base of the adapters in the checkpoint `path`: at the place that the checkpoint names, or
    at `given` (`--base`). `dtype` is that of the adapters. Raises InputError if it is not there, or
    if it is another model."""
    place = given or saved.base.get("hf") or saved.base.get("checkpoint")
    if place is None:
        raise InputError(
            f"{path}: its adapters belong to weights that the run drew from train.seed, which are "
            "in no file, so they cannot be merged: export the adapters without --merge, or start "
            "the run from model.hf or model.checkpoint"
        )
    if given is None and Path(place).is_absolute() and not Path(place).is_dir():
        raise InputError(
            f"{path}: its base, {saved.base_text}, is no longer there: give its new place with "
            "--base"
        )
    base = _opened(place, weights)
    known = fingerprints(base, {dtype, dtype_of_runs(base)})
    if saved.base_fingerprint not in known.values():
        own = known[dtype]
        raise InputError(
            f"{'--base ' if given else ''}{place}: it is not the base of the adapters in {path}, "
            f"which were trained on {saved.base_text} (fingerprint {saved.base_fingerprint[:16]}…, "
            f"here {own[:16]}…): give that model with --base"
        )
    return base


def _opened(place: str, weights: WeightMap) -> BaseWeights:
    directory = Path(place)
    if (directory / COMPLETE).is_file() or (directory / TRACKER).is_file():
        return CheckpointBase(resolve_checkpoint(directory), weights)
    return DirectoryBase(HFModel.open(place).directory, weights)
