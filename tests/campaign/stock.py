"""The files that campaigns damage, made once by the commands themselves, and a right command line for every command."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from tests.campaign.processes import call
from tests.conftest import LOCAL_TASK, build, save_tokenizer, write_text

TINY = ["--seqlen", 16, "--nsamples", 2, "--no-report"]
QUANTIZER, LEARNER, SCALES = "model_quantizer.py", "main.py", "generate_act_scale_shift.py"
MAKES = {  # runs by name: what is asked for besides the model and the data
    "rtn": [QUANTIZER, "--quantization-method", "rtn", "--wbits", 4, "--group-size", 16, "--sym", "--format", "gptq"],
    "gptq": [QUANTIZER, "--quantization-method", "gptq", "--wbits", 3, "--true-sequential", "--format", "gptq_v2"],
    "quantease": [QUANTIZER, "--quantization-method", "quantease", "--wbits", 3, "--num-iter", 3, "--outlier", 0.02,
                  "--format", "bitplane"],
    "spqr": [QUANTIZER, "--quantization-method", "spqr", "--wbits", 3, "--group-size", 16, "--outlier", 0.5, "--format",
             "bitplane"],
    "gptq_quantease": [QUANTIZER, "--quantization-method", "gptq_quantease", "--wbits", 4, "--sym", "--group-size", 32,
                       "--num-iter", 2, "--format", "compressed-tensors"],
    "learned": [LEARNER, "--wbits", 3, "--lwc", "--let", "--epochs", 1, "--eval_ppl"],
    "static": [LEARNER, "--wbits", 4, "--abits", 8, "--a_dynamic_method", "static", "--epochs", 0, "--eval_ppl",
               "--activation-store", "disk", "--format", "bitplane"],
}  # fmt: skip
WRITERS = (*MAKES, "convert", "sweep", SCALES, "evaluate", "report", "repeat")  # commands that must survive anything


@dataclass(frozen=True)
class Stock:
    """Where things are: models, texts, tasks and a table; runs and checkpoints of MAKES under ``runs`` and ``saved``."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def words_of(self, name: str, folder: Path) -> list[object]:
        """The command of one of WRITERS."""
        return self.run_words(name, folder) if name in MAKES else self.right(name, folder)

    def run_words(self, name: str, folder: Path, save: bool = True) -> list[object]:
        """The command of a run of MAKES, writing below ``folder``."""
        command, *flags = MAKES[name]
        words = [command, "--model", self / "model", "--dataset", self / "text.txt", "--eval-datasets", self / "text.txt",
                 "--limit", 4, *TINY, *flags, "--run-dir", folder / "out/run", "--cache-dir", folder / "out/cache"]  # fmt: skip
        return words + (["--save_dir" if command == LEARNER else "--save", folder / "out/saved"] if save else [])

    def right(self, command: str, folder: Path, **other: object) -> list[object]:
        """A right command line. other: places instead of the stock's: model, text, run, learned, saved, table, tasks."""
        at = {"model": self / "model", "text": self / "text.txt", "run": self / "runs/gptq", "saved": self / "saved/gptq",
              "table": self / "table.yaml", "tasks": self / "tasks", "learned": self / "runs/learned"} | other  # fmt: skip
        cache = ["--cache-dir", folder / "out/cache"]
        sizes = ["--seqlen", 16, "--nsamples", 2]
        run = ["--model", at["model"], "--dataset", at["text"], "--eval-datasets", at["text"], "--limit", 2, *TINY,
               "--run-dir", folder / "out/run", *cache]  # fmt: skip
        quantize = [QUANTIZER, *run, "--wbits", 3, "--quantization-method", "rtn"]
        lines: dict[str, list[object]] = {
            QUANTIZER: quantize,
            LEARNER: [LEARNER, *run, "--wbits", 4, "--lwc", "--epochs", 1, "--eval_ppl"],
            SCALES: [SCALES, "--model", at["model"], "--dataset", at["text"], "--num-samples", 2, "--seq-len", 16, *cache,
                     "--scales-output-path", folder / "out/scales", "--shifts-output-path", folder / "out/shifts"],
            "evaluate": ["evaluate", "--model", at["model"], "--eval-datasets", at["text"], *sizes, "--limit", 2, *cache,
                         "--out", folder / "out/numbers.json"],
            "generate": ["generate", "--model", at["model"], "--prompt", "abc", "--max-new-tokens", 2, *cache],
            "report": ["report", at["run"], "--out", folder / "out/page"],
            "repeat": ["repeat", at["run"], "--allow-paths", "--into", folder / "out/again", *cache],
            "convert": ["convert", at["run"], "--to", "bitplane", "--out", folder / "out/converted", *cache],
            "sweep": ["sweep", at["table"], "--out", folder / "out/sweep", "--allow-paths",
                      "--flags=--cache-dir ../out/cache"],
            "compare": ["report", "compare", self / "runs/gptq", at["run"]],
            "generate run": ["generate", "--model", at["run"], "--prompt", "abc", "--max-new-tokens", 2, *cache],
            "generate saved": ["generate", "--model", at["saved"], "--prompt", "abc", "--max-new-tokens", 2, *cache],
            "evaluate saved": ["evaluate", "--model", at["saved"], "--eval-datasets", at["text"], *sizes, "--limit", 2,
                               *cache, "--real_quant"],
            "convert saved": ["convert", at["saved"], "--to", "bitplane", "--out", folder / "out/converted", *cache],
            "quantize saved": [QUANTIZER, "--model", at["saved"], *run[2:], "--wbits", 16],
            "resume": [*MAKES["learned"][:1], *run, *MAKES["learned"][1:], "--epochs", 0, "--resume", at["learned"]],
            "tasks": [*quantize, "--tasks", "mine", "--task-path", at["tasks"]],
            "calibrate": [QUANTIZER, "--model", at["model"], "--dataset", at["text"], "--eval-datasets", "", *TINY,
                          "--run-dir", folder / "out/run", *cache, "--wbits", 3, "--quantization-method", "rtn"],
        }  # fmt: skip
        return lines[command]


