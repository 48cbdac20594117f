"""Measure the demo models and write models/demo/README.md.

python -m scripts.measure_demo_models
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import demo
from quant.core.text import markdown_table
from scripts.train_demo_models import FAMILIES, MIXTURE, OUT, perplexity

CHANCE = {"demo_lastword": 0.07, "demo_continuation": 0.25, "demo_reference": 0.5, "demo_yesno": 0.5}
THREADS = {"holding": "who holds it", "lying": "where it lies", "counting": "how many"}
TEXT = """# Demo models

Small language models of five families, and a mixture of 4 experts of which a token reaches 2, trained by this project on its
own demo world (`data/demo.py`) so that the main job runs without a network. Written by `python -m scripts.measure_demo_models`; nothing here is typed in.

{table}

Perplexity: demo test text, windows of 256 tokens without overlap, mean cross entropy of each window, exp of the
mean. Unigram: token frequencies of the training text. Zero-shot: accuracy on {items} items a task through lm-eval,
no examples, stories of the test split. lastword is counted exactly (16 tools or 12 names: 0.07 for a guess that knows
the kind of word).

## Outlier channels

Large language models have a few channels whose activations are far larger than the rest; models this small do not,
and round-to-nearest then looks better on them than it is. So in every norm in front of linears, but for the mixture's, {channels} random
channels of {hidden} have their gain and bias multiplied by {scale:g}, and the columns of the linears that read them
are divided by {scale:g}. In exact arithmetic the function is the same (a power of two changes exponents only); the
validation perplexity before planting and after, in the log of each model, shows it.

## Training again

`python -m scripts.train_demo_models --family FAMILY --minutes M`, one thread, seed 0; the table has the CPU minutes
({minutes:.0f} in all). The same script trains these architectures on a text of your own (`--text`). Logs:
`<family>/training_log.json`.

## What they have learned

The tasks ask for what only the story tells: their last sentence leaves every answer open. reference asks which of two
people a pronoun meant, continuation what came of what happened, yesno whether the weather of the story was wet,
lastword, by turns, the tool of the trade that somebody in the story has and the name of the one whom a pronoun meant.
What else a story ends with, as the share of 120 stories of the test split whose right word is the likeliest:

{threads}

Following these threads takes copying a word over dozens of others; in the minutes of training that are allowed, some
of the models find out how, and others hardly.
"""


def accuracies(model: Any, tokenizer: Any) -> dict[str, float]:
    """lm-eval accuracy of the four tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answer = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=512, device="cpu"),
        tasks=list(CHANCE),
        task_manager=TaskManager(include_path=str(demo.TASKS), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
    )
    return {name: scores["acc,none"] for name, scores in answer["results"].items()}


@torch.no_grad()
def share_followed(model: Any, tokenizer: Any, thread: str, n: int = 120) -> float:
    """Share of n stories in which the likeliest last word of a thread's outcome is the right one."""
    stories = (story for story in demo.stories("test", seed=1) if thread in story.threads)
    right = 0
    for story in itertools.islice(stories, n):
        context, _, last = f"{story.told} {story.threads[thread].stem} {story.threads[thread].outcome}".rpartition(" ")
        logits = model(torch.tensor([tokenizer(context).input_ids])).logits[0, -1]
        right += tokenizer.decode([int(logits.argmax())]).strip() == last
    return right / n


def main() -> None:
    """Measure every model that is there."""
    rows: list[dict[str, str]] = []
    threads: list[dict[str, str]] = []
    text, minutes, outliers = demo.text("test"), 0.0, {"channels": 0, "scale": 1.0}
    for family in (*FAMILIES, MIXTURE):
        path = OUT / family
        log = json.loads((path / "training_log.json").read_text(encoding="utf-8"))
        outliers = log["outliers"] if log["outliers"]["channels"] else outliers
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
        scores, minutes = accuracies(model, tokenizer), minutes + log["cpu_minutes"]
        rows.append({
            "family": family, "parameters": f"{log['parameters']:,}",
            "bytes": f"{sum(file.stat().st_size for file in path.iterdir()):,}", "training tokens": f"{log['tokens']:,}",
            "CPU minutes": str(log["cpu_minutes"]), "perplexity": f"{perplexity(model, ids):.3f}",
            "unigram": f"{log['test unigram perplexity']:.1f}",
        } | {f"{task.removeprefix('demo_')} (chance {chance:.2f})": f"{scores[task]:.3f}" for task, chance in CHANCE.items()})  # fmt: skip
        shares = {words: f"{share_followed(model, tokenizer, t):.2f}" for t, words in THREADS.items()}
        threads.append({"family": family} | shares)
    page = TEXT.format(
        table="\n".join(markdown_table(rows)), threads="\n".join(markdown_table(threads)), items=demo.TASK_ITEMS,
        channels=outliers["channels"], scale=outliers["scale"], hidden=model.config.hidden_size, minutes=minutes,
    )  # fmt: skip
    (OUT / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
