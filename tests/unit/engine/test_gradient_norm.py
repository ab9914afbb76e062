"""The gradient norm has the bits of Megatron-Core's, and is read from the device once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from tiny_models import SIZES, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix.config import ModelConfig
from megatron_prefix.engine.norm import gradient_norm
from megatron_prefix.engine.optimizer import build_model, build_policy, fuse_adam
from megatron_prefix.model.provider import transformer_config

pytestmark = pytest.mark.skipif(HAVE_APEX_OR_TE, reason="their kernels compute the norm")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def make_policy(world, tmp_path):
    def make(dtype="float32", **sections):
        run = tiny_config("set", tmp_path, optimizer={"lr": 1e-2, "weight_decay": 0.1}, **sections)
        config = transformer_config(ModelConfig(**SIZES, dtype=dtype), vocab_size=320, seed=1)
        policy = build_policy(build_model(config, world), config, run, 3)
        draw = torch.Generator().manual_seed(5)
        for parameter in policy.chunks[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
        policy.optimizer.prepare_grads()
        return policy

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_distributed", [False, True])
def test_the_norm_is_that_of_megatron_core_and_read_once(make_policy, dtype, is_distributed):
    policy = make_policy(dtype, parallel={"use_distributed_optimizer": is_distributed})
    with Reads() as reads:
        norm = gradient_norm(policy.optimizer)
    assert norm == float(policy.optimizer.get_grad_norm()) > 1
    assert reads.count == 1
    assert policy.gradient_norm() == norm


def test_adam_is_fused_on_cuda_only(make_policy):
    """On CPU the fused Adam runs, too, and gives the same weights up to rounding."""
    plain, fused = make_policy(), make_policy()
    assert not any(group["fused"] for group in plain.optimizer.param_groups)
    stand_in = torch.nn.Linear(1, 1, device="meta")
    fuse_adam(fused.optimizer, stand_in)
    assert not any(group["fused"] for group in fused.optimizer.param_groups)
    stand_in.weight = torch.nn.Parameter(torch.empty(0).as_subclass(OnCuda))
    fuse_adam(fused.optimizer, stand_in)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    for policy in (plain, fused):
        policy.optimizer.step_with_ready_grads()
    ours, theirs = ([*policy.chunks[0].parameters()] for policy in (fused, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    device = torch.device("cuda", 0)
