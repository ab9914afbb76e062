"""Answers of a model to prompts, a token at a time, in every layout."""

from megatron_prefix.engine.generation.answers import drawn, generate, leaving_no_trace

__all__ = ["drawn", "generate", "leaving_no_trace"]
