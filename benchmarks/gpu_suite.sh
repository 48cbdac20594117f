#!/usr/bin/env bash
# Every GPU check and benchmark of the project in one command of under 9 minutes: benchmarks/gpu_suite.sh [OUT.md]
# Needs a CUDA build of torch with Triton, and about 16 GB of disk under TMPDIR for a random LLaMA-2-7B.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu.md}
python=${PYTHON:-python3}
table=$(mktemp)
trap 'rm -f "$table"' EXIT

echo "== kernels against torch, compiled"
"$python" -m pytest -q -p no:cacheprovider tests/quant/test_kernels.py tests/quant/test_quantease.py

echo "== solvers against their floors"
"$python" -m benchmarks.solvers --device cuda --shapes 768x768 2048x2048 4096x4096 --reference --precision high --out "$table"

echo "== whole models with random weights"
{
  cat "$table"
  echo
  echo "# Whole quantization, calibration included"
  echo
  "$python" -m benchmarks.end_to_end --config benchmarks/configs/llama-2-7b --device cuda --methods gptq quantease
  echo
  "$python" -m benchmarks.end_to_end --config benchmarks/configs/falcon-180b --blocks 1 --device cuda \
    --methods gptq quantease --activation-store cpu --calib-batch 1
} | tee "$out.tmp"
mv "$out.tmp" "$out"
echo "written: $out"
