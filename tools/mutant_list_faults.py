"""Mutants of deadlines and of what is read; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

FAULT_MUTANTS = (
    Mutant(
        "the last deadline does not end the process",
        "distributed/liveness.py",
        "            if is_over:\n",
        "            if is_over and is_told:\n",
        "unit/distributed/test_last_deadline.py",
    ),
    Mutant(
        "failures on other nodes not raised",
        "distributed/world.py",
        '            if kind != "result":\n',
        '            if kind == "nothing":\n',
        "unit/distributed/test_world.py",
    ),
    Mutant(
        "different data sets on the nodes accepted",
        "train/samplers.py",
        "if {*fingerprints, dataset.fingerprint} != {dataset.fingerprint}:",
        "if not {*fingerprints, dataset.fingerprint}:",
        "unit/train/test_samplers.py",
    ),
    Mutant(
        "files outside a checkpoint's folder read",
        "checkpoint/torch_dist.py",
        "if Path(place.relative_path).name != str(place.relative_path):",
        "if not Path(place.relative_path).name:",
        "robustness/test_payloads.py",
    ),
    Mutant(
        "a save in the background shares memory with training",
        "checkpoint/save_load.py",
        "is_copied=self.background is not None",
        "is_copied=False",
        "robustness/test_async_save.py",
    ),
    Mutant(
        "a checkpoint published before it is on the disk",
        "checkpoint/save_load.py",
        "            on_main(lambda: flush_tree(partial), group)\n",
        "",
        "unit/checkpoint/test_background.py",
    ),
    Mutant(
        "a run that ends before its last save",
        "train/trainer.py",
        "                self.checkpoints.wait()\n",
        "                pass\n",
        "robustness/test_async_save.py",
    ),
    Mutant(
        "a failed save in the background goes unnoticed",
        "checkpoint/background.py",
        "        has_failed = not is_running and self._error is not None\n",
        "        has_failed = False\n",
        "unit/checkpoint/test_background.py",
    ),
    Mutant(
        "an end at once waits for the removal of old checkpoints",
        "checkpoint/save_load.py",
        "        for folder in leftovers:\n            shutil.rmtree(folder, ignore_errors=True)\n",
        "            for folder in leftovers:\n"
        "                shutil.rmtree(folder, ignore_errors=True)\n",
        "unit/checkpoint/test_background.py",
    ),
    Mutant(
        "every rank hangs in a stalled write in the background",
        "distributed/verdict.py",
        "if work.is_awaited and work.ident in frames:",
        "if not work.is_awaited and work.ident in frames:",
        "unit/distributed/test_verdict.py",
    ),
    Mutant(
        "pictures cost nothing where they are only scored",
        "train/row_costs.py",
        "if store is None or initial.source is None or",
        "if not is_trained or store is None or initial.source is None or",
        "unit/train/test_row_costs.py",
    ),
)
