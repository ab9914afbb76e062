"""megatron_prefix inside a stock Megatron-Core loop: DPO on a data set that `build` wrote.

    python examples/own_megatron_loop.py PREFIX
"""
import sys
from functools import partial

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker

import megatron_prefix as mp
from megatron_prefix import platform
from megatron_prefix.config import LossConfig, ModelConfig
from megatron_prefix.model.provider import transformer_config


def main(prefix: str, steps: int = 5) -> list[float]:
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()

    data = mp.PreferenceDataset(prefix)
    sampler = mp.Sampler(
        dataset=data, composition=mp.GroupBatches(len(data), 8, data.fingerprint, seed=1), row_capacity=8192
    )
    sizes = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4)
    config = transformer_config(sizes, vocab_size=data.vocab_size, seed=1)
    config.finalize_model_grads_func = mp.sum_gradients  # the loss is already divided

    device = platform.device()
    reference = mp.model_provider(config=config, pg_collection=groups).to(device).requires_grad_(False)
    policy = mp.model_provider(config=config, pg_collection=groups).to(device)
    policy = DistributedDataParallel(config, DistributedDataParallelConfig(), policy)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3), [policy], use_gloo_process_groups=False)

    schedule, losses = get_forward_backward_func(), []
    run = partial(schedule, forward_step_func=partial(mp.forward_step, loss=LossConfig(beta=0.1)),
                  seq_length=8192, micro_batch_size=1)
    for step in range(steps):
        plan = sampler.step(step)
        rows = [mp.to_device(row, device, plan.weight) for row in sampler.micro_batches(plan)]
        rows = mp.with_reference([reference], rows, LossConfig())
        policy.zero_grad_buffer()
        logs = run(data_iterator=iter(rows), model=policy, num_microbatches=len(rows))
        optimizer.step()
        losses.append(sum(float(log["sums"][0]) for log in logs) / plan.weight)
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    with platform.adapted():
        main(sys.argv[1])
