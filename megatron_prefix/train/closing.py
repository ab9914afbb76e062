"""The lines at the end of a run, finished or stopped: where everything is, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_prefix.checkpoint import RunCheckpoints
from megatron_prefix.config import Config
from megatron_prefix.config.lora import FEED_FORWARD_TARGETS
from megatron_prefix.distributed import World
from megatron_prefix.text import counted


def closing_lines(config: Config, step: int, report: Path, has_experts: bool = False) -> list[str]:
    """What a run of `step` steps leaves; `report` is its page, and `has_experts` says
    whether the model is a mixture."""
    output, save = config.logging.output, config.train.save
    lines = [f"done after {counted(step, 'step')}: configuration and metrics are in {output}"]
    page = f"report: {report}"
    if save is None:
        return [*lines, page, "train.save is not set, so the weights are not kept"]
    lines[0] += f", checkpoints in {save}"
    lines.append(page)
    best = RunCheckpoints(save).best() if config.train.keep_best is not None else None
    if best is not None:
        lines.append(f"best checkpoint: step {best['step']}, {best['metric']} {best['value']:.6g}")
    own = f"{output}/config.yaml"
    if config.data.valid is not None:
        lines.append(_command("evaluate", "--config", own, "--load", save))
    target = [f"{output}/hf"]
    if config.lora is not None:
        # a PEFT directory, if it can have these adapters
        adapts_experts = has_experts and set(config.lora.target_modules or ()) & set(
            FEED_FORWARD_TARGETS
        )
        target = [*target, "--merge"] if adapts_experts else [f"{output}/adapter"]
        if adapts_experts and config.model.hf is None and config.model.checkpoint is None:
            return [*lines, "adapters of experts on drawn weights have no other form: no export"]
    lines.append(_command("convert", "export", "--load", save, "--hf", *target))
    return lines


def stopped_message(config: Config, step: int, world: World) -> str:
    """What a run that a signal stopped after `step` ends with: how to go on. Several processes were
    started by a launcher, whose command is not known here."""
    save, load = config.train.save, config.train.load
    if save is None:
        return f"stopped by a signal after step {step} (train.save is not set)"
    message = f"stopped by a signal after step {step} (saved in {save})"
    override = [] if load is not None and Path(load) == Path(save) else [f"train.load={save}"]
    if world.failure_detection is None:
        next_line = _command("train", "--config", f"{config.logging.output}/config.yaml", *override)
    else:
        given = f" with {shlex.join(override)}" if override else ""
        next_line = f"next: the same command{given}"
    return f"{message}\n{next_line}"


def _command(*words: str) -> str:
    return f"next: {shlex.join(['megatron-prefix', *words])}"
