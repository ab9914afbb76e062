"""A training run from beginning to end.

1. Join the process groups, check the data sets, and own the output directories.
2. Plan the steps, build reference and policy from the same initial weights, resume if asked to
   (setup.py).
3. Step, evaluate and save until the last step or a signal (trainer.py).
"""

from __future__ import annotations

from megatron_prefix.config import Config
from megatron_prefix.distributed import StopRequest, ends_at_once, open_session, owned
from megatron_prefix.errors import RunError, Stopped
from megatron_prefix.objectives import check
from megatron_prefix.report import report_run
from megatron_prefix.trackers import Status
from megatron_prefix.train.closing import closing_lines
from megatron_prefix.train.examples import write_examples
from megatron_prefix.train.samplers import open_plan, open_training_set, open_valid_sets
from megatron_prefix.train.setup import make_outputs, prepare_trainer
from megatron_prefix.train.trainer import Trainer


def train(config: Config) -> None:
    """Run `config` to its end.

    Raises InputError before any training if it cannot run, RunError if the run detects that it is
    wrong, and Stopped if a signal ended it early.
    """
    with open_session(config) as world, StopRequest(world) as stop:
        objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
        plan = open_plan(config, world)
        dataset = open_training_set(config, world, plan, needs_pairs=objective.needs_pairs)
        valid = open_valid_sets(config, world, needs_pairs=objective.needs_pairs)
        world.beat("preparation")
        with owned(make_outputs(config, world), world):
            trainer = prepare_trainer(config, dataset, valid, world, plan)
            _run(trainer, stop)
            world.once(lambda: _close(trainer))


def _close(trainer: Trainer) -> None:
    """Write what the finished run is looked at with, and say where it is."""
    config = trainer.config
    write_examples(config.logging.output, trainer.step, trainer.held_out.worst_pairs())
    try:
        report = report_run(config.logging.output)
    except OSError as error:
        raise RunError(
            f"logging.output = {config.logging.output}: report.html could not be written ({error});"
            " checkpoints and metrics are complete"
        ) from error
    has_experts = trainer.initial.sizes.num_moe_experts > 0
    print("\n".join(closing_lines(config, trainer.step, report, has_experts)), flush=True)


def _run(trainer: Trainer, stop: StopRequest) -> None:
    status: Status = "failed"
    at_once = False
    try:
        trainer.run(stop)
        status = "done"
    except BaseException as error:
        status = "stopped" if isinstance(error, Stopped) else "failed"
        at_once = ends_at_once(error)
        raise
    finally:
        trainer.close(status, at_once)
