"""Run by the Python of another environment: GPTQModel's own GPTQ on given tokens, saved as its own checkpoint.

python benchmarks/gptqmodel_peer.py MODEL TOKENS OUT BITS GROUP    (TOKENS: safetensors with int64 ids [n, T])

GROUP columns share a scale (-1: rows); everything else as the library has it (symmetric grids).
"""

import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main(model: str, tokens: str, out: str, bits: str, group: str) -> None:
    """Quantize and save."""
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in load_file(tokens)["ids"]]
    maker = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=int(group)), device="cpu")
    started = time.perf_counter()
    maker.quantize(windows, batch_size=8)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    maker.save(out)
    said = {"seconds": seconds, "peak_bytes": peak, "version": version("gptqmodel")}
    sys.stdout.write(f"\n{json.dumps(said)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
