"""Pipeline stages of one step: shapes known from its rows, and values of the last stage for all.

Rows differ in length, so Megatron-Core's stages first send each other the shape of every tensor,
and the host waits for it. Here every stage of a pipeline has the same rows, so it knows what comes:
rows come in the order in which the stage beside it runs them. Nothing is sent before the tensor.

    3 rows, 2 stages of 1 chunk     stage 1 gets rows 0 1 2 from stage 0, and stage 0 gets the
                                    gradients of rows 0 1 2 from stage 1
    4 rows, 2 stages of 2 chunks    each stage runs rows 0 1 in chunk 0, 0 1 in chunk 1, then 2 3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import (
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
    get_tensor_model_parallel_world_size,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.model import unwrap

Run = tuple[int, int]
"""A row, and the chunk of the stage that runs it."""


class RowShapes(P2PCommunicator):
    """Sends and receives hidden states of rows whose numbers of tokens, `lengths`, are known."""

    def __init__(
        self, group: dist.ProcessGroup, config: TransformerConfig, lengths: Sequence[int]
    ) -> None:
        super().__init__(group, config)
        stages, chunks = group.size(), config.virtual_pipeline_model_parallel_size or 1
        slices = get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        shapes = [[length // slices, 1, config.hidden_size] for length in lengths]
        rows = RowOrder(num_rows=len(lengths), stages=stages, chunks=chunks)
        stage = group.rank()
        self._sent_next = iter([shapes[row] for row in rows.to_next(stage)])
        self._sent_previous = iter([shapes[row] for row in rows.to_previous(stage)])
        self._from_previous = iter([shapes[row] for row in rows.to_next((stage - 1) % stages)])
        self._from_next = iter([shapes[row] for row in rows.to_previous((stage + 1) % stages)])

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """The shapes of the next tensors to receive. Megatron-Core calls this before each tensor;
        its own method sends and receives them."""
        for tensor, shapes in (
            (tensor_send_next, self._sent_next),
            (tensor_send_prev, self._sent_previous),
        ):
            if tensor is not None:
                expected = next(shapes)
                assert list(tensor.shape) == expected, (tensor.shape, expected)
        nothing = [0, 0, 0]
        return (
            next(self._from_previous) if recv_prev else nothing,
            next(self._from_next) if recv_next else nothing,
        )


class RowOrder:
    """In which order stages send each other rows: hidden states forward, gradients backward."""

    def __init__(self, *, num_rows: int, stages: int, chunks: int) -> None:
        self._last_stage, self._last_chunk = stages - 1, chunks - 1
        # Rows go through the chunks of a stage in groups of as many rows as there are stages.
        groups = [range(i, min(i + stages, num_rows)) for i in range(0, num_rows, stages)]
        self._runs: list[Run] = [
            (row, chunk) for group in groups for chunk in range(chunks) for row in group
        ]

    def to_next(self, stage: int) -> Iterator[int]:
        """Rows whose hidden states `stage` sends on: all but those that leave the model."""
        for row, chunk in self._runs:
            if (stage, chunk) != (self._last_stage, self._last_chunk):
                yield row

    def to_previous(self, stage: int) -> Iterator[int]:
        """Rows whose gradients `stage` sends back: all but those that reach the model's first
        layer. Backward runs through the chunks from the last to the first."""
        for row, chunk in self._runs:
            if (stage, self._last_chunk - chunk) != (0, 0):
                yield row


def schedule_arguments(chunk: torch.nn.Module, lengths: Sequence[int]) -> dict[str, Any]:
    """Arguments of Megatron-Core's schedules for a model with this chunk and rows of these
    `lengths` in tokens of this rank; nothing without stages."""
    group = get_pipeline_model_parallel_group()
    if group.size() == 1:
        return {}
    return {
        "p2p_communicator": RowShapes(group, unwrap(chunk).config, lengths),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }


def from_last_stage(values: list, device: torch.device) -> list:
    """What the last pipeline stage has, on every stage; tensors come back on `device`."""
    group = get_pipeline_model_parallel_group()
    if group.size() == 1:
        return values
    last = get_pipeline_model_parallel_last_rank()
    # A pickled CUDA tensor would return on the sender's device number, so tensors travel on the
    # CPU.
    shared = [_moved(values, torch.device("cpu")) if dist.get_rank() == last else None]
    dist.broadcast_object_list(shared, src=last, group=group)
    return _moved(shared[0], device)


def scores_from_last_stage(
    values: list[Tensor], sizes: Sequence[int], device: torch.device
) -> list[Tensor]:
    """The float64 vectors of the last stage, of these sizes, on every stage. They do not pass
    through the host, which does not wait for them."""
    group = get_pipeline_model_parallel_group()
    if group.size() == 1 or sum(sizes) == 0:
        return values or [torch.zeros(0, dtype=torch.float64, device=device) for _ in sizes]
    last = get_pipeline_model_parallel_last_rank()
    is_last = dist.get_rank() == last
    joined = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    if is_last:
        assert [len(x) for x in values] == [*sizes], (sizes, [len(x) for x in values])
        joined = torch.cat(values)
    dist.broadcast(joined, src=last, group=group)
    return [*joined.split([*sizes])]


def _moved(value: Any, device: torch.device) -> Any:
    """Lists and dictionaries of tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(x, device) for key, x in value.items()}
    return [_moved(x, device) for x in value]
