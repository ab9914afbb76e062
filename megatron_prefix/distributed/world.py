"""The processes of a run: join them into groups, and communicate between them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_prefix.attention.context_parallel import ContextCost, ContextParallel
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.attempt import store_of_attempt
from megatron_prefix.distributed.liveness import MARGIN_S, FailureDetection
from megatron_prefix.distributed.user_buffers import UserBuffers
from megatron_prefix.distributed.world_size import world_faults
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.model import TreeTransformerConfig
from megatron_prefix.platform import adapted, device

DEFAULT_CP_COMM = "needed_rows"


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    `groups` are Megatron-Core's process groups, `device` is the device this process computes on.
    """

    parallel: ParallelConfig
    groups: ProcessGroupCollection
    device: torch.device
    failure_detection: FailureDetection | None = None
    """None if there is one process only."""
    host: dist.ProcessGroup | None = None
    """All processes, for objects that never leave the host; None is the default group."""
    buffers: UserBuffers | None = None
    """Those of parallel.tp_comm_overlap; None without it."""

    def beat(self, doing: str) -> None:
        """Heartbeat: tell the other ranks the activity that begins, such as "step 12"."""
        if self.failure_detection is not None:
            self.failure_detection.beat(doing)

    def open_buffers(self, config: TreeTransformerConfig) -> None:
        """Make what the layers of a model with tp_comm_overlap need before they are built; nothing
        without it. Collective. Raises InputError."""
        if not config.tp_comm_overlap:
            return
        if self.buffers is None:
            raise InputError(
                "parallel.tp_comm_overlap = True needs buffers, and this World has none: join the "
                "processes by open_session(config), or remove it"
            )
        self.buffers.open(config)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints the messages."""
        return dist.get_rank() == 0

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def leads_data_rank(self) -> bool:
        """Whether this process acts for its data-parallel rank: exactly one of each rank does."""
        groups = self.groups
        return groups.tp.rank() == groups.pp.rank() == groups.cp.rank() == 0

    @property
    def sampler_layout(self) -> dict[str, int]:
        """Arguments of `Sampler` that follow from the layout: the number of data-parallel ranks,
        and multiples for the length of rows and for their number."""
        return {
            "num_ranks": self.data_size,
            "row_multiple": self.parallel.row_multiple,
            "count_multiple": self.parallel.count_multiple,
        }

    def context(self, config: TreeTransformerConfig) -> ContextParallel | None:
        """How context-parallel ranks share the rows; None if there is one such rank."""
        if self.parallel.context_parallel_size == 1:
            return None
        comm = self.parallel.cp_comm or DEFAULT_CP_COMM
        return ContextParallel(self.groups.cp, comm, ContextCost.of_model(config))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, in place."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over data-parallel ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, self.groups.dp)
        return values

    def gather(self, value: Any) -> list:
        """`value` of every process, in the order of ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.host)
        return values

    def once(self, action: Callable[[], Any]) -> Any:
        """Call `action` on the main process and return its result on every process. Collective.

        Its exception is raised on every process, as InputError if it is one, else as RunError.
        """
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as failure:  # raised below, so that no process waits without end
                error = failure
                outcome[1] = (isinstance(failure, InputError), str(failure))
        dist.broadcast_object_list(outcome, src=0, group=self.host)
        if error is not None:
            raise error
        if outcome[1] is not None:
            is_input, message = outcome[1]
            raise InputError(message) if is_input else RunError(message)
        return outcome[0]

    def once_per_node(self, action: Callable[[], Any]) -> list[Any]:
        """Call `action` on the first process of every node; all wait. Collective.

        Returns the results of all nodes on every process. An exception of a node is raised on every
        process, as InputError if it is one, else as RunError.
        """
        outcome: tuple[str, Any] | None = None
        error: Exception | None = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            try:
                outcome = "result", action()
            except Exception as failure:  # raised below, so that no process waits without end
                error = failure
                outcome = "input" if isinstance(failure, InputError) else "fault", str(failure)
        outcomes = self.gather(outcome)
        if error is not None:
            raise error
        for rank, (kind, value) in ((r, o) for r, o in enumerate(outcomes) if o is not None):
            if kind != "result":
                message = f"rank {rank}: {value}"
                raise InputError(message) if kind == "input" else RunError(message)
        return [value for _, value in (o for o in outcomes if o is not None)]


@contextlib.contextmanager
def join_world(parallel: ParallelConfig, seed: int) -> Iterator[World]:
    """Join the processes that `torchrun` started, or run alone; the context's end leaves them.

    Without CUDA, Megatron-Core is adapted inside the context (see platform/). Raises InputError
    if the number of processes does not fit `parallel`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if faults := list(world_faults(parallel, size)):
        raise InputError(faults[0])
    minutes = parallel.distributed_timeout_minutes
    timeout = timedelta(minutes=minutes, seconds=MARGIN_S)
    with adapted():
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Every group inherits the backend of the default one. With "cpu:gloo,cuda:nccl" each of the
        # groups of Megatron-Core would also connect all of its processes by gloo.
        backend = "nccl" if on_cuda else "gloo"
        store, rank = _meet(timeout)
        detection = FailureDetection(store, rank, size, minutes * 60) if size > 1 else None
        try:
            with detection or contextlib.nullcontext():
                dist.init_process_group(
                    backend,
                    store=dist.PrefixStore("groups", store),
                    rank=rank,
                    world_size=size,
                    timeout=timeout,
                )
                host = dist.new_group(backend="gloo", timeout=timeout) if on_cuda else None
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                    pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                    virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
                    context_parallel_size=parallel.context_parallel_size,
                    expert_model_parallel_size=parallel.expert_model_parallel_size,
                    create_gloo_process_groups=False,
                    distributed_timeout_minutes=timeout.total_seconds() / 60,
                )
                if on_cuda:
                    model_parallel_cuda_manual_seed(seed)
                else:
                    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
                groups = ProcessGroupCollection.use_mpu_process_groups()
                yield World(parallel, groups, device(), detection, host)
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            if detection is not None:
                detection.close()


def _meet(timeout: timedelta) -> tuple[dist.Store, int]:
    """The store shared by the processes that `torchrun` started, or one for this process alone,
    and this process's rank. Raises RunError if the others do not come."""
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore(), 0
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store = store_of_attempt(store, rank, size, timeout)
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"the {os.environ['WORLD_SIZE']} processes of the run did not meet within "
            f"{timeout.total_seconds() / 60:g} minutes ({reason}). Look at the other nodes' logs"
        ) from error
    return store, rank
