"""Context parallelism: the tokens of a row are spread over ranks.

`ownership.py` chooses the tokens of each rank; `transports.py` moves keys and values.
"""

from megatron_prefix.attention.context_parallel.ownership import ContextCost
from megatron_prefix.attention.context_parallel.transports import ContextParallel, ContextShare

__all__ = ["ContextCost", "ContextParallel", "ContextShare"]
