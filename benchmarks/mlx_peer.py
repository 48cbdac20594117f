"""Run by the Python of another environment: what mlx-lm computes of our checkpoints, from tokens.

python benchmarks/mlx_peer.py JOBS.json            (a list of DIRECTORY, PROMPTS, STEPS, VOCABULARY, OUT; see llama_cpp.py)
python benchmarks/mlx_peer.py score JOBS.json      (a list of DIRECTORY, WINDOWS, THREADS, OUT; threads are MLX's own affair)
"""

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def answer(model, prompt, steps, vocabulary):
    """Tokens, always the most probable, and log-probabilities of the whole vocabulary in front of each."""
    tokens, rows, cache, given = [], [], make_prompt_cache(model), prompt
    for _ in range(steps):
        logits = model(mx.array([given]), cache=cache)[0, -1, :vocabulary].astype(mx.float32)
        row = logits - mx.logsumexp(logits)
        rows.append(row.tolist())
        tokens.append(int(mx.argmax(row).item()))
        given = tokens[-1:]
    return {"tokens": tokens, "logprobs": rows}


def main(jobs):
    """Every job, one after the other."""
    mx.set_default_device(mx.cpu)
    for directory, prompts, steps, vocabulary, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        model, _ = load_model(Path(directory))
        Path(out).write_text(
            json.dumps([answer(model, prompt, steps, vocabulary) for prompt in prompts]), encoding="utf-8"
        )


def logprobs(model, window):
    """Of every token behind the first."""
    logits = model(mx.array([window]))[0, :-1].astype(mx.float32)
    rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(rows, mx.array(window[1:])[:, None], axis=1)[:, 0].tolist()


def speed(model, window):
    """Tokens a second of reading a window, and of writing as many behind its first."""
    rates = []
    for prompt, steps in ((window, 1), (window[:1], len(window))):
        best = float("inf")
        for _ in range(2):
            started, cache, given = time.perf_counter(), make_prompt_cache(model), prompt
            for _ in range(steps):
                given = [int(mx.argmax(model(mx.array([given]), cache=cache)[0, -1]).item())]
            best = min(best, time.perf_counter() - started)
        rates.append(len(window) / best)
    return rates


def score(jobs):
    """Every job, one after the other."""
    mx.set_default_device(mx.cpu)
    for directory, windows, _, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        model, _ = load_model(Path(directory))
        rates = speed(model, windows[0])
        told = {"prompt": rates[0], "decode": rates[1], "logprobs": [logprobs(model, window) for window in windows]}
        Path(out).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    score(sys.argv[2]) if sys.argv[1] == "score" else main(sys.argv[1])
