#!/usr/bin/env bash
# All that a machine with a GPU can tell about this package, in one run of at most 590 seconds:
#   benchmarks/gpu_check.sh [--no-build] [--rehearse] [--seconds S] [python]
# Stages, the most telling first, each with a limit of its own: a stage that fails or takes too long
# does not end the run. All results go to the folder that OUT names (8 files; by default
# benchmarks/results/gpu) as they come. --no-build takes the extension that was built in place,
# --rehearse goes through all stages on the CPU, with few and small rows, --seconds sets another
# limit. The exit status says whether a stage failed; the table of stages comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
build=1 device=cuda seconds=590 python=python3
while [ $# -gt 0 ]; do
    case $1 in
        --no-build) build=0 ;;
        --rehearse) device=cpu ;;
        --seconds) seconds=$2 && shift ;;
        -*) echo "unknown option $1: see the head of $0" >&2 && exit 2 ;;
        *) python=$1 ;;
    esac
    shift
done
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
: >"$out/log.txt"
stages=
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 COLUMNS=170
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # cuBLAS repeats its results only with this
cores=$(nproc)
jobs=$((cores < 12 ? cores : 12))
rows=() compiled=() host=()
cases=$((seconds / 12 - 5)) patience=1
if [ $device = cpu ]; then
    cases=4 patience=8 # where a rehearsal runs, other tests run beside it
    rows=(--rows "1, 1, 64, 64" --samples 3)
    host=(--rounds 2 --calls 2)
    compiled=(--rows "ntm_read 16, 128, 20" --samples 3)
fi

# stage NAME LIMIT COMMAND...: its whole output goes to log.txt, the last lines to the terminal.
stage() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    local left=$((seconds - SECONDS))
    limit=$((limit * patience < left ? limit * patience : left))
    echo "== $name" | tee -a "$out/log.txt"
    if [ "$limit" -lt 3 ]; then
        status="no time left"
    else
        timeout -s "${stop:-TERM}" -k 5 "$limit" "$@" >"$out/stage.txt" 2>&1
        status=$?
        cat "$out/stage.txt" >>"$out/log.txt"
        grep -v " PASSED \| SKIPPED " "$out/stage.txt" | tail -n 150 | cut -c1-200
    fi
    stages+=$(printf '%-12s %4d s  status %s' "$name" $((SECONDS - start)) "$status")$'\n'
}

about() {
    uname -srm
    nvidia-smi || true
    "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)'
}

compile() {
    # One architecture, the card's, and one ISA, this processor's best.
    TORCH_CUDA_ARCH_LIST=$("$python" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()) if torch.version.cuda else "")')
    isa=$("$python" -c '
import torch
name = torch.backends.cpu.get_cpu_capability().lower()
print(name if name in ("avx2", "avx512") else "baseline")')
    [ -n "$TORCH_CUDA_ARCH_LIST" ] && export TORCH_CUDA_ARCH_LIST || unset TORCH_CUDA_ARCH_LIST
    "$python" setup.py --quiet build_ext --inplace --isas "$isa"
}
export -f about compile
export python

stage about 20 bash -c about
[ $build = 1 ] && stage build 170 bash -c compile
stage random $((cases + 15)) "$python" tests/gpu_random_shapes.py \
    --seconds "$cases" --jobs "$jobs" --device $device --json "$out/random.json"
stage floors 25 "$python" -W ignore -m benchmarks.harness.gpu_floors --device $device \
    --json "$out/floors.json"
stage host 25 "$python" -W ignore -m benchmarks.harness.gpu_host --device $device \
    --json "$out/host.json" "${host[@]}"
half=$((seconds < 360 ? seconds / 2 : 180))
stage times "$half" "$python" -W ignore -m benchmarks.harness.gpu --device $device --graphs \
    --samples 20 --jobs "$jobs" --limit-s $((half - 8)) --json "$out/times.json" "${rows[@]}"
mark=gpu
[ $device = cpu ] && mark="gpu and not slow" # there all of them are skipped
# Interrupted, pytest still says what has failed.
stop=INT stage tests 120 "$python" -m pytest -v --tb=short -m "$mark" -n "$jobs" \
    --junitxml="$out/tests.xml" -p no:cacheprovider $(grep -l 'mark\.gpu' tests/test_*.py)
stage tf32 60 "$python" -W ignore -m benchmarks.harness.gpu --device $device --op lstm --tf32 \
    --jobs "$jobs" --rows float32 --limit-s 50 --json "$out/tf32.json" "${rows[@]}"
stage compiled 170 "$python" -W ignore -m benchmarks.harness.gpu --device $device --compiled \
    --jobs "$jobs" --limit-s 160 --json "$out/compiled.json" "${compiled[@]}"
rm -f "$out/stage.txt"
printf '%s' "$stages" | tee -a "$out/log.txt"
! grep -qv "status 0$" <<<"${stages%$'\n'}"
