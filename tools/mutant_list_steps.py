"""Mutants of objectives that need the whole step; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

STEP_MUTANTS = (
    Mutant(
        "a profile of one step too few",
        "train/profiling.py",
        "<= step <= self._window[1]:",
        "< step <= self._window[1]:",
        "numerics/test_generate.py",
    ),
    Mutant(
        "answers whose next token is asked for a token too early",
        "data/steps/alone/unfinished.py",
        "loss_start=len(sequence), set_id=0)",
        "loss_start=len(sequence) - 1, set_id=0)",
        "numerics/test_generate.py",
    ),
    Mutant(
        "logits of one tensor-parallel rank only",
        "model/gpt.py",
        "return torch.cat(parts, dim=-1)[:, : self.config.vocab_size].float()",
        "return parts[0][:, : self.config.vocab_size].float()",
        "distributed/test_generate_layouts.py",
    ),
    Mutant(
        "pairs between two parts left out of the table",
        "data/steps/step_columns.py",
        "bundle = replace(parts_of_bundle[0], part=None)",
        "bundle = parts_of_bundle[0]",
        "unit/data/steps/test_step_columns.py",
    ),
    Mutant(
        "a step with parts in one pass",
        "engine/feed.py",
        "if self._with_table or plan.is_divided:",
        "if self._with_table:",
        "numerics/test_split_runs.py",
    ),
    Mutant(
        "a part one response too large",
        "data/steps/parts.py",
        "if responses and tokens + added > capacity:",
        "if responses and tokens > capacity:",
        "unit/data/steps/test_parts.py",
    ),
    Mutant(
        "new tokens of a part counted as repeated",
        "data/steps/parts.py",
        "for node in nodes & seen)",
        "for node in nodes)",
        "unit/data/steps/test_parts.py",
    ),
    Mutant(
        "the table of a step keyed by group",
        "data/steps/sampler.py",
        "replace(bundle, slot=slot)",
        "replace(bundle, slot=int(group))",
        "unit/data/steps/test_step_columns.py",
    ),
    Mutant(
        "heads put where the other side's belong",
        "engine/table.py",
        "2 * pairs[:, None] + np.arange(2)",
        "2 * pairs[:, None] + 1 - np.arange(2)",
        "unit/engine/test_table.py",
    ),
    Mutant(
        "the two passes not compared",
        "train/two_passes.py",
        "if excess_of_all <= 1:",
        "if True:",
        "numerics/test_step_objectives.py",
    ),
    Mutant(
        "every rank reports the whole step",
        "train/two_passes.py",
        "return value if world.data_rank == 0 else torch.zeros_like(value)",
        "return value",
        "distributed/test_step_layouts.py",
    ),
    Mutant(
        "a held-out set sorted as a whole",
        "train/evaluation.py",
        "for start in range(0, len(dataset), block_size):",
        "block_size = len(dataset)\n    for start in range(0, len(dataset), block_size):",
        "numerics/test_step_objectives.py",
    ),
    Mutant(
        "the mean reward of earlier steps forgotten at a resume",
        "train/setup.py",
        'running_rewards=tuple(saved.get("running_rewards") or (0.0, 0.0)),',
        "running_rewards=(0.0, 0.0),",
        "numerics/test_unpaired_runs.py",
    ),
    Mutant(
        "a mismatch from the same prompt",
        "data/build/mismatches.py",
        "if prompts[donor] != prompts[group]:",
        "if donor != group:",
        "unit/data/build/test_mismatches.py",
    ),
)
