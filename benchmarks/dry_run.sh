#!/usr/bin/env bash
# Plans for LLaMA-2-7B, OPT-66B and Falcon-180B from their configurations alone: benchmarks/dry_run.sh > dry-run.md
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
echo "# Plans from configurations: 3 bits a row, 128 calibration windows of 2048 tokens, true-sequential"
echo
echo "Rates were measured on the machine that made the plan ($("$python" -c 'import torch; print(torch.get_num_threads())') CPU threads,"
echo "float32), which is not one for models of this size; memory does not depend on it. The formulas:"
echo
echo '```'
"$python" -c 'import quant.run.plan; print(quant.run.plan.__doc__.split("\n\n", 1)[1].strip())'
echo '```'
for model in llama-2-7b opt-66b falcon-180b; do
  echo
  echo '```'
  "$python" model_quantizer.py --model "benchmarks/configs/$model" --wbits 3 --seqlen 2048 --true-sequential --dry-run \
    --eval-datasets wikitext2 --calib-batch 1 --quantization-method rtn,gptq,quantease
  echo '```'
done
