"""A training run, told in order.

1. Check the data sets, join the process groups, plan the steps.
2. Build the reference and the policy from the same initial weights; resume where asked.
3. Every step: rows of the plan -> reference log-probabilities -> forward and backward ->
   optimizer -> one line of metrics. The first step of a fresh run must have loss ln 2.
4. Evaluate and save at their intervals and at the end.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.config import Config, dump_config
from megatron_prefix.data.collate import MicroBatch
from megatron_prefix.data.sampler import Sampler, StepPlan
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.model.provider import transformer_config
from megatron_prefix.train import checkpoint
from megatron_prefix.train.evaluate import preference_metrics
from megatron_prefix.train.inputs import evaluation_sampler, open_verified, training_sampler
from megatron_prefix.train.metrics import MetricsWriter, Progress
from megatron_prefix.train.optimizer import build_model, build_optimizer, gradient_step
from megatron_prefix.train.parallel import World, world
from megatron_prefix.train.reference import freeze, score_dataset, with_reference
from megatron_prefix.train.step import PAIR_SUMS, run_schedule, to_device

FIRST_LOSS_TOLERANCE = 1e-5
BFLOAT16_ROUNDING = 2.0**-8


def train(config: Config) -> None:
    """Run `config` to its end. Raises InputError before any training where it cannot run,
    and RunError where the run finds itself wrong."""
    dataset = open_verified(config.data.train, "data.train")
    valid = open_verified(config.data.valid, "data.valid") if config.data.valid else None
    with world(config.parallel, config.train.seed) as here:
        run = Run.prepare(config, dataset, valid, here)
        try:
            run.run()
        finally:
            run.close()


@dataclass(kw_only=True, eq=False)
class Run:
    """One run's parts; `step` counts the optimizer steps that are done."""

    config: Config
    world: World
    sampler: Sampler
    valid: Sampler | None
    ref_model: list[torch.nn.Module]
    policy: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    num_steps: int
    step: int
    metrics: MetricsWriter
    progress: Progress
    valid_ref_logps: np.ndarray | None = None

    @classmethod
    def prepare(
        cls,
        config: Config,
        dataset: PreferenceDataset,
        valid: PreferenceDataset | None,
        here: World,
    ) -> Run:
        if valid is not None and valid.vocab_size != dataset.vocab_size:
            raise InputError(
                f"data.valid has a vocabulary of {valid.vocab_size}, data.train one of "
                f"{dataset.vocab_size}: build both with one tokenizer"
            )
        sampler = training_sampler(config, dataset)
        num_steps = config.train.steps or sampler.composition.num_steps(config.train.epochs)
        if config.optimizer.lr_warmup_steps >= num_steps:
            raise InputError(
                f"optimizer.lr_warmup_steps = {config.optimizer.lr_warmup_steps} does not end "
                f"within the run's {num_steps} steps: shorten it"
            )
        model_config = transformer_config(
            config.model, vocab_size=dataset.vocab_size, seed=config.train.seed
        )
        ref_model = freeze(build_model(model_config, here))
        chunks = build_model(model_config, here)
        if config.model.checkpoint:
            checkpoint.load_weights(config.model.checkpoint, ref_model)
            checkpoint.load_weights(config.model.checkpoint, chunks)
        policy, optimizer, scheduler = build_optimizer(
            chunks, model_config, config.optimizer, num_steps
        )
        step = _resume(config, dataset, policy, optimizer, scheduler)
        return cls(
            config=config,
            world=here,
            sampler=sampler,
            valid=evaluation_sampler(valid, config) if valid is not None else None,
            ref_model=ref_model,
            policy=policy,
            optimizer=optimizer,
            scheduler=scheduler,
            num_steps=num_steps,
            step=step,
            metrics=_open_metrics(config, step),
            progress=Progress(num_steps, step),
        )

    def run(self) -> None:
        """Train from `step` to `num_steps`."""
        settings = self.config.train
        if self.step == 0:
            self.evaluate()
        evaluated = saved = self.step
        while self.step < self.num_steps:
            row = self.train_step()
            self.metrics.write(row)
            self.progress.update(row)
            if settings.eval_interval and self.step % settings.eval_interval == 0:
                self.evaluate()
                evaluated = self.step
            if settings.save_interval and self.step % settings.save_interval == 0:
                self.save()
                saved = self.step
        if evaluated < self.step:
            self.evaluate()
        if settings.save and saved < self.step:
            self.save()

    def train_step(self) -> dict:
        """One optimizer step. Returns its line of metrics."""
        start = time.monotonic()
        plan = self.sampler.step(self.step)
        rows = self.sampler.micro_batches(plan)
        batches = [to_device(row, self.world.device, plan.weight) for row in rows]
        batches = with_reference(self.ref_model, batches, self.config.loss)
        for chunk in self.policy:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        logs = run_schedule(self.policy, batches, self.config.loss)
        means = self._means(plan, logs)
        if self.step == 0:
            self._check_first_loss(means["loss"], logs)
        grad_norm, learning_rate = gradient_step(self.optimizer, self.scheduler)
        self.step += 1
        seconds = time.monotonic() - start
        return {
            "step": self.step,
            **means,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_pairs": plan.num_pairs,
            **self._token_counts(plan, rows),
            "step_time_s": round(seconds, 4),
            "pairs_per_second": round(plan.num_pairs / seconds, 3),
        }

    def evaluate(self) -> None:
        """Score the held-out set and write an evaluation line."""
        if self.valid is None:
            return
        loss, device, dataset = self.config.loss, self.world.device, self.valid.dataset
        if self.valid_ref_logps is None:
            self.valid_ref_logps = score_dataset(self.ref_model, self.valid, loss, device)
        logps = score_dataset(self.policy, self.valid, loss, device)
        found = preference_metrics(dataset, logps, self.valid_ref_logps, self.config)
        self.metrics.write({"step": self.step, **{f"eval_{k}": v for k, v in found.items()}})
        self.progress.say(
            f"evaluation at step {self.step}: loss {found['loss']:.4f}, "
            f"accuracy {found['rewards/accuracies']:.3f}, "
            f"margin {found['rewards/margins']:.3f} over {found['num_pairs']} pairs"
        )

    def save(self) -> None:
        checkpoint.save_checkpoint(
            self.config.train.save,
            self.step,
            self.policy,
            self.optimizer,
            self.scheduler,
            _identity(self.config, self.sampler.dataset),
        )

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()

    def _means(self, plan: StepPlan, logs: list[dict]) -> dict[str, float]:
        """The loss over its weight, everything else over pairs."""
        sums = torch.stack([log["sums"] for log in logs]).sum(0).tolist()
        divisors = [plan.weight] + [plan.num_pairs] * (len(PAIR_SUMS) - 1)
        return {key: s / d for key, s, d in zip(PAIR_SUMS, sums, divisors, strict=True)}

    def _token_counts(self, plan: StepPlan, rows: list[MicroBatch]) -> dict[str, int]:
        dataset = self.sampler.dataset
        sides = [pair_lengths(dataset, int(group)) for group in plan.groups]
        return {
            "tokens/logical": int(sum(x.sum() for x in sides)),
            "tokens/executed": sum(len(row.tokens) for row in rows),
            "tokens/targets": sum(len(row.source_row) for row in rows),
            "rows/projected": sum(row.num_projected for row in rows),
        }

    def _check_first_loss(self, loss: float, logs: list[dict]) -> None:
        """Policy and reference are the same model, so rewards are 0 and the loss is ln 2.

        In bfloat16 a reward may be off by beta |logp| rounded to 8 bits.
        """
        rewards = torch.cat([log["rewards"] for log in logs])
        budget = torch.full_like(rewards, FIRST_LOSS_TOLERANCE)
        if self.config.model.dtype == "bfloat16":
            ref_logps = torch.cat([log["ref_logps"] for log in logs])
            budget += self.config.loss.beta * BFLOAT16_ROUNDING * ref_logps
        worst = int((rewards - budget).argmax())
        if rewards[worst] > budget[worst] or abs(loss - math.log(2)) > budget.max():
            raise RunError(
                f"the first loss is {loss:.8f} and the largest reward {float(rewards[worst]):.2e}, "
                f"where ln 2 = {math.log(2):.8f} and rewards of 0 (within "
                f"{float(budget[worst]):.1e}) were expected, because policy and reference are the "
                "same model at the first step: the two forward passes differ, so nothing this "
                "run learned could be trusted. Try model.attention_backend: dense to see whether "
                "attention is to blame"
            )


