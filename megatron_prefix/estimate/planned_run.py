"""A run whose model and longest row are known: its memory, and what the formulas of time need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from megatron_prefix.config import Config, ModelConfig
from megatron_prefix.estimate.adapters import (
    adapted_host_gradients,
    adapted_memory,
    trained_parameters,
)
from megatron_prefix.estimate.attention import PathShare
from megatron_prefix.estimate.data_costs import KnownModel
from megatron_prefix.estimate.hardware import Hardware
from megatron_prefix.estimate.memory import (
    GRADIENT_BYTES,
    RankMemory,
    host_copy,
    host_gradients,
    rank_memory,
    state_sharers,
)
from megatron_prefix.estimate.step_time import Job
from megatron_prefix.estimate.vision import with_vision
from megatron_prefix.objectives import Objective


@dataclass(frozen=True)
class PlannedRun:
    """A run whose model and longest row are known."""

    config: Config
    objective: Objective
    known: KnownModel
    world_size: int
    row_tokens: int
    rows: int | None
    """Per step and rank; None if the data is not here."""
    paths: PathShare | None = None
    """None if the data is not here."""
    kept_of_images: int = 0
    """Bytes of a row that the part that reads images keeps for backward, at most."""

    @property
    def mode(self) -> str:
        """The sharing mode of the configuration."""
        return self.config.data.sharing

    def memory(self, model: ModelConfig, stages: Sequence[int] | None = None) -> dict[str, Any]:
        """Memory of every stage by component, or of some `stages`, with the recomputation of
        `model`, and the stage that has most. `host_gradients`, with `train.shadow_steps`, and
        `host_copy`, with `train.async_save`, are on the host and not part of the total."""
        config, known = self.config, self.known
        assert known.vocab_size is not None, "known before memory is"
        sizes = model, known.sizes, config.parallel
        shared = {"vocab_size": known.vocab_size, "world_size": self.world_size}
        of_rank: Callable[..., RankMemory] = rank_memory
        of_host: Callable[..., int] = host_gradients
        if known.lora is not None:
            of_rank = partial(adapted_memory, lora=known.lora)
            of_host = partial(adapted_host_gradients, lora=known.lora)
        if stages is None:
            stages = range(config.parallel.pipeline_model_parallel_size)
        needed = [
            of_rank(
                *sizes,
                **shared,
                row_tokens=self.row_tokens,
                stage=stage,
                has_reference=self.objective.reference == "model",
                rows=self.rows,
                paths=self.paths,
            )
            for stage in stages
        ]
        if known.vision is not None and 0 in stages:
            needed[list(stages).index(0)] = with_vision(
                needed[list(stages).index(0)],
                known.vision,
                model,
                config.parallel,
                world_size=self.world_size,
                has_reference=self.objective.reference == "model" and known.lora is None,
                rows=self.rows,
                kept=self.kept_of_images,
            )
        described = [{**asdict(stage), "total": stage.total} for stage in needed]
        if config.train.shadow_steps:
            for stage, description in zip(stages, described, strict=True):
                description["host_gradients"] = of_host(*sizes, **shared, stage=stage)
                if known.vision is not None and stage == 0:
                    sharers = state_sharers(config.parallel, self.world_size)[0]
                    description["host_gradients"] += (
                        GRADIENT_BYTES * known.vision.trained // sharers
                    )
        if config.train.async_save:
            for stage, description in zip(stages, described, strict=True):
                trained = sum(trained_parameters(*sizes, known.lora, known.vocab_size, stage))
                if known.vision is not None and stage == 0:
                    trained += known.vision.trained
                description["host_copy"] = host_copy(model, config.parallel, trained)
        return {
            "row_tokens": self.row_tokens,
            "fullest_stage": max(range(len(needed)), key=lambda i: needed[i].total),
            "stages": described,
        }

    def job(self, machine: Hardware | None) -> Job | None:
        """What the formulas of time need; None without a named GPU."""
        if machine is None or machine.gpu is None:
            return None
        assert self.known.vocab_size is not None, "known before time is"
        return Job(
            gpu=machine.gpu,
            mfu=machine.mfu,
            model=self.config.model,
            sizes=self.known.sizes,
            vocab_size=self.known.vocab_size,
            world_size=self.world_size,
            has_reference=self.objective.reference == "model",
            lora=self.known.lora,
            vision=self.known.vision,
        )
