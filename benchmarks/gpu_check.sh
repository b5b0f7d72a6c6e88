#!/usr/bin/env bash
# All that a machine with a GPU can tell about this package, in one go:
#   benchmarks/gpu_check.sh [python]        (default: python3, with a CUDA or ROCm build of torch)
# builds with whatever compilers are there, runs the tests marked gpu, then a few of them under
# compute-sanitizer, then the benchmarks; everything lands under benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=benchmarks/results
mkdir -p "$results"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no GPU that torch sees")'
"$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
"$python" -m seqmem_fast info --json | tee "$results/gpu_info.json"

# cuBLAS repeats its results only with this, and the tests ask for repeatable ones.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
failed=0
"$python" -m pytest -m gpu --junitxml="$results/gpu_tests.xml" tests || failed=1

if command -v compute-sanitizer >/dev/null; then
    tests=tests/test_triton_lstm.py
    few=(
        "$tests::test_gpu_agrees_with_float64[torch.float32-64-3]"   # on chip, multiply-adds
        "$tests::test_gpu_agrees_with_float64[torch.bfloat16-100-3]" # on chip, tensor cores
        "$tests::test_gpu_agrees_with_float64[torch.float32-200-3]"  # step by step
        "$tests::test_gpu_cell_agrees_with_the_cpu[5-torch.float16]"
    )
    for tool in memcheck racecheck; do
        # Without torch's memory pool an access out of bounds leaves its own allocation.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest "${few[@]}" 2>&1 | tee "$results/gpu_$tool.log" || failed=1
    done
else
    echo "compute-sanitizer is not here: its part is left out" >&2
fi

"$python" -m benchmarks.harness.gpu --json "$results/gpu.json"
"$python" -m benchmarks.harness.gpu --op lstm --tf32 --json "$results/gpu_tf32.json"
exit "$failed"
