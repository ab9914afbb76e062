"""Mutants of model, attention and training; see `mutants.py`."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` occurs in `file` (below megatron_prefix/) exactly once; `tests` is below tests/."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "leaky mask: siblings see one another",
        "attention/backends/dense.py",
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
        "normaliser dropped",
        "engine/step.py",
        "return weighted / batch.step_weight, count, logs",
        "return weighted, count, logs",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "sign of the margin",
        "objectives/pairwise.py",
        "margins = chosen - rejected\n",
        "margins = rejected - chosen\n",
        "unit/objectives/test_pairwise.py",
    ),
    Mutant(
        "label smoothing dropped",
        "objectives/pairwise.py",
        "- label_smoothing * log_sigmoid(-margins)",
        "",
        "unit/objectives/test_pairwise.py",
    ),
    Mutant(
        "a tie is accurate",
        "objectives/record.py",
        "(margins.sign() + 1) / 2",
        "(margins >= 0).to(margins.dtype)",
        "unit/objectives/test_pairwise.py",
    ),
    Mutant(
        "reference not frozen: it is the policy",
        "train/trainer.py",
        "batches = self.reference.attach(rows, batches)",
        "from megatron_prefix.reference.model import with_reference\n"
        "        batches = with_reference(self.policy.chunks, batches)",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "branch row's gradient from one response only",
        "model/logps.py",
        "index_put_((logit_N,), grad_N, True)",
        "index_put_((logit_N,), grad_N, False)",
        "unit/model/test_logps.py",
    ),
    Mutant(
        "repeated target's gradient once",
        "model/logps.py",
        "torch.where(is_local_N, grad_N, 0), accumulate=True)",
        "torch.where(is_local_N, grad_N, 0), accumulate=False)",
        "unit/model/test_logps.py",
    ),
    Mutant(
        "padded vocabulary predicted",
        "model/logps.py",
        "        scores_UV[:, max(vocab_size - start, 0) :] = -torch.inf\n",
        "",
        "unit/model/test_logps.py",
    ),
    Mutant(
        "float32 sums over responses",
        "model/logps.py",
        "ordered = token_logps_N.to(torch.float64)[order_N]",
        "ordered = token_logps_N.to(torch.float32)[order_N]",
        "unit/model/test_logps.py",
    ),
    Mutant(
        "gather order",
        "attention/plan.py",
        "keys.index_select(0, self.kv_index)",
        "keys.index_select(0, self.kv_index.flip(0))",
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
        "gathered keys kept until backward",
        "attention/backends/regather.py",
        "return x if x.dtype != dtype else _View(index, x.size(), x.stride(), offset)",
        "return x",
        "numerics/test_regather.py",
    ),
    Mutant(
        "block of keys taken for seen as a whole where a subtree ends in it",
        "attention/backends/flex.py",
        "all_end = end.min(1, initial=num_queries) // block",
        "all_end = -(-end.min(1, initial=num_queries) // block)",
        "numerics/test_flex.py",
    ),
    Mutant(
        "flex goes on with dense scores where torch compiles no more",
        "attention/backends/flex.py",
        "dynamic=True, fullgraph=True",
        "dynamic=True",
        "numerics/test_flex.py::test_one_form_too_many_is_refused_and_never_computed_densely",
    ),
    Mutant(
        "rotary halves swapped",
        "attention/rotary.py",
        "torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)",
        "torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=sign)",
        "unit/model/layers/test_rope.py",
    ),
    Mutant(
        "sampler reseeded on resume",
        "train/trainer.py",
        "step = self.feed.step(self.step)",
        "self.taken = getattr(self, 'taken', -1) + 1\n        step = self.feed.step(self.taken)",
        "numerics/test_resume.py",
    ),
    Mutant(
        "sidecar of another model accepted",
        "reference/sidecars.py",
        "if saved_model != model:",
        "if False:",
        "unit/reference/test_sidecars.py",
    ),
    Mutant(
        "run of other data resumed",
        "checkpoint/save_load.py",
        '        _check_agreement(path, "run", common.get("run"), identity)\n',
        "",
        "numerics/test_resume.py",
    ),
    Mutant(
        "metrics not cut back on resume",
        "trackers/jsonl.py",
        'json.loads(line)["step"] <= step',
        'json.loads(line)["step"] >= 0',
        "unit/trackers/test_trackers.py",
    ),
    Mutant(
        "checksums of checkpoints not compared",
        "checkpoint/torch_dist.py",
        "    if damaged:\n",
        "    if False:\n",
        "unit/checkpoint/test_torch_dist.py",
    ),
    Mutant(
        "metadata unpickled without restriction",
        "checkpoint/torch_dist.py",
        "if name not in _HARMLESS.get(module, ()):",
        "if False:",
        "unit/checkpoint/test_torch_dist.py",
    ),
    Mutant(
        "clipping dropped",
        "engine/optimizer.py",
        "if self.optimizer.config.clip_grad > 0:",
        "if False:",
        "numerics/test_plain_torch.py",
    ),
    Mutant(
        "schedule not advanced",
        "engine/optimizer.py",
        "        self.scheduler.step(increment=1)\n",
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
        "nonfinite gradients stepped over",
        "engine/optimizer.py",
        "if not math.isfinite(norm):",
        "if False:",
        "robustness/test_nonfinite.py",
    ),
    Mutant(
        "a first loss other than the known one accepted",
        "train/first_step.py",
        "if excess <= 1 and is_expected:",
        "if True:",
        "unit/train/test_first_step.py",
    ),
    Mutant(
        "centring of the difference of rewards",
        "objectives/reward.py",
        "sums = chosen_rewards + rejected_rewards",
        "sums = chosen_rewards - rejected_rewards",
        "unit/objectives/test_reward.py",
    ),
    Mutant(
        "margin given instead of asked for",
        "objectives/reward.py",
        "logits = logits - margins",
        "logits = logits + margins",
        "unit/objectives/test_reward.py",
    ),
    Mutant(
        "language model's checkpoint evaluated as a reward model",
        "checkpoint/save_load.py",
        'if (saved, kind) == ("lm", "reward"):',
        "if False:",
        "numerics/test_reward_runs.py",
    ),
    Mutant(
        "key and value heads of imported models in the wrong groups",
        "model/hf/weights.py",
        "grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in tensors]",
        "grouped = [x.reshape(1, -1, *x.shape[1:]) for x in tensors]",
        "unit/model/hf/test_hf_weights.py",
    ),
    Mutant(
        "a shared token counted once a response whatever is asked for",
        "model/layers/moe.py",
        "served.clamp(max=1)",
        "served",
        "numerics/test_mixture.py",
    ),
    Mutant(
        "experts numbered by rank",
        "model/parameters.py",
        "first_expert = experts // group.size() * group.rank()",
        "first_expert = 0",
        "distributed/test_experts.py",
    ),
    Mutant(
        "a row's balance over one rank's tokens",
        "model/layers/moe.py",
        "if group is not None and group.size() > 1:",
        "if False:",
        "distributed/test_experts.py",
    ),
    Mutant(
        "a rank projects rows that another rank owns",
        "engine/batch.py",
        "is_own = np.isin(batch.logit_token, own)",
        "is_own = np.isin(batch.logit_token, np.arange(len(own)))",
        "distributed/test_layouts.py",
    ),
    Mutant(
        "response sums not added over context-parallel ranks",
        "attention/context_parallel/transports.py",
        "        dist.all_reduce(total, group=group)\n",
        "",
        "distributed/test_transports.py",
    ),
    Mutant(
        "gradients of keys kept by the rank that needed them",
        "attention/context_parallel/transports.py",
        "            own[index] += part",
        "            own[index] += 0 * part",
        "distributed/test_transports.py",
    ),
    Mutant(
        "ancestors that a chunk needs left out",
        "attention/context_parallel/ownership.py",
        "is_full = before[layout.subtree_ends] > before[ends]",
        "is_full = before[layout.subtree_ends] > layout.num_tokens",
        "unit/attention/context_parallel/test_ownership.py",
    ),
    Mutant(
        "IPO's log-ratios not divided by the number of tokens",
        "objectives/pairwise.py",
        "gap = chosen / chosen_num_tokens - rejected / rejected_num_tokens",
        "gap = chosen - rejected",
        "unit/objectives/test_pairwise.py",
    ),
    Mutant(
        "an option that the objective does not use accepted",
        "objectives/registry.py",
        "        if option is None:\n",
        "        if False:\n",
        "unit/objectives/test_registry.py",
    ),
    Mutant(
        "a failing tracker hidden",
        "trackers/several.py",
        "            raise raised[0]",
        "            pass",
        "unit/trackers/test_trackers.py",
    ),
)
