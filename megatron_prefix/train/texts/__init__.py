"""Texts that a reward model scores."""

from megatron_prefix.train.texts.scores import TEXT_KEYS, read_texts, score_texts

__all__ = ["TEXT_KEYS", "read_texts", "score_texts"]
