"""Run by the Python of another environment: what llama.cpp computes of GGUF files, through xllamacpp, from tokens.

python benchmarks/llama_cpp.py JOBS.json            (a list of FILE, PROMPTS, STEPS, VOCABULARY, OUT)
python benchmarks/llama_cpp.py score JOBS.json      (a list of FILE, WINDOWS, THREADS, OUT)

PROMPTS are lists of tokens; each is continued by STEPS tokens, always the most probable one. OUT holds the tokens, their text,
and the log-probabilities of the whole vocabulary in front of each. WINDOWS are scored instead: OUT holds the log-probability of
every token behind the first, and the tokens a second of a prompt and of what follows it.
"""

import json
import sys
import time
from pathlib import Path

import xllamacpp

FLOOR = -1e4  # log-probability of a token that is not told


def opened(file, longest, threads=1):
    """The server of a file, without a cache of prompts."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def answer(server, prompt, steps, vocabulary):
    """Tokens, text and log-probabilities."""
    asked = {"prompt": prompt, "n_predict": steps, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False,
             "ignore_eos": False}  # fmt: skip
    choice = server.handle_completions(asked)["choices"][0]
    tokens, rows = [], []
    for entry in choice["logprobs"]["content"]:
        row = [FLOOR] * vocabulary
        for one in entry["top_logprobs"]:
            row[one["id"]] = one["logprob"]
        tokens.append(entry["id"])
        rows.append(row)
    return {"tokens": tokens, "text": choice["text"], "logprobs": rows}


def main(jobs):
    """Every job, one after the other."""
    for file, prompts, steps, vocabulary, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        server = opened(file, 512)
        answers = [answer(server, prompt, steps, vocabulary) for prompt in prompts]
        Path(out).write_text(json.dumps(answers), encoding="utf-8")
        del server


def forced(server, window):
    """The log-probability of every token behind the first: the server is asked for one token behind each beginning, which its
    bias makes the window's own; what is told is the probability before the bias. One token is computed a time."""
    found = []
    for k in range(1, len(window)):
        asked = {"prompt": window[:k], "n_predict": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True,
                 "logit_bias": [[window[k], 1000.0]], "ignore_eos": False}  # fmt: skip
        (entry,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        if entry["id"] != window[k]:
            raise SystemExit(f"token {window[k]} was asked for, {entry['id']} came")
        found.append(entry["logprob"])
    return found


def speed(server, window):
    """Tokens a second of reading a window, and of writing as many behind its first."""
    rates = []
    for prompt, steps in ((window, 1), (window[:1], len(window))):
        asked = {"prompt": prompt, "n_predict": steps, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            server.handle_completions(asked)
            best = min(best, time.perf_counter() - started)
        rates.append(len(window) / best)
    return rates


def score(jobs):
    """Every job, one after the other."""
    for file, windows, threads, out in json.loads(Path(jobs).read_text(encoding="utf-8")):
        server = opened(file, 512, threads)
        rates = speed(server, windows[0])
        told = {"prompt": rates[0], "decode": rates[1], "logprobs": [forced(server, window) for window in windows]}
        Path(out).write_text(json.dumps(told), encoding="utf-8")
        del server


if __name__ == "__main__":
    score(sys.argv[2]) if sys.argv[1] == "score" else main(sys.argv[1])
