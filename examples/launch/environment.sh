# Environment of every process of a launch; sourced by torchrun.sh. Variables that are set are kept.

# One hardware queue, so that kernels start in the order in which Megatron-Core issues them. With
# tensor parallelism it issues a collective before the matrix product that hides it. With several
# queues the product may start first, and then the collective waits for it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Rows differ in length from step to step. Segments that can grow prevent fragmentation by freed blocks
# of other sizes.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# A collective that fails or times out ends its process, instead of leaving the GPUs busy for ever.
# torchrun then ends the others.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# NCCL prints warnings. With INFO it also prints which network and which topology it found: read this
# once on a new cluster.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# NVLink SHARP reserves GPU memory for its buffers. Set it to 1 if `plan` leaves several GiB free: sums
# within a node get faster.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# The network, if a node has several and the wrong one is used. Prefixes are enough.
#   NCCL_SOCKET_IFNAME   interface over which NCCL's ranks find each other
#   GLOO_SOCKET_IFNAME   the same for data between CPUs: plans, checks, checkpoint records
#   NCCL_IB_HCA          InfiniBand or RoCE adapters that carry the data
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0 NCCL_IB_HCA=mlx5

# CPU threads per process: it plans and packs rows while the GPU computes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Models and tokenizers are read from disk. Compute nodes rarely reach the Hub, and a thousand
# processes should not send requests to it.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
