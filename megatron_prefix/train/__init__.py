"""Training on Megatron-Core: groups, schedule, optimizer, checkpoints, metrics."""
