"""A run: its parts, its steps, and when it evaluates, saves and stops.

Every step: rows of the plan -> reference log-probabilities -> forward and backward -> optimizer
-> one line of metrics. The first step of a fresh run with a reference must have loss ln 2.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.checkpoint.starting_model import InitialModel
from megatron_prefix.config.schema import Config
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.steps.sampler import Sampler, Step
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.signals import StopRequest
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.feed import Feed
from megatron_prefix.engine.optimizer import finish_param_gather, gradient_norm, gradient_step
from megatron_prefix.engine.step import run_schedule
from megatron_prefix.errors import RunError, Stopped
from megatron_prefix.model.gpt import unwrap
from megatron_prefix.model.layers.moe import step_auxiliary
from megatron_prefix.objectives.objective import pair_metrics
from megatron_prefix.reference.reference import Reference, score_dataset
from megatron_prefix.trackers.jsonl import MetricsWriter, Progress
from megatron_prefix.train import non_finite as nonfinite
from megatron_prefix.train.evaluation import preference_metrics
from megatron_prefix.train.first_step import check_first_loss


@dataclass(kw_only=True, eq=False)
class Run:
    """One run's parts; `step` counts the optimizer steps that are done."""

    config: Config
    world: World
    initial: InitialModel
    sampler: Sampler
    valid: Sampler | None
    reference: Reference
    policy: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    num_steps: int
    step: int
    identity: dict
    metrics: MetricsWriter | None
    progress: Progress
    valid_ref_logps: np.ndarray | None = None

    @cached_property
    def feed(self) -> Feed:
        """Steps from the one that is next to the last."""
        return Feed(self.sampler, self.world, unwrap(self.policy[0]).config, self.num_steps)

    def run(self, stop: StopRequest | None = None) -> None:
        """Train from `step` to `num_steps`, or until `stop` is asked for."""
        settings = self.config.train
        if self.step == 0:
            self.evaluate()
        while self.step < self.num_steps:
            row = self.train_step()
            self._write(row)
            self.progress.update(row)
            is_last = self.step == self.num_steps
            is_asked = stop is not None and stop.is_asked()
            if is_last or _is_due(self.step, settings.eval_interval):
                self.evaluate()  # before saving, so that what is saved is complete
            if settings.save and (
                is_last or is_asked or _is_due(self.step, settings.save_interval)
            ):
                self.save()
            if is_asked and not is_last:
                kept = f"saved in {settings.save}" if settings.save else "train.save is not set"
                raise Stopped(f"stopped by a signal after step {self.step} ({kept})")

    def train_step(self) -> dict:
        """One optimizer step. Returns its line of metrics."""
        start = time.monotonic()
        self.world.beat(f"step {self.step + 1}")
        found = self.feed.step(self.step)
        plan, rows, batches = found.plan, found.rows, found.batches
        if self.config.model.moe_aux_loss_coeff:
            count = self._step_count(rows)
            batches = [batch.with_step_count(count) for batch in batches]
        batches = self.reference.attach(rows, batches)
        logs = self._gradients(batches)
        means, counts = self._totals(plan, rows, logs)
        if self.config.model.moe_aux_loss_coeff:
            means["moe/aux_loss"] = step_auxiliary(self.policy, self.world.device)
        if not np.isfinite(list(means.values())).all():
            self._stop_nonfinite("loss", rows, batches, nonfinite.finite_rows(logs))
        if self.step == 0 and self.config.loss.reference != "none":
            check_first_loss(means["loss"], logs, self.config, self.reference, self.world)
        stepped = gradient_step(self.optimizer, self.scheduler)
        if stepped is None:
            self._stop_nonfinite("gradient", rows, batches, self._finite_gradients(batches))
        grad_norm, learning_rate = stepped
        self.step += 1
        seconds = time.monotonic() - start
        return {
            "step": self.step,
            **means,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_pairs": plan.num_pairs,
            **counts,
            "step_time_s": round(seconds, 4),
            "pairs_per_second": round(plan.num_pairs / seconds, 3),
        }

    def evaluate(self) -> None:
        """Score the held-out set and write an evaluation line."""
        if self.valid is None:
            return
        self.world.beat(f"the evaluation after step {self.step}")
        if self.valid_ref_logps is None:
            self.valid_ref_logps = self.reference.score(self.valid)
        logps = score_dataset(self.policy, self.valid, self.config.loss, self.world)
        dataset = self.valid.dataset
        found = preference_metrics(dataset, logps, self.valid_ref_logps, self.config)
        if not np.isfinite(list(found.values())).all():
            raise RunError(
                f"the evaluation after step {self.step} is not finite (loss {found['loss']}): the "
                "weights have run away. Lower optimizer.lr, and resume from a checkpoint"
            )
        self._write({"step": self.step, **{f"eval_{k}": v for k, v in found.items()}})
        self.progress.say(
            f"evaluation at step {self.step}: loss {found['loss']:.4f}, "
            f"accuracy {found['rewards/accuracies']:.3f}, "
            f"margin {found['rewards/margins']:.3f} over {found['num_pairs']} pairs"
        )

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.world.beat(f"the save of step {self.step}")
        finish_param_gather(self.policy)
        checkpoint.save_checkpoint(
            self.config.train.save,
            self.step,
            self.policy,
            self.optimizer,
            self.scheduler,
            self.identity,
            attach=self.initial.attach,
        )

    def close(self) -> None:
        self.feed.close()
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _write(self, row: dict) -> None:
        if self.metrics is None:
            return
        try:
            self.metrics.write(row)
        except OSError as error:
            raise RunError(
                f"logging.output = {self.config.logging.output}: the metrics of step {row['step']} "
                f"could not be written ({error}). Free some space, and resume with train.load"
            ) from error

    def _gradients(self, batches: list[TrainBatch]) -> list[dict]:
        """Forward and backward over rows, from zero gradients. Returns the rows' logs."""
        for chunk in self.policy:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(self.policy, batches, self.config.loss)

    def _totals(
        self, plan: Step, rows: list[MicroBatch], logs: list[dict]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Means of the step (the loss over its weight, everything else over pairs) and its token
        counts, from one sum over ranks, in float64, which has all counts exactly."""
        dataset, names = self.sampler.dataset, pair_metrics(self.config.loss)
        counts = {
            "tokens/executed": sum(len(row.tokens) for row in rows),
            "tokens/targets": sum(len(row.logit_token) for row in rows),
            "rows/projected": sum(row.num_projected for row in rows),
        }
        sums = torch.stack([log["sums"] for log in logs]).sum(0)
        totals = torch.cat([sums, torch.tensor([*counts.values()], dtype=sums.dtype).to(sums)])
        totals = self.world.sum(totals).tolist()
        divisors = [plan.weight] + [plan.num_pairs] * (len(names) - 1)
        means = {key: s / d for key, s, d in zip(names, totals, divisors, strict=False)}
        logical = sum(int(pair_lengths(dataset, int(g)).sum()) for g in plan.groups)
        found = {key: int(x) for key, x in zip(counts, totals[len(names) :], strict=True)}
        return means, {"tokens/logical": logical, **found}

    def _step_count(self, rows: list[MicroBatch]) -> float:
        """What the auxiliary loss of experts divides by: the step's tokens, as it counts them."""
        model = self.config.model
        served = np.concatenate([row.served for row in rows])
        counts = served if model.moe_count == "responses" else served > 0
        return float(self.world.sum(torch.tensor(int(counts.sum()), device=self.world.device)))

    def _finite_gradients(self, batches: list[TrainBatch]) -> list[bool]:
        """Whether each row alone has finite gradients; its peers on other ranks run with it.

        Interleaved stages run several rows or none, so that under them no row is to blame.
        """
        if self.config.parallel.virtual_pipeline_model_parallel_size is not None:
            return [True] * len(batches)
        found = []
        for batch in batches:
            self._gradients([batch])
            found.append(bool(np.isfinite(gradient_norm(self.optimizer))))
        return found

    def _stop_nonfinite(self, what: str, rows, batches, is_finite: list[bool]) -> None:
        """Keep the step's rows and raise RunError with those that are to blame."""
        step, rank = self.step + 1, self.world.data_rank
        output, note = self.config.logging.output, ""
        kept = rank if self.world.data_size == 1 else "*"
        if self.world.leads_data_rank:
            try:
                nonfinite.save_rows(output, step, rank, rows, batches)
            except OSError as error:
                note = f"could not be kept ({error.strerror})"
        found = self.world.gather((nonfinite.describe(rank, rows, is_finite), note))
        lines = sorted({line for part, _ in found for line in part}) or ["the sum of all rows"]
        notes = [note for _, note in found if note] or [
            f"are kept in {output}/{nonfinite.file_name(step, kept)} for replay"
        ]
        among = "one of " if what == "gradient" and len(lines) > 1 else ""
        raise RunError(
            f"the {what} of step {step} is not finite: {among}{'; '.join(lines)}. The weights are "
            f"those of step {self.step}; the step's rows {notes[0]}. Look at these groups, lower "
            "optimizer.lr, or resume from a checkpoint"
        )


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def pair_lengths(dataset: PreferenceDataset, group: int) -> np.ndarray:
    """Tokens of both sides of each pair of a group, each with its whole prompt, [pairs, 2]."""
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    first = int(dataset.group_responses[group])
    return np.asarray(dataset.response_lengths)[dataset.pair_responses[p0:p1] + first]
