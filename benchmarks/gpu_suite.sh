#!/usr/bin/env bash
# Every GPU check and benchmark of the project in one command of under 9 minutes: benchmarks/gpu_suite.sh [OUT.md]
# Needs a CUDA build of torch with Triton, and about 16 GB of disk under TMPDIR for a random LLaMA-2-7B.
# Every stage has a limit (515 seconds in all); rows that a stage printed before it was stopped are kept.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu.md}
python=${PYTHON:-python3}
log=$(mktemp)
rows=$(mktemp)
trap 'rm -f "$log" "$rows"' EXIT
failed=0

# stage NAME LIMIT COMMAND...: runs it; every markdown row that it prints becomes a row of the one table.
stage() {
  local name=$1 limit=$2 started=$SECONDS outcome=done
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    outcome="failed, exit code $code"
    [ "$code" -lt 124 ] || outcome="stopped after $limit s"
    failed=1
  fi
  echo "| $name | **$outcome** | $((SECONDS - started)) s; $(grep -E '[0-9]+ (passed|failed)' "$log" | tail -1 | tr -d =) |" >>"$rows"
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
    }' "$log" >>"$rows"
}

checks='"$0" -m pytest -q -p no:cacheprovider tests/quant/kernels/test_columns.py tests/quant/kernels/test_matmul.py -k triton &&
        "$0" -m pytest -q -p no:cacheprovider -m gpu tests/quant/solvers/test_contract.py tests/quant/learn/test_learn.py tests/test_run.py'
stage "kernels and solvers against the CPU" 70 bash -c "$checks" "$python"
stage "solvers" 70 "$python" -m benchmarks.solvers --device cuda --precision high --no-float64 \
  --shapes 768x768 3072x768 768x3072 2048x2048 4096x4096
stage "LLaMA-2-7B, random weights" 175 "$python" -m benchmarks.end_to_end --device cuda \
  --config benchmarks/configs/llama-2-7b --methods quantease gptq
stage "a block of Falcon-180B" 120 "$python" -m benchmarks.end_to_end --device cuda \
  --config benchmarks/configs/falcon-180b --blocks 1 --methods quantease gptq --activation-store cpu --calib-batch 1
stage "training steps" 55 "$python" -m benchmarks.training --config benchmarks/configs/llama-2-7b --seqlen 2048 --nsamples 4 \
  --device cuda --dtype bfloat16
stage "packed products" 25 "$python" -m benchmarks.packed --device cuda

{
  echo "# On a GPU"
  echo
  "$python" -c 'from benchmarks.measuring import machine_line; from quant.core import env; print(machine_line(env.describe(env.pick_device("cuda")), env.versions()) + ".")'
  echo
  echo "| stage | what | figures |"
  echo "|---|---|---|"
  cat "$rows"
} >"$out"
echo "written: $out"
exit "$failed"
