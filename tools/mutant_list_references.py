"""Mutants of several references; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

REFERENCE_MUTANTS = (
    Mutant(
        "labels of the step in its own window",
        "reference/weights.py",
        "        while step > 0 and missing > 0:\n            step -= 1\n"
        "            pairs = self.pairs_of_step(step)\n",
        "        step += 1\n        while step > 0 and missing > 0:\n            step -= 1\n"
        "            pairs = self.pairs_of_step(step)\n",
        "unit/reference/test_weights.py",
    ),
    Mutant(
        "labels of the step in its own draw",
        "reference/weights.py",
        "weights[self._drawn(step, self._before(step))] = 1.0",
        "weights[self._drawn(step, self._before(step + 1))] = 1.0",
        "unit/reference/test_weights.py",
    ),
    Mutant(
        "clip not divided among the sides",
        "objectives/reference_mixtures.py",
        "share_rejected = clip - share_chosen",
        "share_rejected = clip",
        "unit/objectives/test_reference_mixtures.py",
    ),
    Mutant(
        "adaptive weights exchanged, as in the published code",
        "objectives/reference_mixtures.py",
        "decided = (chosen - rejected).abs()",
        "decided = (chosen - rejected).abs().flip(0)",
        "unit/objectives/test_reference_mixtures.py",
    ),
    Mutant(
        "weights of the first step in every step",
        "train/trainer.py",
        "return self.reference.attach(rows, batches, self.step), None",
        "return self.reference.attach(rows, batches), None",
        "numerics/test_reference_runs.py",
    ),
    Mutant(
        "labelled responses with several references",
        "objectives/reference_checks.py",
        'if unit in ("response", "label") and record',
        'if unit == "response" and record',
        "unit/objectives/test_reference_mixtures.py",
    ),
    Mutant(
        "a shadow run that forgets the rewards of earlier steps",
        "train/shadow.py",
        "running_rewards=first.running_rewards,",
        "running_rewards=(0.0, 0.0),",
        "numerics/test_shadow.py",
    ),
    Mutant(
        "the mismatches of a shadow run not compared",
        "train/shadow.py",
        '        yield from worst_score(\n            "mismatch",',
        '        yield from () and worst_score(\n            "mismatch",',
        "numerics/test_shadow.py",
    ),
    Mutant(
        "the KL of a shadow run is the first run's",
        "train/shadow.py",
        "kl = mean_kl(own - reference)",
        "kl = first.kl",
        "numerics/test_shadow.py",
    ),
)
