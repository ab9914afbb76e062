"""A training run from beginning to end.

1. Join the process groups and check the data sets.
2. Plan the steps, build reference and policy from the same initial weights, resume where asked
   (prepare.py).
3. Step, evaluate and save until the end, or until the run is told to stop (run.py).
"""

from __future__ import annotations

from megatron_prefix.config.schema import Config
from megatron_prefix.distributed.session import open_session
from megatron_prefix.distributed.signals import StopRequest
from megatron_prefix.errors import Stopped
from megatron_prefix.trackers import Status
from megatron_prefix.train.samplers import open_plan, open_verified
from megatron_prefix.train.setup import prepare_run


def train(config: Config) -> None:
    """Run `config` to its end.

    Raises InputError before any training where it cannot run, RunError where the run finds
    itself wrong, and Stopped where a signal ended it early.
    """
    with open_session(config) as here, StopRequest(here) as stop:
        plan = open_plan(config, here)
        dataset = open_verified(config.data.train, "data.train", here, plan)
        valid = None
        if config.data.valid:
            valid = open_verified(config.data.valid, "data.valid", here)
        run = prepare_run(config, dataset, valid, here, plan)
        status: Status = "failed"
        try:
            run.run(stop)
            status = "done"
        except Stopped:
            status = "stopped"
            raise
        finally:
            run.close(status)
