"""Distributed checkpoints written and read one parameter at a time, by a single process.

The files are those of Megatron-Core's `torch_dist` format: one file per tensor, `.metadata` with
the place of each tensor, `common.pt` for everything else, and `metadata.json`, which marks the
checkpoint as complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.core import save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_prefix.checkpoint.flushing import flush, flush_tree
from megatron_prefix.checkpoint.starting_model import HF_FOLDER
from megatron_prefix.checkpoint.torch_dist import FORMAT, check_harmless
from megatron_prefix.checkpoint.writing import Writer, write_checksums
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFTensors, Read


class TensorMap(Protocol):
    """Parameters by canonical name: their places in a checkpoint, and the Hugging Face tensors that
    they are made of. A model's are a `WeightMap`, those of adapters an `AdapterMap`."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]: ...

    def hf_names(self, name: str) -> tuple[str, ...]: ...

    def read(self, name: str, read: Read) -> Tensor: ...


def write_checkpoint(
    target: Path,
    weights: TensorMap,
    tensors: HFTensors,
    common: dict[str, Any],
    attach: Callable[[Path], list[str]],
) -> list[str]:
    """Write the checkpoint `target` from Hugging Face's tensors, and `common` beside them.

    `attach` puts more files into the folder HF_FOLDER of it and returns their names, which are
    returned. Raises InputError if the tensors do not fit or `target` exists; nothing is written
    then.
    """
    items = _write_items(weights, tensors)
    with new_directory(target, "--output") as partial:
        writer = Writer(partial, single_file_per_rank=False, thread_count=1)
        writer.set_up_storage_writer(True)
        [plan], metadata = create_default_global_save_plan([SavePlan([item for item, _ in items])])
        plan = writer.prepare_global_plan([writer.prepare_local_plan(plan)])[0]
        names = {item.index: name for item, (_, name) in zip(plan.items, items, strict=True)}
        written = writer.write_data(plan, _ReadWhenWritten(weights, tensors, names)).wait()
        writer.finish(metadata, [written])
        torch.save(common, partial / "common.pt")
        companions = attach(partial / HF_FOLDER)
        write_checksums(partial)
        save_config(FORMAT, str(partial))
    return companions


@contextlib.contextmanager
def new_directory(target: Path, flag: str) -> Iterator[Path]:
    """A temporary directory; it becomes `target` if the context ends without an exception."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{flag} {target} exists already: name a new directory, or remove it")
    # Beside the target, so on the same disk: the rename at the end is one step.
    partial = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        flush_tree(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
        flush(target.absolute().parent)
    except OSError as error:
        raise InputError(f"{flag} {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_items(weights: TensorMap, tensors: HFTensors) -> list[tuple[WriteItem, str]]:
    """The items of the checkpoint, each with the name of its canonical parameter.

    A canonical parameter may be one slice of a checkpoint tensor: layer 3 of `[24, 8, 8]` has
    index (3,), leading sizes (24,), and offsets (3, 0, 0).
    """
    items: list[tuple[WriteItem, str]] = []
    dtype_of: dict[str, torch.dtype] = {}
    for name in weights.names():
        key, index, leading = weights.checkpoint_key(name)
        for part in weights.hf_names(name):
            dtype = dtype_of.setdefault(key, tensors.dtypes[part])
            if tensors.dtypes[part] != dtype:
                raise InputError(
                    f"{tensors.directory}: tensor {part} is {tensors.dtypes[part]}, but others "
                    f"that are joined with it in {key} are {dtype}: save the model in one precision"
                )
        shape = weights.shape(name)
        offsets = torch.Size((*index, *(0 for _ in shape)))
        chunk = ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in index), *shape)))
        data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size((*leading, *shape)))
        entry = MetadataIndex(key, offsets)
        items.append((WriteItem(entry, WriteItemType.SHARD, tensor_data=data), name))
    return items


class _ReadWhenWritten(DefaultSavePlanner):
    """Reads a tensor at the moment it is written."""

    def __init__(self, weights: TensorMap, tensors: HFTensors, names: dict) -> None:
        super().__init__()
        self._weights, self._tensors, self._names = weights, tensors, names

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        tensor = self._weights.read(self._names[write_item.index], self._tensors.read)
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


class CheckpointTensors:
    """The tensors of a distributed checkpoint, unsharded, read one parameter at a time."""

    def __init__(self, path: Path, weights: TensorMap) -> None:
        check_harmless(path)
        self.path = path
        self._weights = weights
        self._reader = FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._entries = metadata.state_dict_metadata
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def dtype(self, name: str) -> torch.dtype:
        """Precision of a canonical parameter."""
        return self._entry(name).properties.dtype

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise InputError if a parameter, or one of `names`, is missing or has another shape."""
        for name in self._weights.names() if names is None else names:
            key, _, leading = self._weights.checkpoint_key(name)
            saved = tuple(self._entry(name).size)
            expected = (*leading, *self._weights.shape(name))
            if not leading and len(saved) == 2 and saved[0] >= expected[0]:  # a padded vocabulary
                saved = (expected[0], saved[1])
            if saved != expected:
                raise InputError(
                    f"{self.path}: {key} has shape {list(saved)}, but {HF_FOLDER}/config.json asks "
                    f"for {list(expected)}: put the config.json of the saved model there"
                )

    def read(self, name: str) -> Tensor:
        """A canonical parameter, without the padding of the vocabulary."""
        key, index, _ = self._weights.checkpoint_key(name)
        shape = self._weights.shape(name)
        # Layer 3 of [24, 8, 8] is read as the chunk of sizes (1, 8, 8) at offsets (3, 0, 0). A
        # padded vocabulary is left out in the same way: the chunk of [12, 8] has sizes (10, 8).
        wanted = ChunkStorageMetadata(
            torch.Size((*index, *(0 for _ in shape))), torch.Size((*(1 for _ in index), *shape))
        )
        tensor = torch.empty(wanted.sizes, dtype=self.dtype(name))
        # A tensor is saved in as many chunks as ranks had a part of it. Each that overlaps the
        # wanted chunk gives one item; without a gap they cover it.
        items = create_read_items_for_chunk_list(key, self._entry(name), [wanted])
        if sum(item.lengths.numel() for item in items) != tensor.numel():
            raise InputError(
                f"{self.path}: parts of {key} are missing; the checkpoint is damaged: load another"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except Exception as error:  # torch raises many kinds for a damaged or hostile file
            raise InputError(
                f"{self.path}: {key} cannot be read ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]})"
            ) from error
        return tensor.reshape(shape)

    def _entry(self, name: str) -> TensorStorageMetadata:
        key, _, _ = self._weights.checkpoint_key(name)
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise InputError(
                f"{self.path}: there is no tensor {key}, so it is not a checkpoint of the model "
                f"that {HF_FOLDER}/config.json describes: put the right config.json there"
            )
        return entry


class _Into(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        # Two ranks have saved rows 0 to 4 and 4 to 8 of [8, 4]: the second item has the offsets
        # (4, 0) and lengths (4, 4), so it fills target[4:8].
        part = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `tensor` is a view of the target."""
