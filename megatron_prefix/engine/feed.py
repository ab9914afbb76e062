"""What a step runs on, prepared on a thread while the step before runs.

Planning rows, reading trees, finding targets, context-parallel owners and attention plans is work
for the host alone; with it out of the way the device does not wait between steps.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_prefix.attention.api import prepare
from megatron_prefix.attention.context_parallel.transports import ContextShare
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.steps.sampler import Sampler, Step
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.batch import TrainBatch, to_device
from megatron_prefix.model.gpt import TreeTransformerConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedStep:
    """A step's plan, and this rank's rows of it on the host and on the device."""

    plan: Step
    rows: list[MicroBatch]
    batches: list[TrainBatch]


class Feed:
    """Steps of one sampler for this rank; asking for one starts the next one's preparation.

    `config` is the model's, which decides how keys travel and what its attention reads. Nothing
    is prepared beyond `num_steps`. Close it, so that the thread ends.
    """

    def __init__(
        self, sampler: Sampler, world: World, config: TreeTransformerConfig, num_steps: int
    ) -> None:
        self._sampler, self._world, self._config = sampler, world, config
        self._context, self._num_steps = world.context(config), num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._next: tuple[int, Future] | None = None

    def step(self, step: int) -> PreparedStep:
        """Step `step`, counted from 0. Raises what its preparation raised."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._prepare, step))
        _, found = self._next
        self._next = None
        if step + 1 < self._num_steps:
            self._next = (step + 1, self._thread.submit(self._prepare, step + 1))
        return found.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> PreparedStep:
        device = self._world.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        plan = self._sampler.step(step)
        rows = self._sampler.micro_batches(plan, self._world.data_rank)
        batches = [to_device(row, device, plan.weight, share=self._share(row)) for row in rows]
        config = self._config
        for batch in batches:
            prepare(
                batch.params.plan,
                config.tree_attention_backend,
                config.params_dtype,
                config.kv_channels,
            )
        return PreparedStep(plan=plan, rows=rows, batches=batches)

    def _share(self, row: MicroBatch) -> ContextShare | None:
        """This rank's part of a row that context-parallel ranks share; None if nobody does."""
        context = self._context
        return None if context is None else context.share(row.layout, self._world.device)
