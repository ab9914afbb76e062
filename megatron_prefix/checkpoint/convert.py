"""Hugging Face directories <-> distributed checkpoints, one tensor at a time.

Import writes the files of Megatron-Core's `torch_dist` format: one file per tensor, `.metadata`
with the place of each tensor, `common.pt` for everything else (here: nothing), and
`metadata.json`, which marks the checkpoint as complete. Export reads such a checkpoint, whatever
parallel layout wrote it, and writes safetensors. Both have one parameter in memory at a time, and
keep the precision of every tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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

from megatron_prefix.checkpoint.adapter_state import SavedAdapter
from megatron_prefix.checkpoint.flushing import flush, flush_tree
from megatron_prefix.checkpoint.save_load import resolve_checkpoint
from megatron_prefix.checkpoint.starting_model import HF_FOLDER
from megatron_prefix.checkpoint.torch_dist import (
    FORMAT,
    Writer,
    check_harmless,
    is_foreign,
    load_common,
    write_checksums,
)
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import (
    HFModel,
    HFTensors,
    WeightMap,
    copy_companions,
    write_safetensors,
)


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: number of tensors, their bytes and precisions, and other files."""

    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    companions: tuple[str, ...]
    note: str | None = None
    """What the user should know about the result."""


def import_hf(hf: str, output: str | Path) -> Converted:
    """Write the distributed checkpoint `output` from the Hugging Face model `hf`.

    Raises InputError if the model cannot be read or `output` exists; nothing is written then.
    """
    model = HFModel.open(hf)
    weights = _weight_map(model)
    tensors = HFTensors(model.directory)
    is_tied = not model.sizes.untie_embeddings_and_output_weights
    tensors.match(weights.hf_shapes(), is_tied)
    items = _write_items(weights, tensors)
    with _new_directory(Path(output), "--output") as partial:
        writer = Writer(partial, single_file_per_rank=False, thread_count=1)
        writer.set_up_storage_writer(True)
        [plan], metadata = create_default_global_save_plan([SavePlan([item for item, _ in items])])
        plan = writer.prepare_global_plan([writer.prepare_local_plan(plan)])[0]
        names = {item.index: name for item, (_, name) in zip(plan.items, items, strict=True)}
        written = writer.write_data(plan, _ReadWhenWritten(weights, tensors, names)).wait()
        writer.finish(metadata, [written])
        torch.save({}, partial / "common.pt")
        companions = copy_companions(model.directory, partial / HF_FOLDER)
        write_checksums(partial)
        save_config(FORMAT, str(partial))
    return _summary(
        {name: tensors.dtypes[name] for name in weights.hf_shapes()}, weights, companions
    )


def export_hf(load: str | Path, hf: str | Path, max_shard_bytes: int = 5 * 10**9) -> Converted:
    """Write the Hugging Face directory `hf` from a distributed checkpoint.

    `load` is an `iter_…` directory or the root above it. Raises InputError if the checkpoint
    cannot be read or `hf` exists; nothing is written then.
    """
    path = resolve_checkpoint(load)
    common = {} if is_foreign(path) else load_common(path)
    if (saved := SavedAdapter.read(common, path)) is not None:
        raise InputError(
            f"{path}: has only adapters of {saved.base_text}, and their export is not supported "
            "yet: start from them with lora.adapter, or evaluate them with --load"
        )
    source = path / HF_FOLDER
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source}/config.json is missing, so the model's architecture is not known: put the "
            "config.json and the tokenizer of its Hugging Face model there"
        )
    model = HFModel.read(source)
    weights = _weight_map(model)
    checkpoint = CheckpointTensors(path, weights)
    checkpoint.check()
    dtypes = {x: checkpoint.dtype(name) for name in weights.names() for x in weights.hf_names(name)}
    shapes = weights.hf_shapes()
    with _new_directory(Path(hf), "--hf") as partial:
        companions = copy_companions(source, partial)
        write_safetensors(
            partial,
            {part: (dtypes[part], shape) for part, shape in shapes.items()},
            _hf_tensors(weights, checkpoint),
            max_shard_bytes,
        )
        _write_config(model.config, set(dtypes.values()), partial / "config.json")
    note = None
    if weights.kind == "reward" and model.config.get("pad_token_id") is None:
        note = (
            "pad_token_id is null, because the tokenizer has no padding token other than its end "
            "of text: transformers then scores single texts only; to score batches, add a padding "
            "token to the tokenizer and config.json"
        )
    return replace(_summary(dtypes, weights, companions), note=note)


def _hf_tensors(weights: WeightMap, checkpoint: CheckpointTensors) -> Iterator[tuple[str, Tensor]]:
    for group in weights.groups():
        read = ((name, checkpoint.read(name)) for name in group)
        if weights.pieces(group[0])[0].expert is not None:
            yield from weights.join_experts(read).items()
            continue
        for name, parameter in read:
            yield from weights.split(name, parameter).items()


def _weight_map(model: HFModel) -> WeightMap:
    names = model.family.names
    return WeightMap(model.sizes, model.vocab_size, model.kind, model.num_labels, names)


def _summary(dtypes: dict[str, torch.dtype], weights: WeightMap, companions: list) -> Converted:
    shapes = weights.hf_shapes()
    num_bytes = sum(torch.Size(shapes[name]).numel() * x.itemsize for name, x in dtypes.items())
    kinds = sorted({str(x).removeprefix("torch.") for x in dtypes.values()})
    return Converted(len(dtypes), num_bytes, tuple(kinds), tuple(companions))


def _write_config(config: dict, dtypes: set[torch.dtype], path: Path) -> None:
    """Write config.json with the precision of the tensors, unless the copy already has it."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if len(dtypes) == 1 and config.get(key) != (name := str(*dtypes).removeprefix("torch.")):
        text = json.dumps(config | {key: name}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_directory(target: Path, flag: str) -> Iterator[Path]:
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


def _write_items(weights: WeightMap, tensors: HFTensors) -> list[tuple[WriteItem, str]]:
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

    def __init__(self, weights: WeightMap, tensors: HFTensors, names: dict) -> None:
        super().__init__()
        self._weights, self._tensors, self._names = weights, tensors, names

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        tensor = self._weights.read(self._names[write_item.index], self._tensors.read)
        return tensor.reshape(write_item.tensor_data.chunk.sizes)


class CheckpointTensors:
    """The tensors of a distributed checkpoint, unsharded, read one parameter at a time."""

    def __init__(self, path: Path, weights: WeightMap) -> None:
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

    def check(self) -> None:
        """Raise InputError if a parameter is missing or has another shape."""
        for name in self._weights.names():
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
