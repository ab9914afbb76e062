"""Break one thing at a time in a copy of the repository, and see its tests fail.

A mutant is a file, a text that stands in it once, what replaces it, and the tests that must
notice. It is killed where pytest reports failed tests, and survives where they pass.

    python tools/mutants.py            # all of them
    python tools/mutants.py leaky      # those whose name has "leaky" in it
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
IGNORED = (".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "build", "quickstart")
TESTS_FAILED = 1  # pytest's exit code
TIMEOUT_S = 900


class Mutant(NamedTuple):
    """`old` stands in `file` (below megatron_prefix/) exactly once."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "leaky mask: siblings see one another",
        "attention/dense.py",
        "return (k <= q) & (q < subtree_ends)",
        "return k <= q",
        "numerics/test_attention.py",
    ),
    Mutant(
        "position by row",
        "layout.py",
        "np.arange(self.num_tokens, dtype=np.int64) + np.repeat(shift, self.lengths)",
        "np.arange(self.num_tokens, dtype=np.int64)",
        "unit/test_layout.py",
    ),
    Mutant(
        "labels shifted by one",
        "data/collate.py",
        "source = np.arange(start - 1, end - 1)",
        "source = np.arange(start, end)",
        "unit/test_collate.py",
    ),
    Mutant(
        "first token of a response predicted by the row in front of it",
        "data/collate.py",
        "source[0] = ends[tree.parents[node]] - 1",
        "source[0] = start - 1",
        "unit/test_collate.py",
    ),
    Mutant(
        "shared token counted for one response only",
        "data/collate.py",
        "for node in tree.response_nodes(response):",
        "for node in set(tree.response_nodes(response)).difference(\n"
        "            *map(tree.response_nodes, range(response))\n        ):",
        "unit/test_collate.py",
    ),
    Mutant(
        "normaliser dropped",
        "train/step.py",
        "return weighted / batch.step_weight, count, logs",
        "return weighted, count, logs",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "sign of the margin",
        "losses/preference.py",
        "margins = chosen - rejected\n",
        "margins = rejected - chosen\n",
        "unit/test_losses.py",
    ),
    Mutant(
        "label smoothing dropped",
        "losses/preference.py",
        "- label_smoothing * logsigmoid(-margins)",
        "",
        "unit/test_losses.py",
    ),
    Mutant(
        "a tie is accurate",
        "losses/preference.py",
        "return (torch.sign(self.margins) + 1) / 2",
        "return (self.margins >= 0).to(self.margins.dtype)",
        "unit/test_losses.py",
    ),
    Mutant(
        "reference not frozen: it is the policy",
        "train/run.py",
        "batches = self.reference.attach(rows, batches)",
        "from megatron_prefix.train.reference import with_reference\n"
        "        batches = with_reference(self.policy, batches, self.config.loss)",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "branch row's gradient from one response only",
        "model/logps.py",
        "index_put_((row_N,), grad_N, True)",
        "index_put_((row_N,), grad_N, False)",
        "unit/test_logps.py",
    ),
    Mutant(
        "repeated target's gradient once",
        "model/logps.py",
        "torch.where(is_local_N, grad_N, 0), accumulate=True)",
        "torch.where(is_local_N, grad_N, 0), accumulate=False)",
        "unit/test_logps.py",
    ),
    Mutant(
        "padded vocabulary predicted",
        "model/logps.py",
        "        scores_UV[:, max(vocab_size - start, 0) :] = -torch.inf\n",
        "",
        "unit/test_logps.py",
    ),
    Mutant(
        "float32 sums over responses",
        "model/logps.py",
        "ordered = token_logps_N.to(torch.float64)[order_N]",
        "ordered = token_logps_N.to(torch.float32)[order_N]",
        "unit/test_logps.py",
    ),
    Mutant(
        "gather order",
        "attention/plan.py",
        "rows.index_select(0, self.kv_index)",
        "rows.index_select(0, self.kv_index.flip(0))",
        "numerics/test_attention.py",
    ),
    Mutant(
        "copies of a key summed under the wrong row",
        "attention/plan.py",
        "ordered = copies.index_select(0, self.copy_order)",
        "ordered = copies",
        "numerics/test_attention.py",
    ),
    Mutant(
        "rotary halves swapped",
        "model/rope.py",
        "torch.cat([angles, angles], dim=-1)",
        "angles.repeat_interleave(2, dim=-1)",
        "unit/test_rope.py",
    ),
    Mutant(
        "weighting ignored",
        "data/sampler.py",
        'if weighting == "pair":',
        "if True:",
        "unit/test_sampler.py",
    ),
    Mutant(
        "order of the data the same in every epoch",
        "data/composition.py",
        'seeded("order", fingerprint, seed, epoch)',
        'seeded("order", fingerprint, seed)',
        "unit/test_sampler.py",
    ),
    Mutant(
        "fingerprint ignored in the order of the data",
        "data/composition.py",
        'seeded("order", fingerprint, seed, epoch)',
        'seeded("order", seed, epoch)',
        "unit/test_sampler.py",
    ),
    Mutant(
        "sampler reseeded on resume",
        "train/run.py",
        "plan = self.sampler.step(self.step)",
        "self.taken = getattr(self, 'taken', -1) + 1\n        plan = self.sampler.step(self.taken)",
        "numerics/test_resume.py",
    ),
    Mutant(
        "sidecar of another model accepted",
        "train/sidecar.py",
        "if saved_model != model:",
        "if False:",
        "robustness/test_sidecar.py",
    ),
    Mutant(
        "run of other data resumed",
        "train/checkpoint.py",
        '    _check_agreement(path, "run", common.get("run"), run)\n',
        "",
        "numerics/test_resume.py",
    ),
    Mutant(
        "metrics not cut back on resume",
        "train/metrics.py",
        'json.loads(line)["step"] <= step',
        'json.loads(line)["step"] >= 0',
        "unit/test_metrics.py",
    ),
    Mutant(
        "checksums of checkpoints not compared",
        "train/torch_dist.py",
        "    if damaged:\n",
        "    if False:\n",
        "robustness/test_checkpoint_damage.py",
    ),
    Mutant(
        "metadata unpickled without restriction",
        "train/torch_dist.py",
        "if name not in _HARMLESS.get(module, ()):",
        "if False:",
        "robustness/test_payloads.py",
    ),
    Mutant(
        "checksums of data sets not compared",
        "data/verify.py",
        'if (found := sha256(path)) != manifest["files"][name]["sha256"]:',
        "if not (found := sha256(path)):",
        "unit/test_store.py",
    ),
    Mutant(
        "clipping dropped",
        "train/optimizer.py",
        "if optimizer.config.clip_grad > 0:",
        "if False:",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "schedule not advanced",
        "train/optimizer.py",
        "    scheduler.step(increment=1)\n",
        "",
        "numerics/test_resume.py",
    ),
    Mutant(
        "weights drawn without their name",
        "model/init.py",
        'f"weights/{seed}/{name}"',
        'f"weights/{seed}"',
        "numerics/test_initial_weights.py",
    ),
    Mutant(
        "no node boundary where a response's loss begins",
        "data/tree.py",
        "        _cut(root, r.tokens, r.loss_start)\n",
        "",
        "unit/test_tree.py",
    ),
    Mutant(
        "a straddling token taken for the prompt's",
        "data/paths.py",
        "loss_start = within = common_tokens(prompt_ids, ids)",
        "loss_start = within = len(prompt_ids)",
        "unit/test_boundaries.py",
    ),
    Mutant(
        "special tokens in messages parsed",
        "data/hf_tokenizer.py",
        "if token in self._special_ids and (start, end) in rendered.literal:",
        "if False:",
        "unit/test_boundaries.py",
    ),
    Mutant(
        "merged groups counted as one record",
        "data/prompt_groups.py",
        "writer.add(tree, records, len(groups))",
        "writer.add(tree, records)",
        "unit/test_merge_prompts.py",
    ),
    Mutant(
        "lower scores preferred",
        "data/formats/ultrafeedback.py",
        "reverse=True",
        "reverse=False",
        "unit/test_formats.py",
    ),
    Mutant(
        "nonfinite gradients stepped over",
        "train/optimizer.py",
        "if not math.isfinite(norm):",
        "if False:",
        "robustness/test_nonfinite.py",
    ),
    Mutant(
        "a first loss other than ln 2 accepted",
        "train/first_loss.py",
        "if excess <= 1 and abs(loss - math.log(2)) <= budget:",
        "if True:",
        "numerics/test_first_loss.py",
    ),
    Mutant(
        "key and value heads of imported models in the wrong groups",
        "model/hf_weights.py",
        "grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in found]",
        "grouped = [x.reshape(1, -1, *x.shape[1:]) for x in found]",
        "unit/test_hf_weights.py",
    ),
    Mutant(
        "plan of other settings accepted",
        "data/plan_file.py",
        'if value != packed[name] and not (name == "epochs" and steps):',
        "if False:",
        "unit/test_plan.py",
    ),
    Mutant(
        "chunks taken as workers finish last",
        "data/workers.py",
        "item, future = waiting.popleft()",
        "item, future = waiting.pop()",
        "unit/test_workers.py",
    ),
    Mutant(
        "ranks dealt by tokens whatever they cost",
        "data/sampler.py",
        "return bundle_work(self.dataset, bundle, self.sharing).cost(self.cost)",
        "return float(bundle.num_tokens)",
        "unit/test_work.py",
    ),
    Mutant(
        "words cut apart though pieces reach over spaces",
        "data/word_cache.py",
        "and not any(s in piece.lstrip(SPACE)",
        "and not all(s in piece.lstrip(SPACE)",
        "unit/test_word_cache.py",
    ),
)


