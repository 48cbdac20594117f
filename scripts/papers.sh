#!/usr/bin/env bash
# Run rows of scripts/papers.tsv that match shell patterns; what follows -- goes to every command.
#
#   scripts/papers.sh omniquant llama-2-7b W4A4
#   scripts/papers.sh '*' 'opt-*' 'W3*' -- --seqlen 1024 --nsamples 64
#   PRINT=1 scripts/papers.sh affinequant '*' '*'          # only print the commands
#
# A command that fails does not stop the others; a finished or interrupted run continues where it is. MODELS=DIR takes
# models from DIR/<family>-<size> instead of the hub.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then sed -n '2,9p' "$0" | cut -c3-; exit 2; fi
paper=$1 model=$2 setting=$3; shift 3
[ "${1:-}" = "--" ] && shift
python=${PYTHON:-.venv/bin/python}
failed=0 found=0

hub() {  # family size -> hub id
  if [ -n "${MODELS:-}" ]; then echo "$MODELS/$1-$2"; return; fi
  case $1 in
    opt) echo "facebook/opt-$2" ;;
    bloom) echo "bigscience/bloom-$2" ;;
    falcon) echo "tiiuae/falcon-$2" ;;
    llama) echo "huggyllama/llama-$2" ;;
    llama-2) echo "meta-llama/Llama-2-$2-hf" ;;
  esac
}

while IFS=$'\t' read -r -u 3 p family sizes s flags; do
  for size in ${sizes//,/ }; do
    # shellcheck disable=SC2053  # patterns are meant
    [[ $p == $paper && "$family-$size" == $model && $s == $setting ]] || continue
    found=$((found + 1))
    if [ "$p" = quantease ]; then command="model_quantizer.py --dataset c4"; else command="main.py --eval_ppl"; fi
    # shellcheck disable=SC2086  # flags are words
    words=($python $command --model "$(hub "$family" "$size")" $flags "$@")
    echo "[$p $family-$size $s] ${words[*]}"
    if [ -z "${PRINT:-}" ]; then
      "${words[@]}" || { failed=$((failed + 1)); echo "[$p $family-$size $s] failed" >&2; }
    fi
  done
done 3< <(grep -v '^#' scripts/papers.tsv | tail -n +2)
if [ "$found" = 0 ]; then echo "error: no row of scripts/papers.tsv matches $paper $model $setting" >&2; exit 2; fi
echo "$found runs, $failed failed"
[ "$failed" = 0 ]
