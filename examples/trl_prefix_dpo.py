"""TRL's `DPOTrainer`, but each prompt is computed once: same losses and gradients, fewer tokens.

    trainer = PrefixDPOTrainer(model=model, args=DPOConfig(...), train_dataset=pairs)

TRL's code runs as it is: data, loss, metrics, optimizer. Only the calls of a model change: before
the model, the padded batch [2B, L] becomes one tree row [1, T]; after it, the row's
log-probabilities go back to their places in [2B, L - 1]. One process. See docs/trl.md.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import DPOTrainer

import megatron_prefix as mp

TREE = "megatron_prefix_tree"
MODELS = ("llama", "mistral", "qwen2", "qwen3")  # only attention mixes tokens in these
REFUSED = ("padding_free", "use_liger_kernel", "pad_to_multiple_of", "torch_compile")
REFUSED += ("deepspeed", "fsdp")


@dataclass
class Row:
    """A batch of TRL as one tree row, on the device."""

    tensors: dict[str, torch.Tensor]  # input_ids, position_ids, shift_labels: [1, T]
    plan: mp.TreePlan
    source: torch.Tensor  # [2B, L - 1]: the position of the row that predicts the next token
    is_trained: torch.Tensor  # [2B, L - 1]


def to_row(batch) -> Row:
    real, trained = (batch[x].bool().cpu() for x in ("attention_mask", "completion_mask"))
    ids, batch_size = batch["input_ids"].cpu(), len(real) // 2
    token_lists = [tokens[mask] for tokens, mask in zip(ids, real, strict=True)]
    masks = [tokens[mask] for tokens, mask in zip(trained, real, strict=True)]
    pairs = [(i, i + batch_size) for i in range(batch_size)]  # TRL: chosen ones, then rejected
    row = mp.tree_rows(token_lists, pairs, completion_masks=masks)
    layout = mp.TreeLayout.from_parents(row["tree_cu_seqlens_q"].diff(), row["tree_parents"])
    is_trained = (trained & real)[:, 1:]
    if is_trained.sum() != len(row["token_index"]):
        raise ValueError("the batch has padding on the left: collate with padding on the right")
    source = torch.zeros(is_trained.shape, dtype=torch.long)
    source.masked_scatter_(is_trained, row["token_index"])
    device = batch["input_ids"].device
    names = ("input_ids", "position_ids", "shift_labels")
    return Row(
        {name: row[name][None].to(device) for name in names},
        mp.TreePlan(layout, device),
        source.to(device),
        is_trained.to(device),
    )


def attend(module, query, key, value, mask, *, tree_row=None, scaling=None, dropout=0.0, **rest):
    """Attention for transformers: of a tree row, or without one of an ordinary batch."""
    if tree_row is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest
        )
    if dropout:
        raise ValueError(f"attention_dropout {dropout}: tree attention has none; set it to 0")
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    window = rest.get("sliding_window")
    return mp.tree_attention(q, k, v, tree_row.plan, scale=scaling, window=window)[None], None


def before(model, args, kwargs):
    row = kwargs.pop("tree_row", None)
    if row is not None and kwargs.get("fused_lm_head"):  # not TRL's extra pass for logits
        del kwargs["labels"]
        kwargs |= row.tensors | {"attention_mask": torch.ones_like(row.tensors["input_ids"])}
        kwargs["tree_row"] = row
    return args, kwargs


def after(model, args, kwargs, output):
    if (row := kwargs.get("tree_row")) is None:
        return output
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        if (per_token := getattr(output, name)) is not None:
            setattr(output, name, per_token[0, row.source].masked_fill(~row.is_trained, 0))
    output.label_mask = row.is_trained
    output.loss = -output.log_probs.sum() / row.is_trained.sum().clamp(min=1)
    return output


def check_model(model):
    if (kind := model.config.model_type) not in MODELS:
        raise ValueError(f"model_type {kind} is not supported; use one of {', '.join(MODELS)}")


class PrefixDPOTrainer(DPOTrainer):
    def __init__(self, model, ref_model=None, args=None, **kwargs):
        for name in REFUSED:
            if getattr(args, name, None):
                raise ValueError(f"{name}={getattr(args, name)!r} is not supported: leave it out")
        if kwargs.get("peft_config") is not None or hasattr(model, "peft_config"):
            raise ValueError("PEFT is not supported: pass a model without adapters")
        if not isinstance(model, str):
            check_model(model)
        AttentionInterface.register(TREE, attend)
        AttentionMaskInterface.register(TREE, sdpa_mask)
        self._on_rows = []
        super().__init__(model, ref_model, args, **kwargs)
        if self.args.world_size > 1:
            raise ValueError(f"{self.args.world_size} processes are not supported: start one")
        for own in filter(None, (self.model, self.ref_model)):
            self._on_tree_rows(own)

    def _on_tree_rows(self, model):
        check_model(model)
        if not any(model is other for other in self._on_rows):
            self._on_rows.append(model)
            model.set_attn_implementation(TREE)
            model.register_forward_pre_hook(before, with_kwargs=True)
            model.register_forward_hook(after, with_kwargs=True)

    def compute_ref_log_probs(self, model, inputs):  # TRL calls it to precompute
        self._on_tree_rows(model)
        return super().compute_ref_log_probs(model, {**inputs, "tree_row": to_row(inputs)})

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "tree_row": to_row(inputs)}, *args, **kwargs)
