"""Runs of several modes with one policy and one optimizer, built once for all data sets.

Weights are drawn on the device, in any order: the cost of a step does not depend on them, and
drawing a large model in the order of `train` takes minutes. If every mode has a precomputed
reference, no reference model is built: the policy computes it, as its weights do not change.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from bench_model import Mode

from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.store import PreferenceDataset


class Built:
    """A policy and its optimizer, and a frozen reference if `has_reference`.

    They are used for every data set with a vocabulary of `vocab_size`. `num_steps` is the total
    of all runs.
    """

    def __init__(
        self,
        config: Config,
        dataset: PreferenceDataset,
        world,
        has_reference: bool,
        num_steps: int,
    ) -> None:
        from megatron_prefix.checkpoint import resolve_starting_model
        from megatron_prefix.engine import build_model, build_policy
        from megatron_prefix.reference import frozen_model

        self.world, self.vocab_size = world, dataset.vocab_size
        self.initial = resolve_starting_model(config.model, [dataset])
        made, of_reference = (
            self.initial.transformer_config(None, config.parallel) for _ in range(2)
        )
        chunks = build_model(made, world)
        draw(chunks, config.model.init_method_std)
        self.reference = None
        if has_reference:
            self.reference = frozen_model(of_reference, world)
            with torch.no_grad():
                for ours, theirs in zip(self.reference, chunks, strict=True):
                    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                        own.copy_(other)
        self.policy = build_policy(chunks, made, config, num_steps)

    def run(self, config: Config, dataset: PreferenceDataset, reference=None):
        """A run of the policy on a data set, from the first step, with the frozen reference unless
        another one is given."""
        from megatron_prefix.objectives import check
        from megatron_prefix.trackers import Trackers
        from megatron_prefix.train import training_sampler
        from megatron_prefix.train.trainer import Trainer

        steps, objective = config.train.steps, check(config.loss, config.model.kind)
        return Trainer(
            config=config,
            objective=objective,
            world=self.world,
            initial=self.initial,
            sampler=training_sampler(config, objective, dataset, self.world),
            valid={},
            mismatches=None,
            joint=None,
            valid_mismatches={},
            reference=reference or self.model_reference(config),
            policy=self.policy,
            num_steps=steps,
            step=0,
            identity={},
            schedule={},
            adapter=None,
            trackers=Trackers(),
        )

    def model_reference(self, config: Config):
        """The frozen reference, or the policy if there is none."""
        from megatron_prefix.reference.model import ROUNDING, ModelReference

        dtype = config.model.dtype
        rounding = 0.0 if dtype == "float32" else ROUNDING[dtype]
        return ModelReference(self.reference or self.policy.chunks, self.world, rounding)

    def known_reference(self, config: Config, dataset: PreferenceDataset, sampler: Sampler):
        """Reference log-probabilities of the responses in a run's steps, as if read from a sidecar.
        Scoring the whole data set would take too long for a benchmark."""
        from megatron_prefix.engine.batch import to_device
        from megatron_prefix.reference.model import PrecomputedReference
        from megatron_prefix.reference.places import response_index

        for chunk in self.policy.chunks:
            chunk.eval()  # a step makes it train again
        model, known = self.model_reference(config), np.full(len(dataset.response_lengths), np.nan)
        for step in range(config.train.steps):
            plan = sampler.step(step)
            rows = sampler.micro_batches(plan)
            batches = [to_device(row, self.world.device, plan.denominators) for row in rows]
            for row, batch in zip(rows, model.attach(rows, batches), strict=True):
                known[response_index(dataset, row)] = batch.ref_logps.cpu().numpy()
        rounding = 2.0**-8 if config.model.dtype == "bfloat16" else 2.0**-16
        return PrecomputedReference(dataset, {dataset.fingerprint: known}, rounding)

    def runs(
        self, configs: dict[str, Config], modes: dict[str, Mode], dataset: PreferenceDataset
    ) -> dict:
        """One run per mode, all with the same groups in the same steps."""
        precomputed = [name for name, mode in modes.items() if mode.precomputed]
        known = None
        if precomputed:
            from megatron_prefix.objectives import check
            from megatron_prefix.train import training_sampler

            cheapest = min(precomputed, key=lambda name: modes[name].sharing != "tree")
            config = configs[cheapest]
            objective = check(config.loss, config.model.kind)
            sampler = training_sampler(config, objective, dataset, self.world)
            known = self.known_reference(config, dataset, sampler)
        by_mode = {}
        for name, mode in modes.items():
            reference = "precomputed" if mode.precomputed else "model"
            loss = replace(configs[name].loss, reference=reference)
            config = replace(configs[name], loss=loss)
            by_mode[name] = self.run(config, dataset, known if mode.precomputed else None)
        return by_mode


@torch.no_grad()
def draw(chunks: list[torch.nn.Module], std: float, seed: int = 0) -> None:
    """Draw matrices from N(0, std) on their device; set all other parameters, norms, to 1."""
    for chunk in chunks:
        generator = None
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            if generator is None:
                generator = torch.Generator(parameter.device).manual_seed(seed)
            parameter.normal_(0.0, std, generator=generator)
