"""The optimizer's part of a checkpoint: how it is saved, and restored in another layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
GROUP_KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What distinguishes the parameter groups of one optimizer."""
GROUP_SCHEDULES = ("max_lr", "min_lr", "start_wd", "end_wd")
"""Settings of a group that follow from the configuration, which may differ from the saved run's."""
STATE = "optimizer.state."
MAIN_WEIGHTS = (f"{STATE}param.", f"{STATE}fp32_param.")
"""Before the name of a weight: its float32 copy, in the distributed optimizer, and in the plain one
of a bfloat16 model. The plain one of a float32 model has no copy."""


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether ranks share the optimizer's state, which is then saved in another form."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(isinstance(part, DistributedOptimizer) for part in parts)


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict, is_loading: bool
) -> dict:
    """The optimizer's sharded tensors, to save or to request. `model_state` is the models'."""
    if is_loading:
        for part in _distributed_parts(optimizer):
            part._init_optimizer_states_with_dummy_values()
    return optimizer.sharded_state_dict(dict(model_state), is_loading=is_loading, metadata=METADATA)


def request_main_weights(request: dict, saved_names: Iterable[str]) -> None:
    """Ask for the float32 weights under the name that the checkpoint has them under, in place.

    Plain and distributed optimizer differ in it alone; a float32 model's are the weights
    themselves. `request` is what `sharded_optimizer_state` gives, `saved_names` are the tensors of
    the checkpoint.
    """
    names = list(saved_names)
    saved = next((p for p in MAIN_WEIGHTS if any(name.startswith(p) for name in names)), "")
    for tensor in nested_values(request):
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
            for own in MAIN_WEIGHTS:
                if tensor.key.startswith(own):
                    tensor.key = saved + tensor.key.removeprefix(own)


def restore_optimizer(
    optimizer: MegatronOptimizer, state: dict, saved_parts: int | None, step: int
) -> None:
    """Restore the state after `step` steps; the settings of the parameter groups stay the same.

    `state` was loaded as `sharded_optimizer_state` requests it. `saved_parts` is how many parts
    the saved optimizer had, None if it was of the other kind, plain or distributed.
    """
    if saved_parts != len(optimizer.chained_optimizers):
        state = _with_own_groups(optimizer, state, step)
    _add_steps(optimizer, state, step)
    # Loading overwrites the groups' settings with the saved ones; the configuration's are put back.
    settings = [_settings(group) for group in optimizer.param_groups]
    _take_schedules(optimizer, state)
    _load(optimizer, state)
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)
    for part in optimizer.chained_optimizers:
        _place_steps(part)


def _place_steps(part: MegatronOptimizer) -> None:
    """Bring the step counts to where torch's fused Adam reads them: beside the parameters. The run
    that saved them may have had another Adam."""
    for group in part.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            own = part.optimizer.state.get(parameter, {})
            if "step" in own:
                own["step"] = own["step"].to(parameter.device, torch.float32)


def _add_steps(optimizer: MegatronOptimizer, state: dict, step: int) -> None:
    """Add the number of steps, which a checkpoint has of the first rank only: none, if nothing is
    trained there. The distributed optimizer has it in its groups."""
    for part, own in zip(optimizer.chained_optimizers, _by_part(state), strict=True):
        if not isinstance(part, DistributedOptimizer):
            inner = own.get("optimizer", own)
            inner.setdefault("state", {}).setdefault("common_step", torch.tensor(float(step)))


def _settings(group: dict) -> dict:
    """A parameter group's hyperparameters: everything except its parameters and their step."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _take_schedules(optimizer: MegatronOptimizer, state: dict) -> None:
    """Give the groups of `state` this run's schedules: Megatron-Core 0.19 pairs saved groups with
    its own by them, too, and so refuses another learning rate."""
    for part, saved in zip(optimizer.chained_optimizers, _by_part(state), strict=True):
        for group in saved.get("optimizer", saved)["param_groups"]:
            for own in part.param_groups:
                if all(own.get(key) == group.get(key) for key in GROUP_KINDS):
                    group.update({key: own[key] for key in GROUP_SCHEDULES if key in own})


def _distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Distributed optimizers on torch's Adam, which has one step count per parameter.

    Megatron-Core 0.16 expects one per group, as in the fused optimizers of Apex and Transformer
    Engine (distrib_optimizer.py:640, 818, 940).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [p for p in parts if isinstance(p, DistributedOptimizer) and not HAVE_APEX_OR_TE]


def num_parts(saved: dict) -> int:
    """How many parts the optimizer of a checkpoint had; `saved` is what it has beside tensors."""
    return len(_by_part(saved))


def _by_part(state: dict) -> list[dict]:
    """Optimizer state by part: one part, or a second one if ranks share experts."""
    return [state[i] for i in range(len(state))] if 0 in state else [state]


def _with_own_groups(optimizer: MegatronOptimizer, state: dict, step: int) -> dict:
    """`state` with the parameter groups of this run's optimizer, if the saved one was of the other
    kind, or only one of both runs shares experts over ranks.

    Tensors are found by name, whichever part they were saved in. Beside them a part has its
    groups, whose settings come from the configuration anyway, and the number of steps, which is
    the same for every parameter.
    """
    parts = optimizer.chained_optimizers
    # Keys are part numbers if there are several parts, else names. `state` may have both kinds.
    own_kind = {k: x for k, x in state.items() if isinstance(k, int) == (len(parts) > 1)}
    for part, own in zip(parts, _by_part(own_kind), strict=True):
        groups = part.state_dict()
        if isinstance(part, DistributedOptimizer):
            for group in groups["optimizer"]["param_groups"]:
                group["step"] = step
            own["optimizer"] = groups["optimizer"]
            continue
        inner = own["optimizer"] if "optimizer" in groups else own
        inner["param_groups"] = groups.get("optimizer", groups)["param_groups"]
        inner["state"]["common_step"] = torch.tensor(float(step))
    return own_kind


@torch.no_grad()
def _load(optimizer: MegatronOptimizer, state: dict) -> None:
    parts = _distributed_parts(optimizer)
    if not parts:
        optimizer.load_state_dict(state)
        return
    for part, own_state in zip(parts, _by_part(state), strict=True):
        parameters = own_state.pop("param_state")
        part.load_state_dict(own_state)
        # One step count per parameter is not what the loader expects, see `_distributed_parts`:
        # they are taken out and put back.
        steps = {p: own.pop("step") for p, own in part.optimizer.state.items()}
        part.load_parameter_state_from_fully_reshardable(parameters)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = (
                step.clone()
            )  # loading made all share one tensor
