"""Distributed checkpoints on disk, read without executing any code; writing.py writes them.

The format is Megatron-Core's `torch_dist`: `common.pt`, `*.distcp`, `.metadata`, and
`metadata.json`, which is written last and marks a checkpoint as complete.

torch unpickles `.metadata`, and every object that is asked for and not a tensor. A pickle
can execute code. So `.metadata` is first read by an unpickler that knows a few harmless classes,
and only tensors are asked for: the objects of other programs' checkpoints are never read.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Sequence
from enum import Enum, EnumType
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
)
from megatron.core.dist_checkpointing.dict_utils import (
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.checkpoint.collective import gathered, own_share
from megatron_prefix.data.files import sha256
from megatron_prefix.errors import InputError
from megatron_prefix.model import REWARD_HEAD

COMPLETE = "metadata.json"
CHECKSUMS = "checksums.json"
FORMAT = CheckpointingConfig("torch_dist", 1)
COMMON_OBJECT = "common_state"
"""Name of the object that replaces `common.pt` in checkpoints of Megatron-Core's own saver."""

_HARMLESS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Of Megatron-Core's own saver: plans of torch, plain data.
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *("float16", "bfloat16", "float32", "float64"),
        *("int8", "int16", "int32", "int64", "uint8", "bool"),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _member_of
        if name not in _HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _member_of(kind: object, name: str) -> Enum:
    """A member of an enumeration, which Python 3.11 before 3.11.4 stores as getattr(kind, name).
    Nothing else is an attribute that metadata may ask for."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError("it refers to builtins.getattr")
    return kind[name]


def _read_entries(path: Path) -> dict:
    """The entries of the checkpoint `path`, by name; its tensors are in files of the same folder.
    Raises InputError."""
    metadata_path = path / ".metadata"
    try:
        with metadata_path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != str(place.relative_path):
                raise ValueError(f"{str(place.relative_path)[:100]!r} is no name of a file")
        return dict(metadata.state_dict_metadata)
    except OSError as error:
        raise InputError(f"{metadata_path}: {error.strerror}; the checkpoint is damaged") from None
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise InputError(_refusal(metadata_path, error)) from None


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors of the checkpoint `path`. Raises InputError."""
    entries = _read_entries(path).items()
    return {key for key, entry in entries if type(entry).__name__ == "TensorStorageMetadata"}


def model_kind(path: Path) -> str:
    """`reward` if the checkpoint has a reward model's head, else `lm`. Raises InputError."""
    return "reward" if REWARD_HEAD in _read_entries(path) else "lm"


def check_harmless(path: Path) -> None:
    """Raise InputError if reading the metadata of the checkpoint `path` could execute code.

    Its entries may be tensors, and objects, which `load` never reads.
    """
    metadata_path = path / ".metadata"
    for key, entry in _read_entries(path).items():
        if type(entry).__name__ not in ("TensorStorageMetadata", "BytesStorageMetadata"):
            raise InputError(
                f"{metadata_path}: refused, because {str(key)[:100]} is neither a tensor nor a "
                "stored object and could execute code when loaded; use a checkpoint that you trust"
            )


