"""Hugging Face directories <-> distributed checkpoints, one tensor at a time.

Import writes a checkpoint with nothing but tensors and the folder `hf/`. Export reads a checkpoint,
whatever parallel layout wrote it, and writes safetensors. Both have one parameter in memory at a
time, and keep the precision of every tensor. Adapters: convert_adapter.py.
"""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.checkpoint.adapter_base import as_files, hf_tensors
from megatron_prefix.checkpoint.adapter_state import SavedAdapter
from megatron_prefix.checkpoint.by_tensor import CheckpointTensors, new_directory, write_checkpoint
from megatron_prefix.checkpoint.convert_adapter import (
    StoredAdapters,
    has_weights,
    import_adapter,
)
from megatron_prefix.checkpoint.converted import Converted, note_on_padding, write_config
from megatron_prefix.checkpoint.save_load import resolve_checkpoint
from megatron_prefix.checkpoint.starting_model import HF_FOLDER
from megatron_prefix.checkpoint.torch_dist import is_foreign, load_common, model_kind
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import (
    HFModel,
    WeightMap,
    copy_companions,
    write_safetensors,
)
from megatron_prefix.model.hf.peft import ADAPTER

SHARD_BYTES = 5 * 10**9
"""Maximum size of a file of exported weights, if none is given."""


def import_hf(hf: str, output: str | Path, base: str | None = None) -> Converted:
    """Write the distributed checkpoint `output` from the Hugging Face model `hf`, or, with its base
    model `base`, from the PEFT directory `hf`.

    Raises InputError if the model cannot be read or `output` exists; nothing is written then.
    """
    is_adapter = (Path(hf) / ADAPTER).is_file()
    if base is not None and is_adapter:
        return import_adapter(hf, base, Path(output))
    if base is not None:
        raise InputError(
            f"--base {base} is the base model of an adapter, and {hf} has no {ADAPTER}: leave out "
            "--base, or give a PEFT directory as --hf"
        )
    if is_adapter and not has_weights(Path(hf)):
        raise InputError(
            f"{hf}: a PEFT adapter, which is imported with its base model: add --base HF_DIR"
        )
    model = HFModel.open(hf)
    weights = WeightMap.of(model)
    tensors = weights.tensors(model.directory)
    is_tied = not model.sizes.untie_embeddings_and_output_weights
    tensors.match(weights.hf_shapes(), is_tied)
    companions = write_checkpoint(
        Path(output), weights, tensors, {}, lambda folder: copy_companions(model.directory, folder)
    )
    shapes = weights.hf_shapes()
    return Converted.of({name: tensors.dtypes[name] for name in shapes}, shapes, companions)


def export_hf(
    load: str | Path,
    hf: str | Path,
    max_shard_bytes: int | None = None,
    *,
    merge: bool = False,
    base: str | None = None,
) -> Converted:
    """Write the Hugging Face directory `hf` from a distributed checkpoint: a model, or, from a
    checkpoint of adapters, a PEFT directory.

    `load` is an `iter_…` directory or the root above it; files have at most `max_shard_bytes`,
    SHARD_BYTES if not given. With `merge`, adapters are merged into their base, which `base` names
    if it is not where the checkpoint says. Raises InputError if the checkpoint cannot be read or
    `hf` exists; nothing is written then.
    """
    path, hf = resolve_checkpoint(load), Path(hf)
    saved = SavedAdapter.read({} if is_foreign(path) else load_common(path), path)
    if saved is None and (merge or base is not None):
        flag = "--merge" if merge else f"--base {base}"
        raise InputError(
            f"{flag} is for checkpoints of adapters, and {path} has all weights of a model: leave "
            f"out {flag.split()[0]}"
        )
    source = path / HF_FOLDER
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source}/config.json is missing, so the model's architecture is not known: put the "
            "config.json and the tokenizer of its Hugging Face model there"
        )
    model = HFModel.read(source)
    if model.images is not None and model_kind(path) == "reward":
        raise InputError(
            f"{path} is a reward model that reads images, and transformers has no sequence "
            f"classifier of model_type {model.config['model_type']}: score with it by evaluate, "
            "with model.checkpoint"
        )
    weights = WeightMap.of(model)
    if saved is not None:
        adapters = StoredAdapters.open(path, saved, model, weights)
        if merge:
            return adapters.write_merged(hf, base, max_shard_bytes or SHARD_BYTES)
        if max_shard_bytes is not None:
            raise InputError(
                "--max-shard-size has no effect on an adapter, which PEFT keeps in one file: leave "
                "it out, or add --merge"
            )
        return adapters.write_peft(hf, base)
    checkpoint = CheckpointTensors(path, weights)
    checkpoint.check()
    dtypes = {x: checkpoint.dtype(name) for name in weights.names() for x in weights.hf_names(name)}
    shapes = weights.hf_shapes()
    with new_directory(hf, "--hf") as partial:
        companions = copy_companions(source, partial)
        write_safetensors(
            partial,
            {weights.file_name(part): (dtypes[part], shape) for part, shape in shapes.items()},
            as_files(weights, hf_tensors(weights, checkpoint, weights.names())),
            max_shard_bytes or SHARD_BYTES,
        )
        write_config(model.config, set(dtypes.values()), partial / "config.json")
    return Converted.of(dtypes, shapes, companions, note_on_padding(weights.kind, model))
