"""Run by the Python of another environment: AutoRound on given tokens, saved as a plain checkpoint of its weights.

python benchmarks/autoround.py MODEL TOKENS OUT BITS STEPS          (TOKENS: safetensors with int64 ids [n, T])

Rows, asymmetric, batches of 8, everything else as the library has it.
"""

import json
import os
import sys
import time
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, tokens: str, out: str, bits: str, steps: str) -> None:
    """Quantize and save."""
    ids = load_file(tokens)["ids"]
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rounding = AutoRound(
        lm, tokenizer, bits=int(bits), group_size=-1, sym=False, iters=int(steps), seqlen=ids.shape[1],
        nsamples=len(ids), batch_size=8, dataset=windows, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    started = time.perf_counter()
    quantized, _ = rounding.quantize()
    seconds = time.perf_counter() - started
    quantized.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    sys.stdout.write("\n" + json.dumps({"seconds": seconds, "version": version("auto-round")}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
