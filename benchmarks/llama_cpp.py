"""Run by the Python of another environment: what llama.cpp computes of GGUF files, through xllamacpp, from tokens.

python benchmarks/llama_cpp.py JOBS.json      (a list of FILE, PROMPTS, STEPS, VOCABULARY, OUT)

PROMPTS are lists of tokens; each is continued by STEPS tokens, always the most probable one. OUT holds the tokens, their text,
and the log-probabilities of the whole vocabulary in front of each.
"""

import json
import sys
from pathlib import Path

import xllamacpp

FLOOR = -1e4  # log-probability of a token that is not told


def opened(file, longest):
    """The server of a file, on one thread, without a cache of prompts."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
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


if __name__ == "__main__":
    main(sys.argv[1])
