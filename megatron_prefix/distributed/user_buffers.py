"""Transformer Engine's buffers for parallel.tp_comm_overlap, which all layers of a process share.

They have the size of one row, and layers look for them when they are made. So they are made before
the first model of a run, and every row must have this length: `data.pad_rows: capacity`.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.model import TreeTransformerConfig


class UserBuffers:
    """The buffers of a run, made when its first model is."""

    def __init__(self, row_tokens: int) -> None:
        """`row_tokens`: tokens of a row on a context-parallel rank."""
        self.row_tokens = row_tokens
        self._engine: Any = None

    @classmethod
    def of_run(cls, config: Config) -> UserBuffers | None:
        """Those of a run with `tp_comm_overlap`; none are made yet."""
        parallel = config.parallel
        if not parallel.tp_comm_overlap:
            return None
        # row_capacity 1000, tp 2 with sequence parallelism, cp 2: rows of 1000, 500 for each rank
        multiple = parallel.row_multiple * config.model.token_multiple
        return cls(config.data.length_multiple(multiple) // parallel.context_parallel_size)

    def open(self, config: TreeTransformerConfig) -> None:
        """Make the buffers for a model's layers; further calls make none. Collective over all
        processes. Raises InputError if this machine cannot."""
        config.row_tokens = self.row_tokens
        if self._engine is not None:
            return
        engine = importlib.import_module("transformer_engine.pytorch.module.base")
        modes = engine.UserBufferQuantizationMode
        kinds = [modes.FP8 if config.fp8 else modes.NONE]
        if config.fp8 and config.first_last_layers_bf16:
            kinds.append(modes.NONE)
        try:
            engine.initialize_ub(
                shape=[self.row_tokens, config.hidden_size],
                tp_size=config.tensor_model_parallel_size,
                quantization_modes=kinds,
                dtype=config.params_dtype,
                bootstrap_backend=config.tp_comm_bootstrap_backend,
            )
        except RuntimeError as error:
            raise InputError(
                "parallel.tp_comm_overlap = True: Transformer Engine cannot make its buffers here "
                f"({error}): remove it"
            ) from error
        self._engine = engine

    def close(self) -> None:
        """Free the buffers, if there are any."""
        if self._engine is not None:
            self._engine.destroy_ub()
            self._engine = None


def check_row(config: Any, num_tokens: int) -> None:
    """Refuse a row of another length than the buffers of a model with this configuration."""
    length = getattr(config, "row_tokens", 0)
    if length and num_tokens != length:
        raise RunError(
            f"parallel.tp_comm_overlap = True: a row has {num_tokens} tokens on this rank, and the "
            f"buffers have {length}: make rows by Sampler(pads_to_capacity=True), or "
            "remove it"
        )
