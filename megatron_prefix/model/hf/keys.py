"""The keys of `config.json` that every model type has, and what is done with each.

Every key of a file is one of these or of its family (families.py), or the file is refused by that
key's name:

    READ        gives a size of the model (config.py)
    ONLY        is supported with some values only
    NO_EFFECT   does not change what the model computes from tokens

transformers also ignores keys that no model knows. They are refused here, because a key that this
version does not know may be one that a newer transformers reads. A key that is null counts as
absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Only:
    """Values with which a key is supported, and why no others are."""

    values: tuple[Any, ...]
    reason: str


READ = frozenset(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim tie_word_embeddings
    rope_parameters rope_scaling rope_theta max_position_embeddings
    original_max_position_embeddings num_labels id2label pad_token_id eos_token_id
    """.split()
)
"""`max_position_embeddings` is the original context length of a llama3 scaling that names none.
Labels, padding and end of text matter for reward models."""

ONLY: dict[str, Only] = {
    "partial_rotary_factor": Only((1, None), "all channels of a head are rotated"),
    "quantization_config": Only((None,), "weights must not be quantised"),
    "compression_config": Only((None,), "weights must not be quantised"),
    "is_encoder_decoder": Only((False, None), "only decoders are supported"),
    "add_cross_attention": Only((False, None), "only decoders are supported"),
    "attention_bias": Only((False, None), "this model type has no such biases here"),
    "mlp_bias": Only((False, None), "linear layers of the MLP have none here"),
    "use_mrope": Only((False, None), "positions have one axis"),
    "layer_types": Only((None,), "layers of this model type are all of one kind"),
    "router_jitter_noise": Only((0, None), "routing is a function of the weights"),
    "capacity_factor": Only((0, None), "experts take every token that is sent to them"),
    "expert_capacity": Only((0, None), "experts take every token that is sent to them"),
    "shared_expert_intermediate_size": Only((0, None), "there are no shared experts"),
    "n_shared_experts": Only((0, None), "there are no shared experts"),
    "mlp_only_layers": Only(([], None), "every layer has experts, or none has"),
    "decoder_sparse_step": Only((1, None), "every layer has experts, or none has"),
}

NO_EFFECT = frozenset(
    # names, versions, precision on disk (each tensor has its own), implementations
    """
    _name_or_path name_or_path _model_name_or_path _commit_hash transformers_version
    torch_dtype dtype attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _flash_attn_2_enabled experts_implementation
    _experts_implementation _experts_implementation_internal unsloth_version unsloth_fixed
    pretraining_tp torchscript use_bfloat16 tf_legacy_loss
    """.split()
    # training: there is no dropout here, weights are loaded, a balancing loss has its own setting
    + """
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop
    classifier_dropout router_aux_loss_coef output_router_logits gradient_checkpointing
    """.split()
    # labels and tokens: the tokenizer and the data decide
    + """
    label2id problem_type bos_token_id sep_token_id unk_token_id decoder_start_token_id
    tokenizer_class prefix task_specific_params finetuning_task
    """.split()
    # output and generation
    + """
    use_cache cache_implementation is_decoder return_dict output_hidden_states output_attentions
    chunk_size_feed_forward cross_attention_hidden_size tie_encoder_decoder
    tie_last_hidden_states
    assistant_confidence_threshold bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind assistant_lookbehind temperature
    top_k top_p typical_p
    """.split()
)