def pair_lengths(dataset: PreferenceDataset, group: int) -> np.ndarray:
    """Tokens of both sides of each pair of a group, each with its whole prompt, [pairs, 2]."""
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    first = int(dataset.group_responses[group])
    return np.asarray(dataset.response_lengths)[dataset.pair_responses[p0:p1] + first]


def _identity(config: Config, dataset: PreferenceDataset) -> dict:
    """What decides the order of the data: a resumed run must agree with it."""
    data = config.data
    return {
        "data.train fingerprint": dataset.fingerprint,
        "data.seed": data.seed,
        "data.global_batch_size": data.global_batch_size,
        "data.rows_per_step": data.rows_per_step,
        "train.epochs": config.train.epochs,
    }


def _resume(config, dataset, policy, optimizer, scheduler) -> int:
    load = config.train.load
    if load is None:
        return 0
    step = checkpoint.latest_step(load)
    if step is None:
        print(f"no checkpoint in {load}: starting afresh", flush=True)
        return 0
    identity = _identity(config, dataset)
    checkpoint.load_checkpoint(load, step, policy, optimizer, scheduler, identity)
    print(f"resumed from {load} after step {step}", flush=True)
    return step


def _open_metrics(config: Config, step: int) -> MetricsWriter:
    output = Path(config.logging.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        return MetricsWriter(
            str(output),
            resumed_step=step if config.train.load else None,
            tensorboard=config.logging.tensorboard,
        )
    except OSError as error:
        raise InputError(
            f"logging.output = {output}: {error.strerror}; name a directory that can be written"
        ) from None
