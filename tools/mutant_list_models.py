"""Mutants of the model families; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

MODEL_MUTANTS = (
    Mutant(
        "mean of a norm over all heads not summed over tensor-parallel ranks",
        "model/layers/norm.py",
        "torch.distributed.all_reduce(total, group=ctx.group)",
        "pass",
        "distributed/test_family_layouts.py",
    ),
    Mutant(
        "layers without rotation are rotated",
        "attention/megatron.py",
        'if rotation is not None and self.rotary != "none":',
        "if rotation is not None:",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "yarn starts to divide one pair of channels later",
        "model/layers/rope.py",
        "first, last = max(first, 0), min(last, head_dim - 1)",
        "first, last = max(first, 0) + 1, min(last, head_dim - 1)",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "queries of Ministral 3 do not grow with their position",
        "attention/megatron.py",
        "query, key = rotate_query(query, rotation), rotate(key, rotation)",
        "query, key = rotate(query, rotation), rotate(key, rotation)",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "a checkpoint with another sliding window is taken",
        "checkpoint/model_weights.py",
        '"window_size": None if window is None else list(window),',
        '"window_size": None,',
        "numerics/test_resume.py",
    ),
    Mutant(
        "paths beyond the original context of longrope are taken",
        "checkpoint/starting_model.py",
        "if scaling is not None and limit is not None and longest > limit:",
        "if False:",
        "unit/checkpoint/test_starting_model.py",
    ),
    Mutant(
        "gradients of rotated keys are those of one rank's heads",
        "model/layers/latent.py",
        "return gather_from_sequence_parallel_region(x, group=self.tp_group)",
        "return gather_from_sequence_parallel_region(\n"
        "                x, tensor_parallel_output_grad=False, group=self.tp_group\n"
        "            )",
        "distributed/test_family_layouts.py",
    ),
    Mutant(
        "norms of what is compressed have the epsilon of the layers",
        "model/hf/latent.py",
        "norm_epsilon=NORM_EPSILON,",
        "norm_epsilon=settings.rms_norm_eps,",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "YaRN does not change the scale of scores",
        "model/hf/latent.py",
        "if factor <= 1:",
        "if factor > 0:",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "experts are weighted by their corrected scores",
        "model/layers/routing.py",
        "weights_Tk = scores_TE.gather(1, indices_Tk)",
        "weights_Tk = choice_TE.gather(1, indices_Tk)",
        "unit/model/layers/test_routing.py",
    ),
    Mutant(
        "a group of experts counts by its best one",
        "model/layers/routing.py",
        'best = 1 if routing.score == "softmax" else 2',
        "best = 1",
        "unit/model/layers/test_routing.py",
    ),
    Mutant(
        "the correction of a router is rounded with the model",
        "model/layers/moe.py",
        "self.expert_bias.data = kept.to(self.expert_bias.device)",
        "pass",
        "numerics/test_latent_attention.py",
    ),
    Mutant(
        "values are filled up and the scale follows",
        "attention/megatron.py",
        "scale = query.size(-1) ** -0.5 if scale is None else scale",
        "scale = channels**-0.5 if scale is None else scale",
        "numerics/test_family_parity.py",
    ),
    Mutant(
        "the bias of an expert is added once per tensor-parallel rank",
        "model/layers/moe.py",
        "if bias is not None and self.tp_group.rank() > 0:",
        "if False:",
        "distributed/test_family_layouts.py",
    ),
)
