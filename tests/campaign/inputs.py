"""Parts of the campaign in which one command runs over something bad: command lines, models, data, tables, runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from tests.campaign import lines
from tests.campaign.mutations import bytes_of, header_of, json_of, pickle_of, tensor_of, thing_of, yaml_of
from tests.campaign.processes import call
from tests.campaign.stock import LEARNER, QUANTIZER, SCALES, Stock
from tests.campaign.verdicts import contents, difference, faults_of

Answer = tuple[str, str, list[str]]  # what was damaged and how it ended, the command, faults
Damage = Callable[[Random, Path], str]
OF_MODELS = (QUANTIZER, LEARNER, SCALES, "evaluate", "generate", "sweep")
OF_SAVED = ("generate saved", "evaluate saved", "convert saved", "quantize saved")
OF_RUNS = ("report", "compare", "repeat", "convert", "generate run", "resume", "again")


def judged(
    words: Sequence[object], folder: Path, about: str, codes: Sequence[int] = (0, 1, 2), most: int = 1
) -> Answer:
    """Run a command; its inputs stay as they are, and so does what lay where it writes."""
    inputs, before = contents(folder / "in"), contents(folder / "out")
    outcome = call(words, folder)
    after = contents(folder / "out")
    faults = faults_of(outcome, codes, most) + difference(inputs, contents(folder / "in"))
    faults += difference(before, {name: after[name] for name in after.keys() & before.keys()})
    if left := contents(folder / "tmp"):
        faults.append(f"left over: tmp/{next(iter(left))}")
    return f"{about}: {outcome.code}", lines.shown(outcome.words), faults


def copied(stock: Stock, name: str, folder: Path) -> Path:
    """A copy of something of the stock, to be damaged."""
    target = folder / "in" / Path(name).name
    (shutil.copytree if (stock / name).is_dir() else shutil.copy)(stock / name, target)
    return target


def flags(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """One bad flag."""
    line = lines.one_flag(rng, stock, folder)
    return judged(line.words, folder, line.about, line.codes, line.most)


def conflicts(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Several flags at once."""
    line = lines.several_flags(rng, stock, folder)
    return judged(line.words, folder, line.about, line.codes, line.most)


def config(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged config.json and its like, of a model or of a quantized checkpoint."""
    saved = rng.random() < 0.35
    source = (
        rng.choice(["saved/gptq", "saved/rtn", "saved/gptq_quantease", "saved/quantease", "saved/static"])
        if saved
        else "model"
    )
    model = copied(stock, source, folder)
    if saved and rng.random() < 0.7:  # what a results.json says of the file would hide what is behind it
        (model / "results.json").unlink()
    names = (
        ["config.json"] * 4
        + ["generation_config.json"]
        + (["results.json"] if (model / "results.json").exists() else [])
    )
    damage = rng.choices([json_of, bytes_of, thing_of], [8, 2, 1])[0]
    about = damage(rng, model / rng.choice(names))
    return judged(words_over(rng, stock, folder, model, saved), folder, f"{source}: {about}")


def tokenizer(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged tokenizer files."""
    model = copied(stock, "model", folder)
    name = rng.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    about = rng.choices([json_of, bytes_of, thing_of], [8, 2, 1])[0](rng, model / name)
    return judged(words_over(rng, stock, folder, model, False), folder, about)


def tensors(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged tensors, headers, shards, indexes and .bin files."""
    source = rng.choice(
        ["model", "model", "sharded", "bin", "saved/gptq", "saved/gptq_quantease", "saved/quantease", "saved/static"]
    )
    model = copied(stock, source, folder)
    if "saved" in source and rng.random() < 0.7:
        (model / "results.json").unlink()
    files = sorted(file for file in model.iterdir() if file.suffix in (".safetensors", ".bin"))
    of_file: list[Damage] = (
        [pickle_of, bytes_of, thing_of] if source == "bin" else [tensor_of, header_of, bytes_of, thing_of]
    )
    if source == "sharded" and rng.random() < 0.5:
        about = rng.choice([json_of, json_of, bytes_of, thing_of])(rng, model / "model.safetensors.index.json")
    else:
        about = rng.choices(of_file, [6, 4, 2, 1][: len(of_file)])[0](rng, rng.choice(files))
    return judged(words_over(rng, stock, folder, model, "saved" in source), folder, f"{source}: {about}")


def words_over(rng: Random, stock: Stock, folder: Path, model: Path, saved: bool) -> list[object]:
    """A command that opens a model."""
    if saved:
        return stock.right(rng.choice(OF_SAVED), folder, saved=model)
    command = rng.choice(OF_MODELS)
    table = folder / "in" / "table.yaml"
    table.write_text((stock / "table.yaml").read_text().replace(str(stock / "model"), str(model)))
    return stock.right(command, folder, **({"table": table} if command == "sweep" else {"model": model}))


def data(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged texts, rows and task files."""
    if rng.random() < 0.3:
        tasks = copied(stock, "tasks", folder)
        name = rng.choice(["mine.yaml", "mine.yaml", "rows.jsonl"])
        of_file: list[Damage] = [yaml_of, bytes_of, thing_of] if name == "mine.yaml" else [json_of, bytes_of, thing_of]
        about = rng.choices(of_file, [6, 2, 1])[0](rng, tasks / name)
        (tasks / "mine.yaml").is_file() and _point(tasks / "mine.yaml", stock / "tasks", tasks)
        return judged(stock.right("tasks", folder, tasks=tasks), folder, about)
    text = copied(stock, rng.choice(["text.txt", "rows.jsonl", "rows.json.gz", "rows.parquet"]), folder)
    damages: list[Damage] = [json_of, bytes_of, thing_of] if text.suffix == ".jsonl" else [bytes_of, bytes_of, thing_of]
    about = rng.choices(damages, [4, 4, 1])[0](rng, text)
    return judged(
        stock.right(rng.choice([QUANTIZER, LEARNER, SCALES, "evaluate", "calibrate"]), folder, text=text), folder, about
    )


def _point(path: Path, old: Path, new: Path) -> None:
    path.write_bytes(path.read_bytes().replace(str(old).encode(), str(new).encode()))


def tables(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged tables of sweeps."""
    table = copied(stock, rng.choice(["table.yaml", "table.yaml", "table.tsv"]), folder)
    about = rng.choices([yaml_of, bytes_of, thing_of], [8, 2, 1])[0](rng, table)
    words = stock.right("sweep", folder, table=table) + (["--dry-run"] if rng.random() < 0.7 else [])
    return judged(words, folder, about)


def runs(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Damaged run directories, over everything that opens one."""
    command = rng.choice(OF_RUNS)
    name = "learned" if command == "resume" else rng.choice(["gptq", "rtn", "quantease", "spqr", "learned"])
    run = copied(stock, f"runs/{name}", folder / "out" if command == "again" else folder)
    file = run / rng.choice(
        ["manifest.json", "manifest.json", "results.json", "results.json", "journal.jsonl", "blocks/00001.safetensors"]
    )
    of_file: list[Damage] = [json_of, bytes_of, thing_of]
    if file.suffix == ".safetensors":
        of_file = [rng.choice([header_of, tensor_of]), bytes_of, thing_of]
    about = rng.choices(of_file, [8, 2, 1])[0](rng, file)
    if command == "again":  # the run's own command
        run.rename(folder / "out" / "run")
        words = stock.run_words(name, folder, save=rng.random() < 0.5)
        outcome = call(words, folder)
        return f"{name}: {about}: {outcome.code}", lines.shown(outcome.words), faults_of(outcome)
    return judged(stock.right(command, folder, run=run, learned=run), folder, f"{name}: {about}")
