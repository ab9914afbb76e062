"""Mutants of objectives that need no list of their own; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

BY_HAND = "unit/objectives/test_by_hand.py"
UNPAIRED = "unit/objectives/test_unpaired.py"
JOINT = "numerics/test_joint_reference.py"
SORTED = "unit/objectives/test_sorted_pairs.py"

OBJECTIVE_MUTANTS = (
    Mutant(
        "undesirable responses made likely",
        "objectives/unpaired.py",
        "(rewards - shift).sigmoid()",
        "(shift - rewards).sigmoid()",
        UNPAIRED,
    ),
    Mutant(
        "responses without a label in the running mean",
        "objectives/unpaired.py",
        "rewards[is_labelled].sum()",
        "rewards.sum()",
        UNPAIRED,
    ),
    Mutant(
        "the KL of mismatches below zero",
        "train/mismatches.py",
        "return logratios.mean().clamp(min=0)",
        "return logratios.mean()",
        "unit/train/test_mismatch_kl.py",
    ),
    Mutant(
        "the reference of a response from another one",
        "train/joint_reference.py",
        "world)[torch.from_numpy(places)]",
        "world)[: len(places)]",
        JOINT,
    ),
    Mutant(
        "a tree that does not fit with its mismatch refused",
        "train/samplers.py",
        '"tree", oversized="split")',
        '"tree")',
        JOINT,
    ),
    Mutant(
        "own rows for a reference that could share prompts",
        "train/samplers.py",
        'or not is_model or sampler.sharing != "tree"',
        'or is_model or sampler.sharing != "tree"',
        JOINT,
    ),
    Mutant(
        "a first step checked as if the reference had the same rows",
        "train/setup.py",
        "has_own_rows=joint is not None",
        "has_own_rows=False",
        JOINT,
    ),
    Mutant(
        "the mean log-ratio in place of KTO's KL",
        "objectives/objective.py",
        "            sums.setdefault(name, _mean(values))\n",
        "            sums[name] = _mean(values)\n",
        "unit/objectives/test_watching.py",
    ),
    Mutant(
        "one side of the step sorted",
        "objectives/sorted_pairs.py",
        "_sorted(chosen) - _sorted(rejected)",
        "_sorted(chosen) - rejected",
        SORTED,
    ),
    Mutant(
        "the Jensen-Shannon divergence moved",
        "objectives/divergences.py",
        "return math.log(2) + log_sigmoid(logratios)",
        "return log_sigmoid(logratios)",
        BY_HAND,
    ),
    Mutant(
        "SimPO's margin given",
        "objectives/reference_free.py",
        "- simpo_gamma, label_smoothing)",
        "+ simpo_gamma, label_smoothing)",
        BY_HAND,
    ),
    Mutant(
        "probabilities in place of odds",
        "objectives/reference_free.py",
        "(chosen - _log_one_minus_exp(chosen)) - (rejected - _log_one_minus_exp(rejected))",
        "chosen - rejected",
        BY_HAND,
    ),
    Mutant(
        "the added likelihood of ORPO forgotten",
        "objectives/reference_free.py",
        "        adds=Added(name=SFT),\n",
        "",
        BY_HAND,
    ),
    Mutant(
        "APO's chosen responses held back",
        "objectives/sides.py",
        "losses = 1 - chosen.sigmoid() + rejected.sigmoid()",
        "losses = chosen.sigmoid() + rejected.sigmoid()",
        BY_HAND,
    ),
    Mutant(
        "scores of a set not divided by the temperature",
        "objectives/ranking.py",
        "(labels.nan_to_num() / temperature)",
        "labels.nan_to_num()",
        "unit/objectives/test_ranking.py",
    ),
)
