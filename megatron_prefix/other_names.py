"""Settings of other programs, and what to write here. docs/names.md is made from this table.

Names that are the same here are left out: Megatron-LM's `--tensor-model-parallel-size 8` is
`parallel.tensor_model_parallel_size=8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_EVERY_STEP = "nothing: every step is a line of logging.output/metrics.jsonl"
_PACKING = "data.global_batch_size, groups a step over all ranks, and data.row_capacity"
_LENGTH = "build --max-length and --overflow, when the data set is built"
_BFLOAT16 = "model.dtype: bfloat16"
_EVALUATION = "data.valid and train.eval_interval; the whole data set is evaluated"
_TOKENIZER = "build --tokenizer, when the data set is built"
_UNEQUAL_ROWS = "nothing: not offered, because rows differ in pieces and gathered keys"
_MOMENTS = (
    "nothing: not offered; Adam's state is float32 on the device, and "
    "parallel.use_distributed_optimizer divides it over ranks"
)
_HUB = "nothing: convert export writes a directory, which any tool uploads"

TRL = {
    "output_dir": "logging.output for metrics and train.save for checkpoints",
    "model_name_or_path": "model.hf",
    "dataset_name": "build --input, then data.train: PREFIX",
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.lr_decay_style",
    "lr_scheduler_kwargs": "optimizer.min_lr and the lr_wsd_ keys",
    "warmup_ratio": "optimizer.lr_warmup_fraction",
    "warmup_steps": "optimizer.lr_warmup_steps",
    "adam_epsilon": "optimizer.adam_eps",
    "max_grad_norm": "optimizer.clip_grad",
    "optim": "nothing: the optimizer is Adam with decoupled weight decay",
    "per_device_train_batch_size": _PACKING,
    "gradient_accumulation_steps": _PACKING,
    "auto_find_batch_size": "data.row_capacity: plan says what fits",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "bf16": _BFLOAT16,
    "fp16": f"{_BFLOAT16}; float16 is not offered",
    "gradient_checkpointing": "model.recompute_granularity: full, recompute_method: uniform",
    "use_liger_kernel": "nothing: only the rows of response tokens are projected, in chunks",
    "per_device_eval_batch_size": "nothing: evaluation packs rows as training does",
    "eval_strategy": _EVALUATION,
    "eval_steps": "train.eval_interval",
    "eval_on_start": "nothing: every run with data.valid evaluates before its first step",
    "logging_steps": _EVERY_STEP,
    "logging_strategy": _EVERY_STEP,
    "logging_dir": "logging.output",
    "report_to": "logging.tensorboard: true, or logging.wandb: {project: NAME}",
    "run_name": "logging.wandb: {name: NAME}",
    "save_strategy": "train.save_interval",
    "save_steps": "train.save_interval",
    "save_total_limit": "train.keep_last",
    "load_best_model_at_end": "train.keep_best",
    "metric_for_best_model": "train.keep_best: {metric: NAME}",
    "greater_is_better": "train.keep_best: {mode: max} or min",
    "resume_from_checkpoint": "train.load",
    "data_seed": "data.seed; train.seed is that of the initial weights",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "deepspeed": "parallel.use_distributed_optimizer, or more tensor or pipeline ranks",
    "fsdp": "parallel.use_distributed_optimizer, or more tensor or pipeline ranks",
    "ddp_timeout": "parallel.distributed_timeout_minutes",
    "router_aux_loss_coef": "model.moe_aux_loss_coeff",
    "disable_dropout": "nothing: there is no dropout",
    "max_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "truncation_mode": _LENGTH,
    "dataset_num_proc": "build --workers",
    "padding_free": "data.packing: true, the default",
    "precompute_ref_log_probs": "score --output FILE, then reference: precomputed, ref_logps: FILE",
    "ref_model": "loss.reference: model, the initial weights, or precomputed from another run",
    "label_smoothing_factor": "loss.label_smoothing",
    "trust_remote_code": "nothing: no code of a model's directory is run",
}
"""TRL's DPOConfig, and transformers' TrainingArguments below it."""

MEGATRON = {
    "train_iters": "train.steps",
    "train_samples": "train.epochs or train.steps",
    "seq_length": "data.row_capacity",
    "max_position_embeddings": "nothing: rotary positions have no table",
    "data_path": "data.train: PREFIX of build",
    "train_data_path": "data.train: PREFIX of build",
    "valid_data_path": "data.valid: PREFIX of build",
    "tokenizer_type": _TOKENIZER,
    "tokenizer_model": _TOKENIZER,
    "vocab_file": _TOKENIZER,
    "num_experts": "model.num_moe_experts",
    "group_query_attention": "model.num_query_groups",
    "use_flash_attn": "model.attention_backend: flash",
    "recompute_activations": "model.recompute_granularity: selective",
    "swiglu": "nothing: the feed-forward networks are gated with SiLU",
    "normalization": "nothing: the norms are RMSNorm",
    "disable_bias_linear": "nothing: linear layers have no bias but add_qkv_bias",
    "position_embedding_type": "nothing: positions are rotary",
    "attention_dropout": "nothing: there is no dropout",
    "hidden_dropout": "nothing: there is no dropout",
    "lr_warmup_iters": "optimizer.lr_warmup_steps",
    "lr_warmup_samples": "optimizer.lr_warmup_fraction",
    "lr_decay_iters": "nothing: the decay ends with the run's last step",
    "lr_wsd_decay_iters": "optimizer.lr_wsd_decay_steps",
    "eval_iters": "nothing: the whole of data.valid is evaluated",
    "log_interval": _EVERY_STEP,
    "use_persistent_ckpt_worker": "train.async_save: true",
    "tensorboard_dir": "logging.tensorboard: true",
    "wandb_project": "logging.wandb: {project: NAME}",
    "wandb_exp_name": "logging.wandb: {name: NAME}",
    "distributed_backend": "nothing: it is nccl with a GPU, else gloo",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage": "parallel.virtual_pipeline_model_parallel_size, the "
    "chunks of a stage",
    "optimizer_cpu_offload": _MOMENTS,
    "optimizer_offload_fraction": _MOMENTS,
    "use_precision_aware_optimizer": _MOMENTS,
    "main_grads_dtype": _MOMENTS,
    "main_params_dtype": _MOMENTS,
    "exp_avg_dtype": _MOMENTS,
    "exp_avg_sq_dtype": _MOMENTS,
    "fp8_format": "model.fp8",
    "fp8_param_gather": "nothing: not offered; weights stay bfloat16, copied to FP8 in every step",
    "enable_cuda_graph": _UNEQUAL_ROWS,
    "cuda_graph_impl": _UNEQUAL_ROWS,
    "ref_policy_kl_penalty": "loss.beta",
    "preference_loss": "loss.loss_type",
}
"""Megatron-LM and the NeMo programs on it."""

OTHERS = {
    "pref_beta": "loss.beta",
    "pref_loss": "loss.loss_type",
    "rlhf_type": "loss.loss_type",
    "cutoff_len": _LENGTH,
    "finetuning_type": "the section lora for adapters; without it all weights are trained",
    "template": "build --tokenizer DIR, whose chat template renders messages",
    "micro_batch": _PACKING,
    "neat_packing": "data.packing: true, the default",
}
"""LLaMA-Factory, ms-swift and the like."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType({**OTHERS, **MEGATRON, **TRL})


def other_name(name: str) -> str | None:
    """What to write for a setting of another program, given as `max_steps` or `--max-steps`; None
    if it is not in the table."""
    return OTHER_NAMES.get(name.lstrip("-").replace("-", "_"))
