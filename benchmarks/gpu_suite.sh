#!/usr/bin/env bash
# Every GPU check and benchmark of the project in two commands of under 9 minutes each, in any order:
#     benchmarks/gpu_suite.sh kernels [OUT.md]    kernels and solvers against the CPU, solvers and packed products timed
#     benchmarks/gpu_suite.sh runs [OUT.md]       whole quantizations of models with random weights, training steps
# Needs a CUDA build of torch with Triton; runs also about 16 GB of disk under TMPDIR for a random LLaMA-2-7B.
# Every stage has a limit; rows are written as stages end, also those that a stage printed before it was stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
which=${1:-}
[[ $which == kernels || $which == runs ]] || { echo "usage: $0 kernels|runs [OUT.md]" >&2; exit 2; }
out=${2:-benchmarks/results/gpu-$which.md}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# stage NAME LIMIT COMMAND...: runs it; every markdown row that it prints becomes a row of the one table.
stage() {
  local name=$1 limit=$2 started=$SECONDS outcome=done log=$work/log
  shift 2
  echo "== $name"
  mkdir "$work/tmp"  # what a stage that is stopped leaves behind goes with it
  TMPDIR=$work/tmp timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  rm -rf "$work/tmp"
  if [ "$code" -ne 0 ]; then
    outcome="failed, exit code $code"
    [ "$code" -lt 124 ] || outcome="stopped after $limit s"
    failed=1
  fi
  echo "| $name | **$outcome** | $((SECONDS - started)) s; $(grep -E '[0-9]+ (passed|failed)' "$log" | tail -1 | tr -d =) |" >>"$out"
  # A header is the row above |---|; cells are written with the names of their columns.
  awk -F ' *[|] *' -v stage="$name" '
    /^\|---/ { columns = split(last, head, / *[|] */); last = ""; next }
    last != "" && columns { show(last) }
    { last = /^\|/ ? $0 : "" }
    END { if (last != "" && columns) show(last) }
    function show(line,   cell, n, i, text) {
      n = split(line, cell, / *[|] */)
      for (i = 3; i < n; i++) if (cell[i] != "" && cell[i] != "-") text = text (text ? ", " : "") head[i] ": " cell[i]
      print "| " stage " | " cell[2] " | " text " |"
    }' "$log" >>"$out"
}

{
  echo "# On a GPU: $which"
  echo
  "$python" -c 'from benchmarks.measuring import machine_line; from quant.core import env; print(machine_line(env.describe(env.pick_device("cuda")), env.versions()) + ".")'
  echo
  echo "| stage | what | figures |"
  echo "|---|---|---|"
} >"$out"

test=("$python" -m pytest -q -p no:cacheprovider)
if [ "$which" = kernels ]; then
  stage "kernels against the CPU" 130 "${test[@]}" tests/quant/kernels/test_columns.py tests/quant/kernels/test_matmul.py -k triton
  stage "solvers and runs against the CPU" 120 "${test[@]}" -m gpu tests/quant/solvers/test_contract.py \
    tests/quant/learn/test_learn.py tests/test_run.py
  stage "solvers" 80 "$python" -m benchmarks.solvers --device cuda --precision high --no-float64 --no-reference \
    --shapes 768x768 3072x768 768x3072 2048x2048 4096x4096
  stage "packed products" 160 "$python" -m benchmarks.packed --device cuda
else
  stage "LLaMA-2-7B, random weights" 245 "$python" -m benchmarks.end_to_end --device cuda \
    --config benchmarks/configs/llama-2-7b --methods quantease gptq
  stage "a block of Falcon-180B" 200 "$python" -m benchmarks.end_to_end --device cuda \
    --config benchmarks/configs/falcon-180b --blocks 1 --methods quantease gptq --activation-store cpu --calib-batch 1
  stage "training steps" 55 "$python" -m benchmarks.training --config benchmarks/configs/llama-2-7b --seqlen 2048 --nsamples 4 \
    --device cuda --dtype bfloat16
fi
echo "written: $out"
exit "$failed"
