"""If a loss or a gradient is not finite: name the rows that caused it, and save the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.distributed import World
from megatron_prefix.engine import TrainBatch
from megatron_prefix.errors import RunError


def finite_rows(logs: list[dict]) -> list[bool]:
    """Whether the loss and the sums of each row are finite."""
    return [
        bool(torch.cat([log["loss"][None], *log["sums"].values()]).isfinite().all()) for log in logs
    ]


def file_name(step: int, rank: int | str) -> str:
    """Name of the file with data-parallel rank `rank`'s rows of a step."""
    return f"nonfinite-step{step:07d}-rank{rank}.npz"


def save_rows(
    directory: str, step: int, rank: int, rows: list[MicroBatch], batches: list[TrainBatch]
) -> Path:
    """Write a rank's rows of a step as one .npz of integer and float arrays, for replay.

    `row0_tokens`, `row0_lengths` and `row0_parents` (the layout's segments), the targets, the
    pairs with their weights and margins, `row0_response_ids` (group, response) with
    `row0_response_tokens`, ranks, labels and attributes, the members of the comparison sets, and
    `row0_ref_logps` if there is a reference; with several also `row0_references_logps` [K, R] and
    the step's `row0_references_weights` [K]. Raises OSError.
    """
    arrays: dict[str, Any] = {"step": np.array(step)}
    for i, (row, batch) in enumerate(zip(rows, batches, strict=True)):
        own = {
            "tokens": row.tokens,
            "lengths": row.layout.lengths,
            "parents": row.layout.parents,
            "source_row": row.logit_token,
            "target_token": row.target_token,
            "response": row.response,
            "response_ids": row.response_ids,
            "response_tokens": row.response_tokens,
            "pairs": row.pairs,
            "pair_ids": row.pair_ids,
            "pair_weights": row.pair_weights,
            "pair_margins": row.pair_margins,
            "ranks": row.ranks,
            "labels": row.labels,
            "members": row.members,
        }
        if row.pair_betas is not None:
            own["pair_betas"] = row.pair_betas
        if row.attributes is not None:
            own["attributes"] = row.attributes
        if row.desirable is not None:
            own["desirable"] = row.desirable
        if batch.ref_logps is not None:
            own["ref_logps"] = batch.ref_logps.cpu().numpy()
        if batch.references is not None:
            own["references_logps"] = batch.references.logps.cpu().numpy()
            if batch.references.weights is not None:
                own["references_weights"] = batch.references.weights.cpu().numpy()
        arrays |= {f"row{i}_{name}": array for name, array in own.items()}
    path = Path(directory) / file_name(step, rank)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def describe(rank: int, rows: list[MicroBatch], is_finite: list[bool]) -> list[str]:
    """A line for every row that is not finite: its rank, number and groups."""
    return [
        f"rank {rank} row {i} (groups {', '.join(map(str, np.unique(row.response_ids[:, 0])))})"
        for i, (row, finite) in enumerate(zip(rows, is_finite, strict=True))
        if not finite
    ]


def stop_non_finite(
    quantity: str,
    step: int,
    rows: list[MicroBatch],
    batches: list[TrainBatch],
    causes: list[str],
    output: str,
    world: World,
) -> NoReturn:
    """Save the rows of step `step`, counted from 1, in the folder `output`, and raise RunError with
    the causes that all ranks know; `rows`, `batches` and `causes` are this rank's. Collective."""
    rank, note = world.data_rank, ""
    if world.leads_data_rank:
        try:
            save_rows(output, step, rank, rows, batches)
        except OSError as error:
            note = f"could not be saved ({error.strerror})"
    reports = world.gather((causes, note))
    lines = sorted({line for part, _ in reports for line in part}) or ["the sum of all rows"]
    file = file_name(step, rank if world.data_size == 1 else "*")
    notes = [note for _, note in reports if note]
    notes = notes or [f"are saved in {output}/{file} for replay"]
    among = "one of " if quantity == "gradient" and len(lines) > 1 else ""
    raise RunError(
        f"the {quantity} of step {step} is not finite: {among}{'; '.join(lines)}. The weights "
        f"are those of step {step - 1}; the step's rows {notes[0]}. Look at these groups, "
        "lower optimizer.lr, or resume from a checkpoint"
    )
