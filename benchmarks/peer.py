"""Run by the Python of another environment: load checkpoints with other people's software and say what they compute.

python benchmarks/peer.py load JOBS.json               (a list of HOW, MODEL, TOKENS, OUT; HOW: see `open_model`)
python benchmarks/peer.py score JOBS.json              (a list of MODEL, WINDOWS, THREADS, OUT; see llama_cpp.py)
python benchmarks/peer.py make MODEL TEXT OUT          (a checkpoint that gptqmodel made)
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}

import torch
from safetensors.torch import load_file, save_file


def open_model(how: str, model: str):
    """The causal LM. how: transformers, eager (the same with eager attention), gptqmodel, or dequantize (transformers,
    everything dequantized at loading)."""
    if how == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(model, device="cpu", backend=BACKEND.TORCH).model
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

    declared = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    more = {"attn_implementation": "eager"} if how == "eager" else {}
    if declared.get("quant_method") == "gptq":
        more = {"quantization_config": GPTQConfig(bits=declared["bits"], backend="torch")}
    elif how == "dequantize":
        more = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(model, device_map="cpu", **more)


def load(jobs: str) -> None:
    """The answer of every job, one after the other."""
    for how, model, tokens, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        answer(how, model, tokens, out)


def answer(how: str, model: str, tokens: str, out: str) -> None:
    """Logits of the first windows and the losses of all, written to ``out``."""
    lm = open_model(how, model)
    ids = load_file(tokens)["ids"]
    losses, kept = [], []
    with torch.inference_mode():
        for window in ids.split(8):
            logits = lm(window, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), window[:, 1:], reduction="none")
            losses += loss.double().mean(1).tolist()
            kept.append(logits) if len(kept) < 1 else None
    save_file({"logits": torch.cat(kept), "losses": torch.tensor(losses, dtype=torch.float64)}, out)


@torch.inference_mode()
def speed(lm, window: list[int]) -> list[float]:
    """Tokens a second of reading a window, and of writing as many behind its first."""
    rates = []
    for prompt, steps in ((window, 1), (window[:1], len(window))):
        best = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            lm.generate(torch.tensor([prompt]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
            best = min(best, time.perf_counter() - started)
        rates.append(len(window) / best)
    return rates


def score(jobs: str) -> None:
    """Log-probabilities of windows and speed of every job, by transformers."""
    for model, windows, threads, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        torch.set_num_threads(threads)
        lm, ids = open_model("transformers", model), torch.tensor(windows)
        rows = []
        with torch.inference_mode():
            for window in ids.split(1):
                logits = lm(window, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
                rows.append(logits.gather(1, window[0, 1:, None])[:, 0].tolist())
        rates = speed(lm, windows[0])
        told = {"prompt": rates[0], "decode": rates[1], "logprobs": rows}
        Path(out).write_text(json.dumps(told), encoding="utf-8")


def make(model: str, text: str, out: str) -> None:
    """4 bits, groups of 32, by gptqmodel's own GPTQ."""
    from gptqmodel import GPTQModel, QuantizeConfig

    maker = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=32), device="cpu")
    lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if len(line) > 80]
    maker.quantize(lines[:32], batch_size=1)
    maker.save(out)


if __name__ == "__main__":
    {"load": load, "score": score, "make": make}[sys.argv[1]](*sys.argv[2:])
