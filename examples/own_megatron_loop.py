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


def main(prefix: str, steps: int = 5) -> list[float]:
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)

    data = mp.PreferenceDataset(prefix)
    order = mp.GroupBatches(len(data), batch_size=8, fingerprint=data.fingerprint, seed=1)
    sampler = mp.Sampler(dataset=data, composition=order, row_capacity=8192)

    sizes = mp.ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4)
    config = mp.transformer_config(sizes, vocab_size=data.vocab_size, seed=1)
    config.finalize_model_grads_func = mp.sum_gradients  # the loss is already divided
    groups, device = ProcessGroupCollection.use_mpu_process_groups(), mp.platform.device()
    reference = mp.model_provider(config=config, pg_collection=groups).to(device)
    policy = mp.model_provider(config=config, pg_collection=groups).to(device)
    policy = DistributedDataParallel(config, DistributedDataParallelConfig(), policy)
    adam = OptimizerConfig(lr=1e-3)
    optimizer = get_megatron_optimizer(adam, [policy], use_gloo_process_groups=False)

    dpo = mp.LossConfig(beta=0.1)
    forward_step = partial(mp.forward_step, loss=dpo)
    forward_backward = get_forward_backward_func()
    losses = []
    for step in range(steps):
        plan = sampler.step(step)
        rows, whole = sampler.micro_batches(plan), plan.denominators
        rows = mp.with_reference([reference], [mp.to_device(row, device, whole) for row in rows])
        policy.zero_grad_buffer()
        shape = {"num_microbatches": len(rows), "seq_length": 8192, "micro_batch_size": 1}
        logs = forward_backward(
            forward_step_func=forward_step, data_iterator=iter(rows), model=policy, **shape
        )
        optimizer.step()
        losses.append(sum(float(log["loss"]) for log in logs))
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    with mp.platform.adapted():
        main(sys.argv[1])
