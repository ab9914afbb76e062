"""Bridge's data set: rows of prefix trees with reference log-probabilities."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_prefix import with_reference
from megatron_prefix.bridge.provider import PrefixProvider
from megatron_prefix.bridge.settings import bridge_module
from megatron_prefix.config import LossConfig, ParallelConfig
from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.steps.compositions import StepSettings, with_comparisons
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.distributed import World
from megatron_prefix.engine import Feed, TrainBatch
from megatron_prefix.objectives import Objective, check
from megatron_prefix.platform import device
from megatron_prefix.reference import PrecomputedReference
from megatron_prefix.text import counted
from megatron_prefix.train import check_columns, open_on_nodes, run_sharing

Attach = Callable[[list[MicroBatch], list[TrainBatch]], list[TrainBatch]]
"""The same rows with reference log-probabilities; see `Reference.attach`."""

FP8_ROWS = 128
"""Tokens of a rank's part of a row are a multiple of this under FP8: what the strictest of
Transformer Engine's recipes (blocks of 128) asks for."""
CALLBACKS = (
    "timers",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
    "grad_scale_func",
    "finalize_model_grads_func",
)
"""Fields of the policy's configuration that act on the policy; its reference has none of them."""


class RowIterator:
    """An external iterator for Bridge: this rank's rows of the step that the forward step names.

    It has no position of its own to save: a resumed run asks for its step.
    """

    def __init__(self, feed: Feed, attach: Attach, num_steps: int | None = None) -> None:
        self._feed, self._attach, self._cycle = feed, attach, num_steps
        self._asked: tuple[int | None, int] | None = None
        self._step = -1
        self._rows: list[TrainBatch] = []

    def expect(self, step: int | None, num_rows: int) -> None:
        """Say which step the next row belongs to and how many rows the trainer takes of it. None
        is the step after the last one, from the first again after `num_steps`."""
        self._asked = step, num_rows

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> TrainBatch:
        if self._asked is None:
            raise RuntimeError(
                "a row was asked for before the forward step named its step: pass "
                "preference_forward_step(data) to pretrain; leave train.iterations_to_skip empty"
            )
        step, num_rows = self._asked
        if not self._rows:
            if step is None:
                assert self._cycle is not None, "held-out rows have a number of steps"
                step = (self._step + 1) % self._cycle
            self._load(step, num_rows)
        elif step not in (None, self._step):
            raise RuntimeError(
                f"step {step} begins with {counted(len(self._rows), 'row')} of step {self._step} "
                "left: the number of micro batches changed within a step"
            )
        return self._rows.pop(0)

    def _load(self, step: int, num_rows: int) -> None:
        if step == self._step and self._cycle != 1:
            raise RuntimeError(
                f"step {step} has {counted(num_rows, 'row')} and the trainer asks for more"
            )
        fed = self._feed.step(step)
        if len(fed.batches) != num_rows:
            raise ValueError(
                f"step {step} has {counted(len(fed.batches), 'row')} on this rank and the trainer "
                f"takes {num_rows}: rows_per_step of preference_data must be the global batch "
                "size, train.micro_batch_size must be 1, and train.rampup_batch_size must be None"
            )
        self._step, self._rows = step, self._attach(fed.rows, fed.batches)

    def close(self) -> None:
        self._feed.close()


