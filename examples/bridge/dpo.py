"""DPO with prefix sharing inside Megatron-Bridge. Needs CUDA; see README.md.

torchrun --nproc-per-node 8 examples/bridge/dpo.py Qwen/Qwen3-0.6B PREFIX
"""

from __future__ import annotations

import sys

from megatron.bridge import AutoBridge
from megatron.bridge.recipes.qwen.h100 import qwen3_600m_sft_1gpu_h100_bf16_config
from megatron.bridge.training.pretrain import pretrain

from megatron_prefix import LossConfig
from megatron_prefix.bridge import preference_data, preference_forward_step, prefix_preference

ROWS_PER_STEP = 64


def main(hf_model: str, prefix: str, valid: str | None = None) -> None:
    cfg = qwen3_600m_sft_1gpu_h100_bf16_config()  # optimizer, schedule, logging, checkpoints

    # The model: policy and reference start from the Hugging Face weights that its hook loads.
    provider = AutoBridge.from_hf_pretrained(hf_model).to_megatron_provider(load_weights=True)
    provider.seq_length = 8192
    cfg.model = prefix_preference(provider)
    cfg.tokenizer.tokenizer_model = hf_model

    # The data: one micro batch is one packed row, a step is ROWS_PER_STEP rows over all ranks.
    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = ROWS_PER_STEP
    cfg.dataset = preference_data(
        cfg.model,
        prefix,
        rows_per_step=ROWS_PER_STEP,
        row_capacity=8192,
        loss=LossConfig(beta=0.1),
        valid=valid,
    )

    cfg.ddp.average_in_collective = False  # Megatron-Core asks for it beside per-token losses
    cfg.optimizer.lr = 5e-7
    cfg.optimizer.min_lr = 0.0
    cfg.train.train_iters = 200
    cfg.validation.eval_iters = 8 if valid else 0
    pretrain(cfg, preference_forward_step(cfg.dataset))


if __name__ == "__main__":
    main(*sys.argv[1:])
