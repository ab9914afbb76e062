"""Checkpoints of a run in Megatron's layout, complete or not there.

    DIR/iter_0000100/                         see torch_dist.py; `metadata.json` is written last
    DIR/latest_checkpointed_iteration.txt     "100", moved into place behind it

A checkpoint is written into a directory of its own under a name that no other run uses, and moved
into place when it is complete, so that a kill at any moment leaves the previous one whole. What a
run needs beside it is nothing: the order of the data is a function of the step, and no random
number is drawn after the initial weights.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.torch_dist import COMPLETE
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.model import REWARD_HEAD, TreeTransformerConfig, unwrap

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_OF_HEADS = ("kind", "untie_embeddings_and_output_weights")
"""What `model_sizes` says of a model's head."""


def iteration_dir(root: str | Path, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


def latest_step(root: str | Path) -> int | None:
    """Step of the newest complete checkpoint, or None where there is no checkpoint yet.

    Raises InputError where the tracker file and the directories disagree.
    """
    tracker = Path(root) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InputError(
            f"{tracker}: {text[:40]!r} is not a step; write the step of an iter_… directory, or "
            "remove the file to start afresh"
        )
    if not (iteration_dir(root, int(text)) / COMPLETE).exists():
        raise InputError(
            f"{tracker} names step {text}, but {iteration_dir(root, int(text))} is not a complete "
            f"checkpoint: write the step of a directory that has {COMPLETE}"
        )
    return int(text)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint's directory itself, or the newest one below a run's root."""
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    step = latest_step(path) if path.is_dir() else None
    if step is None:
        raise InputError(
            f"{path}: no checkpoint here; expected a directory with {COMPLETE}, or one with "
            f"{TRACKER}"
        )
    return iteration_dir(path, step)


def clear_leftovers(root: str | Path) -> None:
    """Remove what killed saves left behind."""
    for leftover in Path(root).glob(".iter_*.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(
    root: str,
    step: int,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run: dict,
    attach: Callable[[Path], None],
) -> None:
    """Write the state after `step` steps; collective.

    `run` is what a resumed run must agree with; `attach` puts further files into the directory.
    Raises RunError, with the previous checkpoint as it was, where the disk does not take it.
    """
    name = [uuid.uuid4().hex[:12]]
    dist.broadcast_object_list(name, src=0)
    target = iteration_dir(root, step)
    partial = target.with_name(f".{target.name}.partial-{name[0]}")
    try:
        _on_main(lambda: _make_room(partial))
        state = _sharded_state(chunks, optimizer)
        state |= {"scheduler": scheduler.state_dict(), "step": step, "run": run}
        state["model_sizes"] = model_sizes(chunks)
        torch_dist.save(state, partial)
        _on_main(lambda: attach(partial))
        torch_dist.write_checksums(partial)
        _on_main(lambda: _publish(Path(root), partial, target, step))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"train.save = {root}: the checkpoint of step {step} could not be written ({error}); "
            "earlier checkpoints are as they were. Free some space, and resume with train.load"
        ) from error


def _on_main(action: Callable[[], None]) -> None:
    """Run `action` on the main process; its OSError is raised on every process."""
    outcome: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _make_room(partial: Path) -> None:
    """Make the directory, and see that it takes what Megatron-Core writes from one process
    alone, where a failure would leave the others waiting."""
    partial.mkdir(parents=True)
    trial = partial / ".trial"
    trial.write_bytes(bytes(1 << 16))
    trial.unlink()


def _publish(root: Path, partial: Path, target: Path, step: int) -> None:
    """Move a complete checkpoint into place, then the tracker that names it."""
    if target.exists():  # complete or not, the tracker never named it
        shutil.rmtree(target)
    os.replace(partial, target)
    pointer = root / f".{TRACKER}"
    with pointer.open("w", encoding="utf-8") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, root / TRACKER)


def load_checkpoint(
    root: str,
    step: int,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run: dict,
) -> None:
    """Restore the state after `step` steps; collective.

    The optimizer's and the schedule's settings stay the configuration's. Raises InputError
    where the run that saved it was another one, or the checkpoint is damaged.
    """
    path = iteration_dir(root, step)
    common = torch_dist.load_common(path)
    _check_kind(path, model_sizes(chunks)["kind"])
    _check_agreement(path, "run", common.get("run"), run)
    _check_agreement(path, "model", common.get("model_sizes"), model_sizes(chunks))
    state = torch_dist.load(_sharded_state(chunks, optimizer, is_loading=True), path)
    _load_model(chunks, state)
    if len(_by_part(common["optimizer"])) != len(optimizer.chained_optimizers):
        state["optimizer"] = _with_own_groups(optimizer, state["optimizer"], step)
    settings = [_settings(group) for group in optimizer.param_groups]
    _load_optimizer(optimizer, state["optimizer"])
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    scheduler.load_state_dict(common["scheduler"])


def load_weights(path: str | Path, chunks: list[torch.nn.Module], keeps_head: bool = False) -> None:
    """Load a checkpoint's weights alone; collective.

    With `keeps_head` a reward model takes all but its head, which it keeps, from a language
    model's checkpoint. Raises InputError.
    """
    path = resolve_checkpoint(path)
    saved, ours = torch_dist.load_common(path).get("model_sizes"), model_sizes(chunks)
    state, unread = model_state(chunks), ()
    if keeps_head:
        unread = ("output_layer.weight",)
        state = {name: _without_head(tensors) for name, tensors in state.items()}
        ours = {key: value for key, value in ours.items() if key not in _OF_HEADS}
        saved = saved and {key: value for key, value in saved.items() if key not in _OF_HEADS}
    else:
        _check_kind(path, ours["kind"])
    if saved is not None:
        _check_agreement(path, "model", saved, ours)
    _load_model(chunks, torch_dist.load(state, path, unread))


def _without_head(tensors: dict) -> dict:
    return {name: x for name, x in tensors.items() if name != REWARD_HEAD}


def _check_kind(path: Path, kind: str) -> None:
    found = torch_dist.model_kind(path)
    if (found, kind) == ("reward", "lm"):
        raise InputError(
            f"{path}: a reward model's checkpoint, which has no language-model head, and "
            "model.kind is lm: set model.kind: reward, or give a language model's checkpoint"
        )
    if (found, kind) == ("lm", "reward"):
        raise InputError(
            f"{path}: a language model's checkpoint, which scores nothing, and model.kind is "
            "reward: give a reward model's, or train one from it with model.checkpoint"
        )


def model_state(chunks: list[torch.nn.Module]) -> dict:
    """Sharded tensors of the models' parameters, as saved and as requested."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return torch_dist.tensors_only(
        {name: unwrap(c).sharded_state_dict() for name, c in zip(names, chunks, strict=True)}
    )


