#!/bin/sh
# Everything that needs a GPU, on a machine without a network; see docs/gpu.md.
#
#     sh tools/gpu_check.sh first [WHEELS]               # or second, third, fourth: see docs/gpu.md
#     sh tools/gpu_check.sh WHEELS [tests] ['bench_….py --options'] …
#
# WHEELS is a directory of wheels, or - where everything is installed. What is written goes to
# $OUT, too, and so does the table that `auto` follows where a benchmark changed it. Where there is
# no git, MEGATRON_PREFIX_COMMIT says which commit results are of. Without names, the tests and the benchmark of attention are run.
set -u
cd "$(dirname "$0")/.." || exit 2
WHEELS=${1:?"usage: sh tools/gpu_check.sh first|second|third|fourth [WHEELS], or WHEELS [tests] ['bench_….py --options'] …"}
shift
case $WHEELS in
first | second | third | fourth)
    part=$WHEELS WHEELS=${1:--}
    set -- "gpu_half_hour.py $part"
    ;;
esac
[ $# -gt 0 ] || set -- tests "bench_attention.py --name attention_cuda"
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" build || exit 2
if [ "$WHEELS" != - ]; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
        --target "$SITE" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$PYTHON" tools/gpu_needs.py || exit 2

touch build/gpu_check_began
failed=0
for part in "$@"; do
    echo "== $part"
    if [ "$part" = tests ]; then
        "$PYTHON" -m pytest -q -m gpu -rs --timeout 120 tests/gpu >"$OUT/test_gpu.txt" 2>&1 || failed=1
        tail -n 60 "$OUT/test_gpu.txt"
    else # shellcheck disable=SC2086  # a program and its options
        "$PYTHON" tools/$part || failed=1
    fi
done
if ! [ "$OUT" -ef benchmarks/results ]; then
    find benchmarks/results megatron_prefix/attention/auto_table.json -newer build/gpu_check_began -type f -exec cp {} "$OUT" \;
fi
exit $failed
