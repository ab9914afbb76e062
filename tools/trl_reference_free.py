"""TRL's trainers of losses without a reference, for the comparisons: `CPOTrainer` for `cpo` and
`simpo`, `ORPOTrainer` for `orpo`. Both are in `trl.experimental`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl_common import Setting

REFERENCE_FREE = ("cpo", "simpo", "orpo")


def reference_free_parts(setting: Setting) -> tuple[type, type, dict[str, Any]]:
    """The classes of the configuration and of the trainer, and the arguments that only they have.

    TRL adds `cpo_alpha` times the likelihood under `simpo` too; here it is 0 for it.
    """
    arguments = {"beta": setting.beta, "max_length": 1 << 20}
    if setting.loss_type == "orpo":
        from trl.experimental.orpo import ORPOConfig

        return ORPOConfig, orpo_of_responses(), arguments
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    is_simpo = setting.loss_type == "simpo"
    arguments |= {
        "loss_type": "simpo" if is_simpo else "sigmoid",
        "cpo_alpha": 0.0 if is_simpo else 1.0,
        "label_smoothing": setting.label_smoothing,
    }
    return CPOConfig, CPOTrainer, arguments


def orpo_of_responses() -> type:
    """TRL's `ORPOTrainer` with the likelihood of the chosen responses alone, as in the paper.

    TRL's own counts the tokens of prompts too. The odds-ratio term is TRL's.
    """
    from trl.experimental.orpo import ORPOTrainer

    class ResponsesOnly(ORPOTrainer):
        def concatenated_forward(
            self, model: torch.nn.Module, batch: Mapping[str, Tensor]
        ) -> tuple[Tensor, ...]:
            chosen, *others, _ = super().concatenated_forward(model, batch)
            counts = (batch["chosen_labels"][:, 1:] != -100).sum(dim=1)
            likelihood = -(chosen * counts).sum() / counts.sum()
            return chosen, *others, likelihood

    return ResponsesOnly


def tokens_of_steps(rows: Any, setting: Setting) -> list[int]:
    """Tokens of both sides of every pair of each step, of the data set that a trainer tokenised."""
    sides = ("chosen_input_ids", "rejected_input_ids")
    lengths = [sum(len(row[side]) for side in sides) for row in rows]
    return [
        sum(lengths[step * setting.batch_size : (step + 1) * setting.batch_size])
        for step in range(setting.steps)
    ]
