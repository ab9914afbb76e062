"""Training steps on rows with images: here in any layout, and by plain torch on each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from image_models import (
    GROUPS,
    ImageGroup,
    RandomPictures,
    alone_logps,
    hf_model,
    image_row,
)
from torch import Tensor

BETA, LR, DECAY, CLIP = 0.5, 3e-3, 0.05, 1.0
ROWS: list[list[ImageGroup]] = [GROUPS[:2], GROUPS[2:3], GROUPS[3:], GROUPS[2:3]]
"""Of two data-parallel ranks, the second has no images."""
NUM_PAIRS = 5


def sections(folder: Path, **more: Any) -> dict[str, Any]:
    """A configuration of such a run; `more` goes on top."""
    default = {
        "data": {"train": "none", "row_capacity": 512, "global_batch_size": NUM_PAIRS},
        "model": {"hf": str(folder)},
        "loss": {"beta": BETA},
        "optimizer": {
            "lr": LR,
            "lr_decay_style": "constant",
            "weight_decay": DECAY,
            "clip_grad": CLIP,
        },
        "train": {"steps": 6},
        "logging": {"output": "none"},
    }
    return {name: {**default.get(name, {}), **more.get(name, {})} for name in {**default, **more}}


def references(model: Any, pictures: RandomPictures, lengths: list[int]) -> list[Tensor]:
    """Of each row's responses, by transformers."""
    with torch.no_grad():
        return [alone_logps(model, groups, pictures, lengths) for groups in ROWS]


def is_trained(name: str, vision: Mapping[str, bool]) -> bool:
    """Whether a parameter of transformers' model is trained."""
    if "multi_modal_projector" in name or "image_newline" in name or "merger" in name:
        return not vision.get("freeze_projector", False)
    if "vision_tower" in name or "visual" in name:
        return not vision.get("freeze_tower", True)
    return True


def plain_steps(
    family: str, num_steps: int, vision: Mapping[str, bool]
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of each step of DPO on separate sequences, and the weights then."""
    model, pictures = hf_model(family).float(), RandomPictures.make(family, 4)
    with torch.no_grad():
        lengths = pictures.num_tokens(model)
    reference = references(model, pictures, lengths)
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, vision))
        if parameter.requires_grad:
            trained[name] = parameter
    decayed = [x for x in trained.values() if x.dim() > 1]
    others = [x for x in trained.values() if x.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        weight_decay=DECAY,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    steps = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        total = 0.0
        for groups, ref in zip(ROWS, reference, strict=True):
            logratios = alone_logps(model, groups, pictures, lengths) - ref
            first = 0
            for group in groups:
                margin = logratios[first] - logratios[first + 1]
                loss = -torch.nn.functional.logsigmoid(BETA * margin) / NUM_PAIRS
                loss.backward(retain_graph=True)
                total += loss.item()
                first += len(group.responses)
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP)
        optimizer.step()
        steps.append((total, float(norm)))
    return steps, {name: x.detach() for name, x in model.named_parameters()}


def our_steps(family: str, folder: str, output: str, num_steps: int, more: dict[str, Any]) -> None:
    """The same on the ranks of this process's run; the main one writes (steps, weights) to
    `output`, by canonical names."""
    from megatron_prefix.config import parse_config
    from megatron_prefix.distributed import join_world

    config = parse_config(sections(Path(folder), **more))
    with join_world(config.parallel, seed=0) as world:
        _our_steps(world, config, family, Path(folder), output, num_steps)


def _our_steps(world, config, family, folder, output, num_steps) -> None:
    from dataclasses import replace

    from megatron_prefix.engine import build_model, build_policy
    from megatron_prefix.engine.batch import to_device
    from megatron_prefix.model import load_hf_weights, transformer_config, unwrap
    from megatron_prefix.model.parameters import whole_parameters
    from megatron_prefix.objectives import check

    hf, pictures = hf_model(family).float(), RandomPictures.make(family, 4)
    with torch.no_grad():
        lengths = pictures.num_tokens(hf)
    model_config = transformer_config(config.model, seed=None, parallel=config.parallel)
    chunks = build_model(model_config, world)
    for chunk in chunks:
        load_hf_weights(unwrap(chunk), folder)
    policy = build_policy(chunks, model_config, config, num_steps)
    objective, context = check(config.loss), world.context(model_config)
    rank, size = world.groups.dp.rank(), world.groups.dp.size()
    rows = [
        (image_row(groups, pictures, lengths, multiple=8), ref)
        for groups, ref in zip(ROWS, references(hf, pictures, lengths), strict=True)
    ][rank::size]
    steps = []
    for _ in range(num_steps):
        batches = [
            to_device(
                row,
                world.device,
                {"pair": float(NUM_PAIRS)},
                share=None if context is None else context.share(row.layout, world.device),
                pictures=pictures,
            ).with_reference(ref.double())
            for row, ref in rows
        ]
        if world.groups.pp.rank() > 0:  # as the feed has it
            batches = [
                replace(b, images=b.images and replace(b.images, batches=())) for b in batches
            ]
        logs = policy.gradients(batches, objective)
        loss = world.sum(sum(log["loss"] for log in logs).clone())
        norm, _ = policy.update()
        steps.append((float(loss), norm))
    policy.finish_param_gather()
    own = {
        name: x.clone() for chunk in policy.chunks for name, x in whole_parameters(unwrap(chunk))
    }
    parts: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    for part in parts:  # ranks that have a parameter have the same one
        for name, x in part.items():
            assert torch.equal(x, own.setdefault(name, x)), name
    if world.is_main:
        torch.save((steps, own), output)