def check_format(path: Path) -> None:
    """Raise InputError if the checkpoint `path` is not of Megatron-Core's format `torch_dist`."""
    file = path / COMPLETE
    try:
        backend = json.loads(file.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(_refusal(file, error)) from None
    if backend != FORMAT.sharded_backend:
        raise InputError(
            f"{file}: the checkpoint has format {str(backend)[:100]}, and only "
            f"{FORMAT.sharded_backend} is read: save it again as {FORMAT.sharded_backend}"
        )


def _read_common(path: Path) -> dict:
    """`common.pt`, never by a plain unpickler, whatever torch's environment variables ask for."""
    try:
        return torch.load(path / "common.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        if any(_is_of(key, COMMON_OBJECT) for key in _read_entries(path)):
            return {}  # by Megatron-Core 0.19's own saver: a pickled object, which is not read
        raise InputError(f"{path}/common.pt: missing; the checkpoint is damaged") from None
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise InputError(_refusal(path / "common.pt", error)) from None


def _is_of(key: object, name: str) -> bool:
    """Whether an entry is the object `name`, whose key also has its part's number."""
    return str(key).split("/")[0] == name


def _refusal(path: Path, error: Exception) -> str:
    return (
        f"{path}: refused, because it is damaged or could execute code when loaded "
        f"({' '.join(str(error).split())[:200]}); use a checkpoint that you trust"
    )


def check_same_tensors(request: dict, path: Path, unread: Sequence[str] = ()) -> None:
    """Raise InputError if the checkpoint's model has tensors that are not requested.

    A requested tensor that is missing fails by itself when it is loaded. An additional one (a
    head, for a model with tied embeddings) would be ignored silently, so it is refused unless
    `unread` names it. Collective: every rank gives its part of the request.
    """
    own = {
        x.key
        for x in nested_values(request)
        if isinstance(x, (ShardedTensor, ShardedTensorFactory))
    }
    parts: list[set] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    saved = tensor_names(path) - set(unread)
    surplus = sorted(n for n in saved - set().union(*parts) if not n.startswith("optimizer."))
    if surplus:
        raise InputError(
            f"{path}: has tensors that this model does not have: {', '.join(surplus[:5])}; give "
            "the sizes it was trained with (untie_embeddings_and_output_weights, add_qkv_bias, …)"
        )


def check_whole(path: Path) -> None:
    """Raise InputError, on every process, if the checkpoint `path` cannot be read. Collective."""
    load_common(path)
    check_format(path)
    check_harmless(path)


def check_checksums(path: Path) -> None:
    """Raise InputError, on every process, if a file differs from what was written. Collective.

    A checkpoint without CHECKSUMS was written by another program and is not checked.
    """
    own: list[str] = []
    try:
        expected = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        names = sorted(set(expected) | set(checkpoint_files(path)))
        for name in own_share(names):
            if not (path / name).is_file() or sha256(path / name) != expected.get(name):
                own.append(name)
    except FileNotFoundError:
        own = []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        own = [CHECKSUMS]
    damaged = sorted({name for part in gathered(own) for name in part})
    if damaged:
        raise InputError(
            f"{path}: damaged, or changed since it was saved: {', '.join(damaged[:5])}; load "
            "another checkpoint"
        )


def checkpoint_files(path: Path) -> list[str]:
    """The files of a checkpoint, except the checksums and the mark of completeness."""
    return sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name not in (CHECKSUMS, COMPLETE)
    )


def load(request: dict, path: Path, unread: Sequence[str] = (), common: dict | None = None) -> dict:
    """Load the sharded tensors of `request` from the checkpoint `path`. Collective.

    `unread` names tensors that the checkpoint may have in addition. Returns `common`, which
    `load_common` gave, with the loaded tensors. Raises InputError if the checkpoint is damaged,
    could execute code, or belongs to another model.
    """
    if common is None:  # else `load_common` has compared them
        check_checksums(path)
    check_format(path)
    check_harmless(path)
    check_same_tensors(request, path, unread)
    return _explained(lambda: _load_tensors(request, path, common or {}), path)


def _load_tensors(request: dict, path: Path, common: dict) -> dict:
    state = copy.deepcopy(common)
    # Part by part, because model and optimizer may ask for the same tensor.
    for name, part in request.items():
        sharded, nonpersistent, factories = load_preprocess({name: part})
        tensors, _ = extract_matching_values(sharded, lambda x: isinstance(x, ShardedTensor))
        merge(state, nonpersistent)
        merge(state, TorchDistLoadShardedStrategy().load(tensors, path))
        state = apply_factory_merges(state, factories)
    return state


def is_foreign(path: Path) -> bool:
    """Whether the checkpoint `path` was written by another program: ours have checksums, and
    nothing in `common.pt` that needs code."""
    if (path / CHECKSUMS).exists():
        return False
    try:
        return not _read_common(path)
    except InputError:
        return True  # Megatron-LM's arguments, for example


def load_common(path: Path) -> dict:
    """What was saved beside the tensors. Collective. Raises InputError."""
    check_checksums(path)
    common = _read_common(path)
    if not isinstance(common, dict):
        raise InputError(f"{path}/common.pt: not a dictionary; load another checkpoint")
    return common


def _explained(action: Callable[[], dict], path: Path) -> dict:
    try:
        return action()
    except CheckpointException as error:  # a failure of any rank, on every rank
        raise InputError(_message(path, next(iter(error.failures.values()))[0])) from error
    except (
        *(CheckpointingException, pickle.UnpicklingError, OSError, EOFError, RuntimeError),
        *(KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError),
    ) as error:
        raise InputError(_message(path, error)) from error


def _message(path: Path, error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return (
        f"{path}: not a checkpoint that fits this run, or damaged ({type(error).__name__}: "
        f"{text}); check the model's sizes, or load another checkpoint"
    )


def tensors_only(state: dict) -> dict:
    """`state` without sharded objects (Megatron-Core's `_extra_state`, which is always empty)."""
    return extract_matching_values(state, lambda value: not isinstance(value, ShardedObject))[0]
