"""The trained model: Megatron-Core's wrappers, optimizer and schedule, from the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.transformer.module import Float16Module

from megatron_prefix.config import Config
from megatron_prefix.distributed import World
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.norm import gradient_norm
from megatron_prefix.engine.step import run_schedule, sum_gradients
from megatron_prefix.errors import InputError
from megatron_prefix.model import TreeTransformerConfig, model_provider
from megatron_prefix.objectives import Objective


def build_model(config: TreeTransformerConfig, world: World) -> list[torch.nn.Module]:
    """This rank's model chunks on the device, ready for forward passes, with the weights that
    `config` draws."""
    world.open_buffers(config)
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(stages) if stages else [None]:
        model = model_provider(
            is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage,
            config=config,
            pg_collection=world.groups,
        ).to(world.device)
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """The model that is trained: wrapped chunks, their optimizer and the learning rate's
    schedule."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def gradients(
        self, batches: list[TrainBatch], objective: Objective, is_first: bool = False
    ) -> list[dict]:
        """Forward and backward over rows, from zero gradients. Returns `run_schedule`'s logs."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(self.chunks, batches, objective, is_first)

    def update(self) -> tuple[float, float] | None:
        """Clip the gradients and step. Returns their global norm before clipping and the learning
        rate, or None, with the weights unchanged, if the norm is not finite."""
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            return None
        # All parts are clipped by the norm over the whole model: parts of norm 3 and 4 have norm 5,
        # and with clip_grad 1 both are scaled by 1 / 5.
        if self.optimizer.config.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(),
                    max_norm=self.optimizer.config.clip_grad,
                    total_norm=norm,
                )
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return norm, learning_rate

    def gradient_norm(self) -> float:
        """Norm of the summed gradients over all parameters of the model."""
        self.optimizer.prepare_grads()
        return gradient_norm(self.optimizer)

    def refuse_idle_ranks(self, world: World) -> None:
        """Refuse a distributed optimizer of which a rank has no parameter, because Megatron-Core
        cannot save it. Collective. Raises InputError."""
        shares = [
            sum(len(group["params"]) for group in part.param_groups)
            for part in self.optimizer.chained_optimizers
            if isinstance(part, DistributedOptimizer)
        ]
        idle = [rank for rank, own in enumerate(world.gather(shares)) if 0 in own]
        if idle:
            raise InputError(
                "parallel.use_distributed_optimizer = true: there is nothing to train on "
                f"{'ranks' if len(idle) > 1 else 'rank'} {', '.join(map(str, idle))}, and Megatron-"
                "Core cannot save the optimizer there: set it to false, or name layers of every "
                "pipeline stage in lora.layers_to_transform"
            )

    def finish_param_gather(self) -> None:
        """Wait until all weights are gathered; collective. Call before weights are saved or
        compared."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def fuse_adam(optimizer: MegatronOptimizer, chunk: torch.nn.Module) -> None:
    """Let torch's Adam update all parameters in a few kernels, if the model is on CUDA. The fused
    Adam of Transformer Engine and Apex, if one of them is installed, stays as it is."""
    is_on_cuda = next(chunk.parameters()).device.type == "cuda"
    for part in optimizer.chained_optimizers:
        if is_on_cuda and isinstance(part.optimizer, torch.optim.Adam):
            for group in part.param_groups:
                group["fused"] = True


def build_policy(
    chunks: list[torch.nn.Module],
    config: TreeTransformerConfig,
    run: Config,
    num_steps: int,
) -> Policy:
    """Wrap model chunks for training, with their optimizer and schedule.

    `run` has the settings of optimizer and layout; `num_steps` is the length of the run, over
    which the learning rate decays.
    """
    settings, parallel = run.optimizer, run.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        # Later chunks finish backward first. Their gradients are sent while earlier chunks compute,
        # so they need no buckets.
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    fuse_adam(optimizer, chunks[0])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps(num_steps),
        lr_decay_steps=num_steps,
        lr_decay_style=settings.lr_decay_style,
        wsd_decay_steps=settings.lr_wsd_decay_steps,
        lr_wsd_decay_style=settings.lr_wsd_decay_style or "exponential",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = sum_gradients
    if parallel.overlap_grad_reduce:  # gradients are summed after the last row only
        pauses = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return Policy(chunks=wrapped, optimizer=optimizer, scheduler=scheduler)
