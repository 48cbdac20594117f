"""Run by the Python of another environment: what mlx-lm computes of our checkpoints, from tokens.

python benchmarks/mlx_peer.py JOBS.json      (a list of DIRECTORY, PROMPTS, STEPS, VOCABULARY, OUT; see llama_cpp.py)
"""

import json
import sys
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


if __name__ == "__main__":
    main(sys.argv[1])