class PreferenceData:
    """See `preference_data`. Bridge's own base class follows it; see `_data_class`."""

    model: Any
    prefix: str
    valid_prefix: str | None
    objective: Objective
    ref_logps: str | None
    ref_fingerprint: str | None
    rows_per_step: int
    row_capacity: int
    sharing: str
    seed: int
    cp_comm: str | None
    hooks: list
    world: World
    train: RowIterator
    valid: RowIterator | None = None

    def build_datasets(self, context: Any) -> tuple[RowIterator, RowIterator | None, None]:
        """The iterators of this rank; Bridge calls it after the model is built and loaded."""
        names = (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        layout: dict[str, Any] = {name: getattr(self.model, name) for name in names}
        parallel = ParallelConfig(**layout | {"cp_comm": self.cp_comm})
        self.world = World(parallel, context.pg_collection, device())
        if self.rows_per_step % self.world.data_size:
            raise ValueError(
                f"rows_per_step = {self.rows_per_step} is not a multiple of the "
                f"{self.world.data_size} data-parallel ranks: set it to one"
            )
        attach = self._frozen_model() if self.objective.reference == "model" else None
        self.train = self._rows(open_on_nodes(self.prefix, "prefix", self.world), attach)
        if self.valid_prefix is not None:
            valid = open_on_nodes(self.valid_prefix, "valid_prefix", self.world)
            self.valid = self._rows(valid, attach, repeats=True)
        return self.train, self.valid, None

    def _rows(
        self, data: PreferenceDataset, attach: Attach | None, repeats: bool = False
    ) -> RowIterator:
        model, world = self.model, self.world
        data = with_comparisons(own_responses(data), self.objective.comparisons)
        setting = "valid_prefix" if repeats else "prefix"
        check_columns(self.objective, data, setting, is_trained_on=not repeats)
        sharing = run_sharing(self.objective, self.sharing)
        if data.images is not None:
            raise ValueError(
                f"{data.prefix} has images, which models of Bridge do not read: train on it with "
                "the train command, or build a data set without images"
            )
        if data.vocab_size > model.vocab_size:
            raise ValueError(
                f"{data.prefix} has a vocabulary of {data.vocab_size} and model.vocab_size is "
                f"{model.vocab_size}: build the data set with the model's tokenizer"
            )
        if attach is None:
            path, name = self.ref_logps, self.ref_fingerprint
            assert path is not None and name is not None
            attach = PrecomputedReference.read(path, name, [data], rounding=0.0).attach
        steps = StepSettings(
            seed=self.seed,
            sharing=sharing,
            row_capacity=self.row_capacity,
            rows_per_step=self.rows_per_step,
        ).composition(data)
        sampler = Sampler(
            dataset=data,
            composition=steps,
            sharing=sharing,
            weighting=self.objective.weighting,
            row_capacity=self.row_capacity,
            num_ranks=world.data_size,
            row_multiple=world.parallel.row_multiple * (FP8_ROWS if model.fp8 else 1),
            count_multiple=self.rows_per_step // world.data_size,  # fills an epoch's last step
        )
        num_steps = steps.num_steps(1) if repeats else None
        feed = Feed(sampler, world, model, num_steps or sys.maxsize, self.objective.parts)
        return RowIterator(feed, attach, num_steps)

    def _frozen_model(self) -> Attach:
        provider = copy.copy(self.model)
        if provider.pipeline_model_parallel_size > 1:
            raise ValueError(
                "loss.reference = model with model.pipeline_model_parallel_size = "
                f"{provider.pipeline_model_parallel_size}: stages would wait for each other; score "
                "the data set first and use loss.reference = precomputed"
            )
        if not self.hooks:
            raise ValueError(
                "loss.reference = model, and the provider has no hook that loads weights: make it "
                "by AutoBridge.to_megatron_provider() with load_weights=True before "
                "preference_data, or use loss.reference = precomputed"
            )
        for name in CALLBACKS:
            setattr(provider, name, None)
        chunks = provider.provide_distributed_model(
            wrap_with_ddp=False, pre_wrap_hook=self.hooks, pg_collection=self.world.groups
        )
        frozen = [chunk.eval().requires_grad_(False) for chunk in chunks]
        return lambda rows, batches: with_reference(frozen, batches)

    def to_cfg_dict(self) -> dict[str, Any]:
        """For a checkpoint's `run_config.yaml`: what to build the same rows with."""
        names = ("prefix", "valid_prefix", "rows_per_step", "row_capacity", "sharing", "seed")
        return {name: getattr(self, name) for name in names}


@cache
def _data_class() -> type:
    return type("PreferenceData", (PreferenceData, bridge_module("data.base").DatasetProvider), {})


def preference_data(
    model: Any,
    prefix: str,
    *,
    rows_per_step: int,
    row_capacity: int,
    loss: LossConfig | None = None,
    ref_fingerprint: str | None = None,
    valid: str | None = None,
    sharing: str = "tree",
    seed: int = 1234,
    cp_comm: str | None = None,
) -> Any:
    """Bridge's `cfg.dataset` for a data set that `megatron-prefix build` wrote to `prefix`.

    `model` is the wrapped provider, as it will be `cfg.model`. `rows_per_step` counts packed rows
    over all data-parallel ranks and is also `cfg.train.global_batch_size`, with
    `cfg.train.micro_batch_size = 1`. `loss.reference` is `model`: a frozen copy with the weights
    that the provider's hooks load now; or `precomputed`: `loss.ref_logps`, which `megatron-prefix
    score` wrote for the reference model of `ref_fingerprint`. `valid` is a held-out data set;
    `cfg.validation.eval_iters` steps of it are taken at each evaluation.
    """
    loss = loss or LossConfig()
    objective = check(loss)
    if objective.model != "lm" or objective.reference == "none":
        raise ValueError(
            f"loss.loss_type = {objective.name} with loss.reference = {objective.reference}: in "
            "Bridge only policies with a reference are trained; use megatron-prefix train for "
            "reward models"
        )
    if objective.needs_blocks:
        raise ValueError(
            f"loss.loss_type = {objective.name}: looks at all responses of a step, which needs two "
            "passes over it, and Bridge's loop has one: use megatron-prefix train"
        )
    if objective.mixture is not None:
        raise ValueError(
            "loss.references: in Bridge a policy has one reference: set loss.ref_logps, or use "
            "megatron-prefix train"
        )
    if objective.reference == "precomputed" and not (loss.ref_logps and ref_fingerprint):
        raise ValueError(
            f"loss.ref_logps = {loss.ref_logps} and ref_fingerprint = {ref_fingerprint}: "
            "loss.reference = precomputed needs both, the file and its model's fingerprint"
        )
    if not isinstance(model, PrefixProvider):
        raise ValueError(f"model is a {type(model).__name__}: pass what prefix_preference returned")
    data = _data_class()(dataloader_type="external", num_workers=0)
    data.hooks = list(getattr(model, "_pre_wrap_hooks", []))
    data.model, data.prefix, data.valid_prefix = model, prefix, valid
    data.objective, data.ref_logps = objective, loss.ref_logps
    data.rows_per_step, data.row_capacity, data.sharing = rows_per_step, row_capacity, sharing
    data.ref_fingerprint, data.seed, data.cp_comm = ref_fingerprint, seed, cp_comm
    return data
