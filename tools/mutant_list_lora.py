"""Mutants of adapters; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

LORA_MUTANTS = (
    Mutant(
        "the whole factor's gradient is not summed under sequence parallelism",
        "model/adapters/linear.py",
        "setattr(whole, SEQUENCE_PARALLEL, self.is_sequence_parallel)",
        "setattr(whole, SEQUENCE_PARALLEL, False)",
        "distributed/test_lora_layouts.py",
    ),
    Mutant(
        "the decoder's input has no gradient",
        "model/gpt.py",
        "return decoder_input.requires_grad_()",
        "return decoder_input",
        "distributed/test_lora_layouts.py",
    ),
    Mutant(
        "one A for queries, keys and values",
        "model/adapters/linear.py",
        "firsts[0] if len(firsts) == 1 else torch.cat(firsts)",
        "torch.cat([firsts[0]] * len(firsts))",
        "numerics/test_lora_peft.py",
    ),
    Mutant(
        "an expert's partial sum is summed twice",
        "model/adapters/linear.py",
        "if self.is_expert_layer or self.group.size() == 1:",
        "if self.group.size() == 1:",
        "distributed/test_lora_layouts.py",
    ),
    Mutant(
        "adapters stay on for the reference",
        "model/adapters/switch.py",
        "setattr(owner, SWITCH, False)",
        "setattr(owner, SWITCH, True)",
        "numerics/test_lora_runs.py",
    ),
    Mutant(
        "adapters of another base are taken",
        "checkpoint/adapter_state.py",
        "if saved.base_fingerprint != ours.base_fingerprint:",
        "if saved.base_fingerprint is None:",
        "numerics/test_lora_runs.py",
    ),
    Mutant(
        "plan divides the whole factor over tensor-parallel ranks, too",
        "estimate/adapters.py",
        "return rank * (self.inputs + self.outputs // tensor)",
        "return rank * (self.inputs + self.outputs) // tensor",
        "numerics/test_lora_plan.py",
    ),
    Mutant(
        "plan counts optimizer state of the frozen base",
        "estimate/adapters.py",
        "optimizer=adam * dense // sharers",
        "optimizer=frozen.optimizer + adam * dense // sharers",
        "numerics/test_lora_plan.py",
    ),
    Mutant(
        "adapters are merged into another base",
        "checkpoint/adapter_base.py",
        "if saved.base_fingerprint not in known.values():",
        "if not saved.base_fingerprint:",
        "numerics/test_lora_export.py",
    ),
    Mutant(
        "merged adapters are not scaled",
        "model/hf/peft/parameters.py",
        "rows += up @ down * self.lora.scale",
        "rows += up @ down",
        "numerics/test_lora_export.py",
    ),
    Mutant(
        "an exported adapter has another scale",
        "model/hf/peft/directory.py",
        '"use_rslora": lora.use_rslora,',
        '"use_rslora": False,',
        "numerics/test_lora_export.py",
    ),
    Mutant(
        "B gets the gradient of other channels of its groups",
        "model/adapters/product.py",
        "torch.bmm(low_GRT, rows).transpose(1, 2).reshape(factor.shape)",
        "torch.bmm(low_GRT, rows).reshape(factor.shape)",
        "unit/model/adapters/test_product.py",
    ),
    Mutant(
        "adapters of experts on drawn weights are sent from one export to the other",
        "checkpoint/convert_adapter.py",
        "if base is None and not self.saved.base and self.parameters.has_experts:",
        "if base is None and self.saved.base and self.parameters.has_experts:",
        "numerics/test_lora_export.py",
    ),
    Mutant(
        "Bridge takes data without betas for loss.pair_beta",
        "bridge/data.py",
        "is_trained_on=not repeats",
        "is_trained_on=False",
        "unit/bridge/test_bridge.py",
    ),
    Mutant(
        "gathered adapters are taken for halves of a fused layer",
        "model/parameters/canonical.py",
        '".linear_fc1." in name and not is_added(name)',
        '".linear_fc1." in name',
        "distributed/test_lora_layouts.py",
    ),
    Mutant(
        "the number of steps is that of the first rank",
        "checkpoint/optimizer_state.py",
        'setdefault("common_step", torch.tensor(float(step)))',
        'get("common_step")',
        "distributed/test_lora_layouts.py",
    ),
)
