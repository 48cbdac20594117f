"""Run by the Python of another environment: AutoRound on given tokens, saved as a plain checkpoint of its weights.

python benchmarks/autoround.py MODEL TOKENS OUT BITS STEPS GROUP    (TOKENS: safetensors with int64 ids [n, T])

GROUP columns share a scale (-1: rows). Asymmetric, batches of 8, everything else as the library has it.
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, tokens: str, out: str, bits: str, steps: str, group: str) -> None:
    """Quantize and save."""
    ids = load_file(tokens)["ids"]
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rounding = AutoRound(
        lm, tokenizer, bits=int(bits), group_size=int(group), sym=False, iters=int(steps), seqlen=ids.shape[1],
        nsamples=len(ids), batch_size=8, dataset=windows, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    started = time.perf_counter()
    quantized, _ = rounding.quantize()
    seconds = time.perf_counter() - started
    quantized.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    said = {"seconds": seconds, "peak_bytes": peak, "version": version("auto-round")}
    sys.stdout.write(f"\n{json.dumps(said)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
