"""A run's state -> the files of a distributed checkpoint, in the format that torch_dist.py reads.

1. `Snapshot.of` takes the state. With `is_copied` it is a copy in host memory, so that training may
   go on while the files are written.
2. `Snapshot.write` writes the files into an empty directory, all processes together.

Megatron-Core's own writer forks processes that outlive a killed run, and from 0.17 on its `save`
ignores another one. Its queue of saves in the background needs CUDA, and does not see how such a
process ended. So the same plan goes to torch's writer, in this process. What is not a tensor is in
`common.pt`, which every version reads; from 0.19 on Megatron-Core's own saver puts it into a
pickled object instead.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_prefix.checkpoint.collective import Group, gathered, on_main, own_share
from megatron_prefix.checkpoint.torch_dist import CHECKSUMS, FORMAT, checkpoint_files
from megatron_prefix.data.files import sha256

COPIED_AHEAD = 10_000_000
"""Bytes that are copied from the device while others are written, as torch has it."""


class Writer(dcp.FileSystemWriter):
    """torch's writer, whose `.metadata` every Python reads: a path is pickled under another module
    name from Python 3.13 on, so it is saved as text."""

    def storage_meta(self) -> StorageMeta | None:
        meta = super().storage_meta()
        return meta and replace(meta, checkpoint_id=str(meta.checkpoint_id))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What this process writes of a run's state."""

    tensors: dict[str, Any]
    """Name -> the parts of a tensor that this process writes, in torch's form."""
    common: dict
    """Everything else; the main process writes it."""
    is_copied: bool = False
    """Whether all tensors are in host memory."""

    @classmethod
    def of(cls, state: dict, is_copied: bool = False) -> Snapshot:
        """The snapshot of `state`, which has sharded tensors. Collective.

        With `is_copied` no memory is shared with `state`.
        """
        tensors, common = save_preprocess(state)
        by_key: dict[str, list[ShardedTensor]] = defaultdict(list)
        for tensor in nested_values(tensors):
            if is_main_replica(tensor.replica_id):
                if is_copied:  # in place, so that what was gathered for the save is freed
                    tensor.data = _copied(tensor.data.detach())
                by_key[tensor.key].append(tensor)
        if is_copied:
            common = dict_list_map_outplace(_copied, common)
        return cls(
            tensors=mcore_to_pyt_state_dict(by_key, False), common=common, is_copied=is_copied
        )

    def write(self, path: Path, group: Group = None) -> None:
        """Write the files into the empty directory `path`. Collective. Raises OSError."""
        # To copy ahead, torch's writer waits for the current CUDA stream again and again. On a
        # thread that is a stream of device 0, or the one that training uses.
        ahead = 0 if self.is_copied else COPIED_AHEAD
        try:
            on_main(lambda: torch.save(self.common, path / "common.pt"), group)
            dcp.save(
                self.tensors,
                storage_writer=Writer(path, thread_count=1, per_thread_copy_ahead=ahead),
                planner=MCoreSavePlanner(flatten_state_dict=False),
                process_group=group,
            )
            on_main(lambda: save_config(FORMAT, str(path)), group)
        except CheckpointException as error:  # a failure of any rank, on every rank
            causes = [failure[0] for failure in error.failures.values()]
            cause = next((c for c in causes if isinstance(c, OSError)), causes[0])
            raise OSError(getattr(cause, "errno", None), str(cause)) from error
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise OSError(None, f"torch could not write: {' '.join(str(error).split())}") from error


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copy.deepcopy(value)


def write_checksums(path: Path, group: Group = None) -> None:
    """Write CHECKSUMS, a SHA-256 of every file below `path`. Collective: each process reads its
    share of the files. Raises OSError, on every process.
    """
    own: dict[str, str] | OSError = {}
    try:
        own = {name: sha256(path / name) for name in own_share(checkpoint_files(path))}
    except OSError as error:
        own = error
    parts = gathered(own, group)
    for part in parts:
        if isinstance(part, OSError):
            raise part
    checksums = {name: digest for part in parts for name, digest in part.items()}
    text = json.dumps(dict(sorted(checksums.items())), indent=1) + "\n"
    on_main(lambda: _write_text(path / CHECKSUMS, text), group)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
