#!/usr/bin/env bash
# Every linear by several methods from one full-precision stream, and the table of it under benchmarks/results/:
#   benchmarks/layers.sh linears text/wikitext2-valid.txt text/llama-7m text/opt-7m
#   benchmarks/layers.sh searched-grids text/brown.txt text/llama-7m text/opt-7m
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
what=$1 text=$2
shift 2

compare() {  # model bits variant methods flags...
  "$python" model_quantizer.py --compare-layers --model "$1" --dataset "$text" --eval-datasets '' --wbits "$2" \
    --seqlen 256 --nsamples "${NSAMPLES:-128}" --calib-batch 16 --quantization-method "$4" \
    --run-dir "runs/layers/$what/$(basename "$1")/w$2/$3" "${@:5}"
}

for model; do
  if [ "$what" = linears ]; then
    compare "$model" 3 minmax rtn,gptq,quantease
    continue
  fi
  for bits in 2 3 4; do
    compare "$model" "$bits" minmax quantease
    compare "$model" "$bits" mse quantease,gptq,gptq_quantease --range mse
    compare "$model" "$bits" mse+search quantease --range mse --search-grid
    compare "$model" "$bits" mse+refit quantease,gptq_quantease --range mse --refit-grid
    compare "$model" "$bits" mse+search+refit quantease --range mse --search-grid --refit-grid
  done
done
"$python" -m benchmarks.tables "runs/layers/$what" --out "${OUT:-benchmarks/results/$what.md}" \
  --about "calibration $(basename "$text"), ${NSAMPLES:-128} windows of 256 tokens, seed 0"
