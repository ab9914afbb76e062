# Environment of every process of a launch; sourced by torchrun.sh. What is set outside is kept.

# One hardware queue, so that kernels start in the order in which Megatron-Core issued them. With
# tensor parallelism it issues a collective before the matrix product that hides it; with several
# queues the product may take the GPU first and the collective then waits behind it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Rows differ in length from step to step. Segments that grow keep freed blocks of other sizes from
# piling up beside those in use.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# A collective that fails or times out ends its process, instead of leaving the GPUs spinning;
# torchrun then ends the others.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# NCCL says what went wrong. INFO also says which network and which topology it found: read that
# once on a new cluster.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# NVLink SHARP reserves GPU memory for its buffers. Set 1 where `plan` leaves several GiB: sums within
# a node get faster.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# Which network, where a node has several and the wrong one is chosen. Prefixes are enough.
#   NCCL_SOCKET_IFNAME   interface over which NCCL's ranks find one another
#   GLOO_SOCKET_IFNAME   the same for what is sent between CPUs: plans, checks, checkpoint records
#   NCCL_IB_HCA          InfiniBand or RoCE adapters that carry the data
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0 NCCL_IB_HCA=mlx5

# CPU threads a process: it plans and packs rows while the GPU computes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Models and tokenizers are read from disk; compute nodes rarely reach the Hub, and a thousand
# processes should not ask it.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
