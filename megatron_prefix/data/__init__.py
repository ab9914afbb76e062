"""Preference records on their way to the model: examples, tokens, trees, store, plan, rows."""
