"""The best layouts of a run on a number of GPUs: `plan --search`.

1. Every layout without faults (layouts.py), with several sizes of rows.
2. For each, the rows of the first steps on its data-parallel ranks, and the least recomputation
   with which its fullest rank fits.
3. Seconds of a step by the formulas of step_time.py; the fastest come first.
4. Those that are listed pass the checks of a configuration once more, as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from megatron_prefix.config import Config, ParallelConfig, parse_config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import world_faults
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.adapters import trained_parameters
from megatron_prefix.estimate.attention import PathShare
from megatron_prefix.estimate.data_costs import (
    KnownModel,
    data_plan,
    mean_busy_ranks,
    planned_sampler,
)
from megatron_prefix.estimate.fewer_gpus import fewer_gpus, fewer_line
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.hardware import GIB, Hardware, check_dtype
from megatron_prefix.estimate.known import (
    known_dataset,
    known_model,
    row_bound,
    with_adapters,
    with_images,
)
from megatron_prefix.estimate.layouts import (
    chosen_settings,
    chunk_layers,
    parallel_layouts,
    recomputations,
    row_sizes,
)
from megatron_prefix.estimate.memory import pipeline_bubble
from megatron_prefix.estimate.planned_run import PlannedRun
from megatron_prefix.estimate.step_time import StepWork, step_time, utilisation
from megatron_prefix.objectives import Objective, check
from megatron_prefix.platform.gpus import GPUS
from megatron_prefix.text import counted

LISTED = 10
"""Layouts of the table."""
STEPS_READ = 4
"""First steps of the run whose rows are made for each number of ranks."""
DEFAULT_GPU = "H100"
"""Whose speed and links count if no GPU is named."""


@dataclass(frozen=True)
class Rows:
    """The rows of the first steps on some number of ranks."""

    lengths: np.ndarray
    """Tokens of each row of all steps and ranks."""
    steps: int
    per_rank: int
    busy_ranks: float

    @classmethod
    def of_sampler(cls, sampler: Sampler, config: Config) -> Rows:
        """Those of a sampler whose rows are not rounded up."""
        steps = min(STEPS_READ, config.train.steps or STEPS_READ, sampler.composition.num_steps(1))
        plans = [sampler.step(step) for step in range(steps)]
        if sampler.micro_batch_size is None:
            lengths = [
                sum(bundle.num_tokens for bundle in row)
                for plan in plans
                for rank in plan.rows
                for row in rank
            ]
        else:
            lengths = [
                len(row.tokens)
                for plan in plans
                for rank in range(sampler.num_ranks)
                for row in sampler.micro_batches(plan, rank)
            ]
        per_rank = max(len(plan.rows[0]) for plan in plans)
        return cls(np.array(lengths), steps, per_rank, mean_busy_ranks(plans))

    def tokens(self, multiple: int) -> float:
        """Of a step, each row rounded up to a multiple; rows of 5 and 8 in multiples of 4: 16."""
        return float((-(-self.lengths // multiple) * multiple).sum()) / self.steps


@dataclass(frozen=True)
class Estimate:
    """A configuration that fits, with the time of a step."""

    config: Config
    ranks: int
    seconds: float
    needed_gib: float
    rows_per_rank: int
    tokens: float
    step_mfu: float

    def described(self) -> dict[str, Any]:
        """Everything about it, for JSON."""
        return {
            "seconds_per_step": self.seconds,
            "needed_gib": self.needed_gib,
            "data_parallel_size": self.ranks,
            "rows_per_rank": self.rows_per_rank,
            "bubble": pipeline_bubble(self.config.parallel, self.rows_per_rank),
            "tokens_per_second": self.tokens / self.seconds,
            "step_mfu": self.step_mfu,
            "settings": chosen_settings(self.config),
        }


def search_layouts(config: Config, world_size: int, machine: Hardware) -> dict[str, Any]:
    """The fastest layouts of `config` on `world_size` GPUs, and that of `config` itself, ready for
    JSON. Raises InputError if model or data are not on this machine, or if no layout fits."""
    if machine.gpu is None:
        machine = replace(machine, gpu=GPUS[DEFAULT_GPU])
    check_dtype(machine, config.model)
    search = LayoutSearch.of_config(config, world_size, machine)
    best, tried, fitting = search.best()
    listed = [*_accepted(best, search.known)][:LISTED]
    if not listed:
        raise InputError(
            f"--search: none of {counted(tried, 'layout')} of {counted(world_size, 'GPU')} fits "
            f"the {machine.usable_gib:.1f} GiB that a run may fill of {machine.memory_gib:g} GiB: "
            "take more GPUs or memory, a smaller data.row_capacity, or adapters (docs/lora.md)"
        )
    assert machine.gpu is not None
    own_estimate = search.of_itself()
    fewer = fewer_gpus(world_size, listed[0].seconds, search.seconds_on)
    return {
        "world_size": world_size,
        "gpu": machine.gpu.name,
        "mfu": machine.mfu,
        "memory_gib": machine.memory_gib,
        "usable_gib": machine.usable_gib,
        "tried": tried,
        "fitting": fitting,
        "layouts": [estimate.described() for estimate in listed],
        "settings": chosen_settings(config),
        "own": None if own_estimate is None else own_estimate.described(),
        "fewer_gpus": fewer,
        "advice": [] if fewer is None else [fewer_line(world_size, fewer, config)],
    }


def _order(estimate: Estimate) -> tuple:
    """The fastest first; of equally fast ones that with less parallelism, then with less memory."""
    parallel = estimate.config.parallel
    return (
        estimate.seconds,
        parallel.pipeline_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        estimate.needed_gib,
    )


def _accepted(estimates: list[Estimate], known: KnownModel) -> Iterator[Estimate]:
    """Those that `train` accepts: the whole configuration is checked as if read from a file."""
    for estimate in estimates:
        try:
            checked = parse_config(yaml.safe_load(estimate.config.to_yaml()))
            checked.parallel.check_model(checked.model, known.sizes)
        except InputError:
            continue
        yield estimate


@dataclass(eq=False)
class LayoutSearch:
    """What all layouts have in common, and the rows by number of ranks."""

    config: Config
    objective: Objective
    dataset: PreferenceDataset
    known: KnownModel
    world_size: int
    machine: Hardware
    _rows: dict[tuple, Rows | None] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: Config, world_size: int, machine: Hardware) -> LayoutSearch:
        """Reads the model's sizes and the data. Raises InputError if they are not here."""
        objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
        missing: list[str] = []
        dataset = known_dataset(config, missing)
        known = known_model(config.model, dataset, missing)
        if known is not None:
            known = with_adapters(config, known, missing)
        if dataset is None or known is None or known.vocab_size is None:
            raise InputError(f"--search needs the model's sizes and the data: {'; '.join(missing)}")
        known = with_images(config, known, dataset)
        return cls(config, objective, dataset, known, world_size, machine)

    def best(self) -> tuple[list[Estimate], int, int]:
        """Each layout that fits with its best rows, the fastest first; how many layouts and sizes
        of rows were tried, and how many of them fit."""
        best: dict[ParallelConfig, Estimate] = {}
        tried = fitting = 0
        for candidate in self.candidates():
            tried += 1
            estimate = self.estimate(candidate)
            if estimate is None:
                continue
            fitting += 1
            of_layout = best.setdefault(candidate.parallel, estimate)
            if estimate.seconds < of_layout.seconds:
                best[candidate.parallel] = estimate
        return sorted(best.values(), key=_order), tried, fitting

    def seconds_on(self, world_size: int) -> float | None:
        """The time of a step in the fastest layout on another number of GPUs; None if none fits."""
        other = replace(self, world_size=world_size)
        vars(other)["_data"] = self._data  # of one rank
        first = next(_accepted(other.best()[0], self.known), None)
        return None if first is None else first.seconds

    def candidates(self) -> Iterator[Config]:
        """The configuration with every layout and size of rows; recomputation is not chosen yet."""
        model, sizes = self.config.model, self.known.sizes
        for parallel in parallel_layouts(self.world_size, model, sizes, self.config.parallel):
            if self._has_idle_stage(parallel):
                # its optimizer could not be saved, see engine/optimizer.py
                parallel = replace(
                    parallel, use_distributed_optimizer=False, overlap_param_gather=False
                )
            for config in row_sizes(self.config):
                yield replace(config, parallel=parallel)

    def _has_idle_stage(self, parallel: ParallelConfig) -> bool:
        """Whether a pipeline stage trains nothing, because its layers have no adapters."""
        known = self.known
        if known.lora is None:
            return False
        assert known.vocab_size is not None, "known before a search begins"
        sizes = self.config.model, known.sizes, parallel, known.lora, known.vocab_size
        stages = range(parallel.pipeline_model_parallel_size)
        return any(sum(trained_parameters(*sizes, stage)) == 0 for stage in stages)

    def estimate(self, candidate: Config) -> Estimate | None:
        """The candidate with the least recomputation that fits; None if none does, or if a group
        does not fit its rows."""
        rows = self.rows_of(candidate)
        if rows is None:
            return None
        layers = chunk_layers(self.known.sizes, candidate.parallel)
        choices = [replace(candidate, model=m) for m in recomputations(candidate.model, layers)]
        best = first_that_fits(choices, layers, lambda config: self._fits(config, rows))
        return None if best is None else self._timed(best, rows)

    def of_itself(self) -> Estimate | None:
        """That of the configuration as it is; None if it cannot run on so many GPUs or does not
        fit them."""
        if any(world_faults(self.config.parallel, self.world_size)):
            return None
        rows = self.rows_of(self.config)
        if rows is None or not self._fits(self.config, rows):
            return None
        return self._timed(self.config, rows)

    def rows_of(self, config: Config) -> Rows | None:
        """The rows of the first steps; None if a group of the data set does not fit them."""
        ranks, data = self._ranks(config.parallel), config.data
        # the rows of other multiples are the same, rounded up
        key = ranks, config.parallel.count_multiple, data.row_capacity, data.micro_batch_size
        if key not in self._rows:
            try:
                sampler = planned_sampler(config, self.objective, self.dataset, ranks, self.known)
            except InputError:
                self._rows[key] = None
            else:
                self._rows[key] = Rows.of_sampler(replace(sampler, row_multiple=1), config)
        return self._rows[key]

    @cached_property
    def _data(self) -> dict[str, Any]:
        """The first steps of the configuration as it is, on one rank."""
        sampler = planned_sampler(self.config, self.objective, self.dataset, 1, self.known)
        return data_plan(self.config, sampler, self.known)

    @property
    def _costs(self) -> dict[str, Any]:
        """What the first steps cost under the configuration's sharing mode."""
        return self._data["sharing"][self.config.data.sharing]

    @property
    def _forward(self) -> tuple[ForwardFlops, float]:
        """Operations of a forward pass per step without padding, and its tokens."""
        return ForwardFlops(**self._costs["forward_parts"]), self._costs["tokens"]

    def _ranks(self, parallel: ParallelConfig) -> int:
        stages = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return self.world_size // (stages * parallel.context_parallel_size)

    def _run(self, config: Config, rows: Rows) -> PlannedRun:
        tokens = row_bound(config) or int(rows.lengths.max())
        return PlannedRun(
            config,
            self.objective,
            self.known,
            self.world_size,
            tokens,
            rows.per_rank,
            PathShare.of_costs(self._costs),
            # longer rows have more images, in proportion
            round(self._data.get("kept_of_images", 0) * tokens / self._data["longest_row"]),
        )

    def _gib(self, config: Config, rows: Rows) -> float:
        """Of the fullest rank; stages between the second and the last need no more than the
        second."""
        last = config.parallel.pipeline_model_parallel_size - 1
        memory = self._run(config, rows).memory(config.model, sorted({0, min(1, last), last}))
        return memory["stages"][memory["fullest_stage"]]["total"] / GIB

    def _fits(self, config: Config, rows: Rows) -> bool:
        return self._gib(config, rows) <= self.machine.usable_gib

    def _timed(self, config: Config, rows: Rows) -> Estimate:
        job = self._run(config, rows).job(self.machine)
        assert job is not None, "a GPU is named"
        flops, own_tokens = self._forward
        multiple = config.parallel.row_multiple * config.model.token_multiple
        tokens = rows.tokens(config.data.length_multiple(multiple))
        padding = tokens / own_tokens
        work = StepWork(
            flops=replace(flops, linear=flops.linear * padding, adapters=flops.adapters * padding),
            tokens=tokens,
            rows=rows.per_rank,
            busy_ranks=rows.busy_ranks,
        )
        seconds = step_time(job, config.parallel, work).total
        return Estimate(
            config=config,
            ranks=self._ranks(config.parallel),
            seconds=seconds,
            needed_gib=self._gib(config, rows),
            rows_per_rank=rows.per_rank,
            tokens=tokens,
            step_mfu=utilisation(job, work, seconds),
        )


def first_that_fits(
    choices: list[Config], layers: int, fits: Callable[[Config], bool]
) -> Config | None:
    """The first of the choices of `recomputations` that fits. Among those with 1 to `layers` layers
    recomputed memory only falls, so halves of them are left out."""
    if fits(choices[0]):
        return choices[0]
    if not fits(choices[layers]):
        return next((choice for choice in choices[layers + 1 :] if fits(choice)), None)
    low, high = 0, layers  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        if fits(choices[middle]):
            high = middle
        else:
            low = middle
    return choices[high]
