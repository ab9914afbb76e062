"""Feed: the rows of each step, prepared on a thread while the step before runs.

The host alone plans rows, reads trees, finds targets, scales pictures, assigns tokens to
context-parallel ranks and plans attention. Done ahead of time, the device does not wait for it
between steps.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_prefix.attention import prepare_attention
from megatron_prefix.attention.context_parallel import ContextShare
from megatron_prefix.data.steps import MicroBatch, Sampler, Step
from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World, check_row
from megatron_prefix.engine.batch import TrainBatch, to_device
from megatron_prefix.engine.pictures import Pictures
from megatron_prefix.engine.table import StepTable
from megatron_prefix.model import TreeTransformerConfig
from megatron_prefix.objectives import ScoreParts


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRows:
    """A step's plan, and this rank's rows of it on the host and on the device."""

    plan: Step
    rows: list[MicroBatch]
    batches: list[TrainBatch]
    table: StepTable | None = None
    """The step as one table, if the objective looks at all of it, or if the responses of a pair or
    set lie in several rows."""


class Feed:
    """Steps of one sampler for this rank. A request for one starts the preparation of the next.

    `config` is the model's, which decides how keys travel and what its attention reads; `parts` is
    what the objective needs of it; `with_table` prepares the table of every step, and not only of
    those that need it. Steps from `num_steps` on are not prepared. Close it, so that the thread
    ends.
    """

    def __init__(
        self,
        sampler: Sampler | AloneSteps,
        world: World,
        config: TreeTransformerConfig,
        num_steps: int,
        parts: ScoreParts | None = None,
        *,
        with_table: bool = False,
    ) -> None:
        self._sampler, self._world, self._config = sampler, world, config
        self._context, self._num_steps, self._parts = world.context(config), num_steps, parts
        self._with_table = with_table
        self._pictures = Pictures.of(sampler.dataset, config) if config.vision else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._next: tuple[int, Future[StepRows]] | None = None

    @property
    def dataset(self) -> PreferenceDataset:
        """The data set that rows are made of."""
        return self._sampler.dataset

    def step(self, step: int) -> StepRows:
        """Step `step`, counted from 0. Raises what its preparation raised."""
        # After step 4, step 5 is prepared. A request for any other step drops it.
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._prepare, step))
        _, rows = self._next
        self._next = None
        if step + 1 < self._num_steps:
            self._next = (step + 1, self._thread.submit(self._prepare, step + 1))
        return rows.result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> StepRows:
        device = self._world.device
        # Each thread has its own current CUDA device, and a new thread begins with device 0.
        if device.type == "cuda":
            torch.cuda.set_device(device)
        plan = self._sampler.step(step)
        rows = self._sampler.micro_batches(plan, self._world.data_rank)
        batches = [
            to_device(
                row,
                device,
                plan.denominators,
                share=self._share(row),
                parts=self._parts,
                pictures=self._pictures,
            )
            for row in rows
        ]
        for batch in batches:
            check_row(self._config, batch.tokens.size(1))
            prepare_attention(batch.params, self._config)
        table = None
        if self._with_table or plan.is_divided:
            parts = self._parts or ScoreParts()
            assert isinstance(self._sampler, Sampler), "AloneTable makes the tables of AloneSteps"
            table = StepTable.of(self._sampler, plan, self._world.data_rank, parts)
        return StepRows(plan=plan, rows=rows, batches=batches, table=table)

    def _share(self, row: MicroBatch) -> ContextShare | None:
        """This rank's part of a row; None without context parallelism."""
        context = self._context
        return None if context is None else context.share(row.layout, self._world.device)