def model_sizes(chunks: list[torch.nn.Module]) -> dict:
    """What a model's weights mean beside their shapes: a checkpoint must agree with all of it."""
    config = unwrap(chunks[0]).config
    scaling = config.rope_scaling
    return {
        "kind": config.kind,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.moe_ffn_hidden_size or config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "rotary_base": config.rotary_base,
        "rope_scaling": None if scaling is None else dict(vars(scaling)),
        "norm_epsilon": config.layernorm_epsilon,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        **_expert_sizes(config),
    }


def _expert_sizes(config: TreeTransformerConfig) -> dict:
    if config.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
    }


def _check_agreement(path: Path, what: str, saved: object, ours: dict) -> None:
    """Refuse a checkpoint of another run or model, naming every difference."""
    saved = saved if isinstance(saved, dict) else {}
    differing = ", ".join(
        f"{key}: {saved.get(key)!r} there, {ours.get(key)!r} here"
        for key in {**ours, **saved}
        if saved.get(key) != ours.get(key)
    )
    if differing:
        remedy = {
            "run": "resume with the same settings, or start from its weights with model.checkpoint",
            "model": "give the sizes and the data set's tokenizer that it was trained with",
        }[what]
        raise InputError(f"{path}: saved by another {what} ({differing}); {remedy}")


def _settings(group: dict) -> dict:
    """An optimizer group's hyperparameters: all but its parameters and their step."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _sharded_state(chunks, optimizer: MegatronOptimizer, is_loading: bool = False) -> dict:
    if is_loading:
        for part in _distributed_parts(optimizer):
            part._init_optimizer_states_with_dummy_values()
    state = model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=METADATA
    )
    return state


def _load_model(chunks: list[torch.nn.Module], state: dict) -> None:
    for i, chunk in enumerate(chunks):
        found = state["model" if len(chunks) == 1 else f"model{i}"]
        unwrap(chunk).load_state_dict(found, strict=False)


def _distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Distributed optimizers on torch's Adam, which keeps a step for every parameter.

    Megatron-Core 0.16 expects a step a group, as the fused optimizers of Apex and Transformer
    Engine have it (distrib_optimizer.py:640, 818, 940).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [p for p in parts if isinstance(p, DistributedOptimizer) and not HAVE_APEX_OR_TE]


def _by_part(state: dict) -> list[dict]:
    """Optimizer state by part: one, or where ranks share experts one for them beside it."""
    return [state[i] for i in range(len(state))] if 0 in state else [state]


def _with_own_groups(optimizer: MegatronOptimizer, state: dict, step: int) -> dict:
    """`state`, of a run that shared experts or did not, with the groups of one that is otherwise.

    Tensors are found by name whatever part they are saved in; what a part keeps beside them is
    its groups, whose settings are the configuration's anyway, and the number of steps, which every
    parameter has made.
    """
    parts = optimizer.chained_optimizers
    kept = {k: x for k, x in state.items() if isinstance(k, int) == (len(parts) > 1)}
    for part, own in zip(parts, _by_part(kept), strict=True):
        groups = part.state_dict()
        if isinstance(part, DistributedOptimizer):
            for group in groups["optimizer"]["param_groups"]:
                group["step"] = step
            own["optimizer"] = groups["optimizer"]
            continue
        inner = own["optimizer"] if "optimizer" in groups else own
        inner["param_groups"] = groups.get("optimizer", groups)["param_groups"]
        inner["state"]["common_step"] = torch.tensor(float(step))
    return kept


@torch.no_grad()
def _load_optimizer(optimizer: MegatronOptimizer, state: dict) -> None:
    parts = _distributed_parts(optimizer)
    if not parts:
        optimizer.load_state_dict(state)
        return
    for part, own_state in zip(parts, _by_part(state), strict=True):
        parameters = own_state.pop("param_state")
        part.load_state_dict(own_state)
        steps = {p: own.pop("step") for p, own in part.optimizer.state.items()}
        part.load_parameter_state_from_fully_reshardable(parameters)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = step.clone()  # loading made them share one
