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
# MAX_RESTARTS   starts after a failure (0); wrong input (exit code 2) is never started again
# PYTHON         interpreter (python)
# DRY_RUN        print the command instead of running it
#
# SIGTERM, SIGUSR1 or SIGHUP to this script lets training finish its step, save, and exit with 143.
# If train.load is train.save, the same line continues from there, and so does a restart.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nnodes=${NNODES:-1}
if [ "$nnodes" -ne 1 ]; then
    endpoint="${RDZV_HOST:?name one of the nodes}:${RDZV_PORT:-29500}"
    run="${RUN_ID:?give a word that only the nodes of this launch share}"
fi
# torchrun itself restarts every failure and hides the exit codes of the processes. So it restarts
# none here, and a process that refuses its input makes this file.
MEGATRON_PREFIX_REFUSED=$(mktemp -u)
export MEGATRON_PREFIX_REFUSED

attempt=0
compose() {
    if [ "$nnodes" -eq 1 ]; then
        rendezvous=(--standalone)
    else
        # A late process of an earlier attempt cannot join.
        rendezvous=(
            --rdzv-backend=c10d --rdzv-endpoint="$endpoint"
            --rdzv-id="$run$([ "$attempt" -eq 0 ] || echo "-$attempt")"
        )
    fi
    command=(
        "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}"
        --nnodes="$nnodes" --nproc-per-node="${GPUS_PER_NODE:-8}" --max-restarts=0
        -m megatron_prefix "$@"
    )
}
compose "$@"
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
trap stop TERM USR1 HUP
trap 'rm -f "$MEGATRON_PREFIX_REFUSED"' EXIT
while true; do
    (
        trap '' USR1 HUP # if the signal reaches the whole process group
        exec "${command[@]}"
    ) &
    launcher=$!
    while true; do # a signal ends `wait`, not the run
        wait "$launcher"
        code=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    [ "$code" -eq 0 ] && exit 0
    if [ -e "$MEGATRON_PREFIX_REFUSED" ]; then
        cat "$MEGATRON_PREFIX_REFUSED" >&2 # again, after torchrun's own lines
        exit 2
    fi
    [ -n "$stopping" ] && exit 143
    [ "$attempt" -ge "${MAX_RESTARTS:-0}" ] && exit "$code"
    attempt=$((attempt + 1))
    echo "torchrun.sh: exit code $code; restart $attempt of $MAX_RESTARTS" >&2
    compose "$@"
done