def run(mutant: Mutant, scratch: Path) -> str:
    """`killed`, `survived`, or what kept it from being tried."""
    copy = scratch / "repository"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED))
    path = copy / "megatron_prefix" / mutant.file
    text = path.read_text(encoding="utf-8")
    if mutant.old and text.count(mutant.old) != 1:
        return f"not applied: its text stands {text.count(mutant.old)} times in {mutant.file}"
    if mutant.old:
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    data = os.environ.get("MEGATRON_PREFIX_DATA", str(ROOT.parent / "shared" / "data"))
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MEGATRON_PREFIX_DATA": data,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu", f"tests/{mutant.tests}"]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"not tried: no answer in {TIMEOUT_S} s"
    if done.returncode == TESTS_FAILED:
        return "killed"
    if done.returncode == 0:
        return "survived"
    return f"not tried: pytest exits with {done.returncode}: {done.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only mutants with one of these in their name")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.names or any(n in m.name for n in args.names)]
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for tests in sorted({mutant.tests for mutant in chosen}):
            unbroken = Mutant("nothing", "__init__.py", "", "", tests)
            if (outcome := run(unbroken, Path(scratch))) != "survived":
                print(f"tests/{tests} must pass before anything is broken: {outcome}")
                return 1
        for mutant in chosen:
            outcome = run(mutant, Path(scratch))
            killed += outcome == "killed"
            print(f"{outcome:9} {mutant.name} ({mutant.file}; {mutant.tests})", flush=True)
    print(f"killed {killed} / {len(chosen)}")
    return killed != len(chosen)


if __name__ == "__main__":
    sys.exit(main())
