#!/usr/bin/env bash
# Run a command of megatron_prefix on all GPUs of this node, or of several nodes.
#
#   examples/launch/torchrun.sh train --config examples/launch/8b/dpo.yaml
#
# On several nodes start the same line on each of them (slurm.sbatch does this):
#
#   NNODES=4 RDZV_HOST=node001 RUN_ID=dpo-1 examples/launch/torchrun.sh train --config …
#
# NNODES         number of nodes (1)
# GPUS_PER_NODE  processes per node (8)
# RDZV_HOST      the node at which all nodes meet; needed with several nodes
# RDZV_PORT      a free port of that node (29500)
# RUN_ID         any word that only the nodes of this launch share; needed with several nodes
# PYTHON         interpreter (python)
# DRY_RUN        print the command instead of running it
#
# SIGTERM or SIGUSR1 to this script lets training finish its step, save, and exit with 143. If
# train.load is train.save, the same line continues from there.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nnodes=${NNODES:-1}
if [ "$nnodes" -eq 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(
        --rdzv-backend=c10d
        --rdzv-endpoint="${RDZV_HOST:?name one of the nodes}:${RDZV_PORT:-29500}"
        --rdzv-id="${RUN_ID:?give a word that only the nodes of this launch share}"
    )
fi
# No restarts by torchrun: the run continues from its last checkpoint when it is started again.
command=(
    "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}"
    --nnodes="$nnodes" --nproc-per-node="${GPUS_PER_NODE:-8}" --max-restarts=0
    -m megatron_prefix "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# The signal is sent to the training processes directly, and only once. torchrun would kill them 30
# seconds after it passed the signal on, which is too soon for the checkpoint of a large model, and a
# second signal ends them without a checkpoint.
stopping=
stop() {
    [ -n "$stopping" ] && return
    stopping=1
    local workers
    read -r -a workers <"/proc/$launcher/task/$launcher/children"
    kill -TERM "${workers[@]:-$launcher}"
}
trap stop TERM USR1
(
    trap '' USR1 # if the signal reaches the whole process group
    exec "${command[@]}"
) &
launcher=$!
while true; do # a signal ends `wait`, not the run
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || break
done
[ -n "$stopping" ] && [ "$code" -ne 0 ] && exit 143
exit "$code"
