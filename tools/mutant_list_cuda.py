"""Mutants of what only CUDA runs; see `mutants.py`."""

from __future__ import annotations

from mutant_list import Mutant

CUDA_MUTANTS = (
    Mutant(
        "a switch that a row's backend ignores accepted",
        "attention/api.py",
        "if not load_backend(backend).copies_keys:",
        "if False:",
        "unit/attention/test_auto.py",
    ),
    Mutant(
        "buffers made after the model",
        "engine/optimizer.py",
        "    world.open_buffers(config)\n",
        "",
        "unit/distributed/test_user_buffers.py",
    ),
    Mutant(
        "rows of another length than the buffers accepted",
        "distributed/user_buffers.py",
        "if length and num_tokens != length:",
        "if False:",
        "unit/distributed/test_user_buffers.py",
    ),
    Mutant(
        "more values than torch unpacks accepted",
        "attention/backends/flash_versions.py",
        "unpacked is None or returned == unpacked",
        "unpacked is None or returned >= unpacked",
        "unit/attention/backends/test_flash_versions.py",
    ),
    Mutant(
        "deterministic rows beyond cuDNN's limit computed without a message",
        "attention/backends/te.py",
        "if is_deterministic and q.is_cuda:",
        "if False:",
        "unit/attention/backends/test_te.py",
    ),
    Mutant(
        "slow experts not said",
        "train/machine_notes.py",
        "if config.num_moe_experts and not config.moe_grouped_gemm:",
        "if False:",
        "unit/train/test_machine_notes.py",
    ),
    Mutant(
        "the norm of every parameter read by itself",
        "engine/norm.py",
        "norms = torch.stack(torch._foreach_norm(gradients))",
        "norms = torch.tensor([float(torch.norm(x)) for x in gradients])",
        "unit/engine/test_gradient_norm.py",
    ),
    Mutant(
        "Adam not fused on CUDA",
        "engine/optimizer.py",
        'group["fused"] = True',
        'group["fused"] = None',
        "unit/engine/test_gradient_norm.py",
    ),
    Mutant(
        "step counts left where another Adam had them",
        "checkpoint/optimizer_state.py",
        'own["step"] = own["step"].to(parameter.device, torch.float32)',
        "pass",
        "unit/checkpoint/test_optimizer_state.py",
    ),
    Mutant(
        "stages of several chunks take the rows one by one",
        "engine/pipeline.py",
        "(row, chunk) for group in groups for chunk in range(chunks) for row in group",
        "(row, chunk) for group in groups for row in group for chunk in range(chunks)",
        "unit/engine/test_pipeline.py",
    ),
    Mutant(
        "stages exchange the shapes of rows",
        "engine/step.py",
        "        **schedule_arguments(model[0], lengths),\n",
        "",
        "distributed/test_layouts.py",
    ),
    Mutant(
        "every process group connected by gloo, too",
        "distributed/world.py",
        'backend = "nccl" if on_cuda else "gloo"',
        'backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"',
        "unit/distributed/test_cuda_groups.py",
    ),
    Mutant(
        "the margin of every piece not counted",
        "estimate/attention.py",
        "(queries + MARGIN * pieces)",
        "queries",
        "unit/estimate/test_attention_buffers.py",
    ),
    Mutant(
        "the host waits for the count of every metric",
        "objectives/objective.py",
        "values.new_full((), len(values))",
        "values.new_tensor(float(len(values)))",
        "fake_cuda/test_fake_cuda.py",
    ),
)