def make(stock: Stock) -> None:
    """Write models, texts, tasks and tables."""
    disable_progress_bar()
    stock.path.mkdir(parents=True)
    model = build("llama")
    for name, size in (("model", "5GB"), ("sharded", "40KB")):
        model.save_pretrained(stock / name, max_shard_size=size)
        save_tokenizer(stock / name)
    _bin(stock / "model", stock / "bin")
    words = write_text(stock / "text.txt").read_text().split()
    rows = [json.dumps({"text": " ".join(words[i : i + 300])}) for i in range(0, len(words), 300)]
    (stock / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with gzip.open(stock / "rows.json.gz", "wt") as stream:
        stream.write("\n".join(rows) + "\n")
    _parquet([json.loads(row)["text"] for row in rows], stock / "rows.parquet")
    _tasks(stock / "tasks")
    table = {"fixed": {"model": str(stock / "model"), "dataset": str(stock / "text.txt"), "eval-datasets": str(stock / "text.txt"),
                       "limit": 2, "seqlen": 16, "nsamples": 2, "wbits": 3, "group-size": 16}, "grid": {"quantization-method": ["rtn"]},
             "rows": [{"quantization-method": "gptq", "seed": 1}]}  # fmt: skip
    (stock / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    flags = table["fixed"] | {"quantization-method": "rtn"}
    (stock / "table.tsv").write_text("\t".join(flags) + "\n" + "\t".join(map(str, flags.values())) + "\n")


def run_all(stock: Stock) -> None:
    """What WRITERS leave, with how many changes of the file system it took, and how long; MAKES' is stock for others."""
    events = {}
    for name in WRITERS:
        folder = stock / f"made/{name}"
        folder.mkdir(parents=True)
        outcome = call(stock.words_of(name, folder), folder)
        if outcome.code:
            raise RuntimeError(f"{name}: {outcome.words}: {outcome.code} {outcome.err}")
        events[name] = [outcome.events, outcome.seconds]
        for kind, at in (("runs", "run"), ("saved", "saved")) if name in MAKES else ():
            (stock / kind).mkdir(exist_ok=True)
            shutil.copytree(folder / "out" / at, stock / kind / name)
    (stock / "events.json").write_text(json.dumps(events))


def _bin(model: Path, target: Path) -> None:
    import torch

    target.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, target)
    torch.save(load_file(model / "model.safetensors"), target / "pytorch_model.bin")


def _parquet(texts: list[str], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def _tasks(folder: Path) -> None:
    folder.mkdir()
    rows = [{"question": f"a{i}", "choices": [" b", " c", " d"], "label": i % 3} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(LOCAL_TASK.format(name="mine", file=folder / "rows.jsonl"))


def try_all(stock: Stock, folder: Path) -> None:
    """What a process imports for the commands. Raises RuntimeError where one does not end well."""
    import contextlib
    import importlib
    import io
    import os
    import sys

    from quant.cli.errors import exit_code_of
    from tests.campaign.processes import COMMANDS

    for command in (QUANTIZER, LEARNER, "evaluate", "generate", "sweep"):
        own, said = folder / command, io.StringIO()
        own.mkdir(parents=True)
        os.chdir(own)
        sys.argv = [str(word) for word in stock.right(command, own)]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = exit_code_of(importlib.import_module(COMMANDS[command]).main)
        if code:
            raise RuntimeError(said.getvalue())
