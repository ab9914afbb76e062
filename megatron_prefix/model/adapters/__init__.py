"""Low-rank adapters on the linear layers of the model, whose own weights are frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.model.adapters.specs import with_adapters
    from megatron_prefix.model.adapters.switch import StartWeights, as_reference, without_adapters
    from megatron_prefix.model.adapters.trained import (
        freeze_base,
        is_added,
        is_trained,
        start_saved_modules,
    )
else:
    __getattr__ = lazy_face(
        __name__,
        specs=["with_adapters"],
        switch=["StartWeights", "as_reference", "without_adapters"],
        trained=["freeze_base", "is_added", "is_trained", "start_saved_modules"],
    )

__all__ = [
    "StartWeights",
    "as_reference",
    "freeze_base",
    "is_added",
    "is_trained",
    "start_saved_modules",
    "with_adapters",
    "without_adapters",
]
