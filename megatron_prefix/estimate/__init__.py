"""What a run will need, before it has a GPU: memory, operations, and whether sharing pays."""

from megatron_prefix.estimate.flops import ForwardFlops, forward_flops
from megatron_prefix.estimate.planning import plan_run

__all__ = ["ForwardFlops", "forward_flops", "plan_run"]
