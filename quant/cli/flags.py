"""Flags that both command lines share, and what they do with the solvers' own options."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.names import check_name
from quant.core.errors import InputError
from quant.core.names import DTYPES, FORMATS, RUNTIMES
from quant.solvers import check_name as check_method
from quant.solvers import entries

DEFAULT_CACHE = Path.home() / ".cache" / "llm-quantizer"
SOURCES = "wikitext2, ptb, c4, mix, pile, demo, or a .txt/.jsonl/.json.gz/.parquet file"


def add_data_flags(p: argparse.ArgumentParser, seed: int) -> argparse._ArgumentGroup:
    """Calibration and evaluation data; the group, for flags of one command line."""
    g = p.add_argument_group("calibration and evaluation data")
    g.add_argument("--nsamples", type=int, default=128, help="calibration windows (default: 128)")
    g.add_argument("--seqlen", type=int, help="tokens of a window (default: the model's maximum, at most 2048)")
    g.add_argument("--seed", type=int, default=seed, help=f"of the calibration sampling (default: {seed})")
    g.add_argument(
        "--eval-datasets",
        default="wikitext2,ptb,c4",
        metavar="A,B",
        help="names or files; '' for none (default: wikitext2,ptb,c4)",
    )
    g.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="local copies laid out as on the hub: no network needed"
    )
    g.add_argument(
        "--no-fp-eval", action="store_true", help="skip the full-precision model (no ratio, no KL divergence)"
    )
    g.add_argument(
        "--tasks", default="", metavar="A,B", help="lm-eval tasks, and the demo's own demo_*: piqa,arc_easy,..."
    )
    g.add_argument("--task-path", type=Path, metavar="DIR", help="directory of more lm-eval tasks (YAML)")
    g.add_argument(
        "--num_fewshot", type=int, metavar="N", help="examples in front of a task's items (default: the task's)"
    )
    return g


def add_machine_flags(
    p: argparse.ArgumentParser, cache_dir: Path, dtype: str = "the checkpoint's; float32 on a CPU"
) -> argparse._ArgumentGroup:
    """Where and in which arithmetic it runs. dtype: what ``--dtype auto`` means."""
    g = p.add_argument_group("where it runs")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    g.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help=f"of the arithmetic (default: {dtype})",
    )
    g.add_argument(
        "--solver-precision",
        default="highest",
        choices=("highest", "high", "medium"),
        help="of float32 products inside the methods; high: TF32 on a GPU; errors are always measured in full float32",
    )
    g.add_argument(
        "--calib-batch", type=int, default=4, metavar="N", help="windows that pass a block at a time (default: 4)"
    )
    g.add_argument(
        "--activation-store",
        default="cpu",
        choices=("device", "cpu", "disk"),
        help="where hidden states wait (default: cpu)",
    )
    g.add_argument(
        "--cache-dir",
        type=Path,
        default=cache_dir,
        metavar="DIR",
        help=f"tokens and converted checkpoints (default: {cache_dir})",
    )
    g.add_argument("--deterministic", action="store_true", help="CUDA: only deterministic algorithms (a CPU always is)")
    g.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model (off by default)"
    )
    return g


def add_result_flags(p: argparse.ArgumentParser, runs: str) -> argparse._ArgumentGroup:
    """What is written, and the flags that only show something."""
    g = p.add_argument_group("results")
    g.add_argument(
        "--format",
        choices=FORMATS,
        help=f"of the checkpoint: {', '.join(FORMATS)} (default: dequantized)",
        metavar="NAME",
    )
    g.add_argument(
        "--target",
        choices=RUNTIMES,
        metavar="NAME",
        help=f"refuse before work begins what {', '.join(RUNTIMES)} cannot load (--dry-run shows all of them)",
    )
    g.add_argument(
        "--run-dir", type=Path, metavar="DIR", help=f"journal, blocks, results (default: a name under {runs})"
    )
    g.add_argument(
        "--overwrite", action="store_true", help="discard what the run directory holds (default: continue it)"
    )
    g.add_argument(
        "--compute-quantization-recon-error", action="store_true", help="print the relative error of every linear"
    )
    g.add_argument(
        "--real_quant",
        action="store_true",
        help="evaluate with the weights packed in memory, and pack the checkpoint (without --format: the first that can "
        "hold it of gptq, gptq_v2 where asymmetric, compressed-tensors, bitplane)",
    )
    g.add_argument("--no-report", action="store_true", help="do not write report.html, report.csv and its pictures")
    g.add_argument("--dry-run", action="store_true", help="plan, memory, time and size; nothing is run")
    g.add_argument("--list", action="store_true", help="methods with their options, families, formats, data sets")
    g.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    return g


def solver_flags(g: argparse._ArgumentGroup) -> Callable[..., None]:
    """The group's ``add_argument`` for flags that are options of solvers: ``solver_flags`` in the arguments names them.

    Only these reach a solver; any other flag may have the name of an option by chance.
    """

    def add_option(*names: str, **kept: Any) -> None:
        action = g.add_argument(*names, **kept)
        g.set_defaults(solver_flags=(*(g.get_default("solver_flags") or ()), action.dest))

    return add_option


def place_mistakes(args: argparse.Namespace) -> list[str]:
    """What is wrong with --model and --device before anything is opened."""
    lines: list[str] = []
    for check, given in ((check_name, args.model), (check_device, args.device)):
        try:
            if given:
                check(given)
        except InputError as error:
            lines += error.args
    return lines


def check_device(name: str) -> None:
    """Raise InputError, as `quant.core.env.pick_device` does, for a device that is not there; torch is asked for CUDA only."""
    if re.fullmatch(r"auto|cpu", name):
        return
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    from quant.core.env import pick_device

    pick_device(name)


def unused_options(args: argparse.Namespace, parser: argparse.ArgumentParser, methods: Sequence[str]) -> list[str]:
    """A line for every flag of a method's option that was given, where none of the methods has that option."""
    known = {name: entry.options or {} for name, entry in entries().items()}
    taken = {option for method in methods for option in known.get(method, {})}
    given = [
        option
        for option in dict.fromkeys(option for options in known.values() for option in options)
        if option not in taken and option in args.solver_flags and getattr(args, option) != parser.get_default(option)
    ]
    return [
        f"--{option.replace('_', '-')} is an option of {', '.join(n for n, o in known.items() if option in o)}, "
        f"not of {', '.join(methods)}"
        for option in given
    ]


def method_mistakes(args: argparse.Namespace, methods: Sequence[str], flag: str = "") -> list[str]:
    """What is wrong with the names of the methods, said after the flag that names them, and with --solver-option."""
    lines: list[str] = []
    for method in methods:
        try:
            check_method(method)
        except InputError as error:
            lines.append(f"{flag}{error}")
            continue
        try:
            options_of(args, method)
        except InputError as error:
            lines += error.args
    return lines


def options_of(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The options that the method's function names, from the flags of `solver_flags` and from --solver-option."""
    accepted = entries()[method].options or {}
    options = {name: getattr(args, name) for name in accepted if name in args.solver_flags}
    for pair in args.solver_option:
        key, equals, value = pair.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in accepted:
            raise InputError(
                f"--solver-option {pair}: {method} takes {', '.join(accepted) or 'no options'} as KEY=VALUE"
            )
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
        if accepted[key] is not None and not isinstance(options[key], type(accepted[key])):
            raise InputError(f"--solver-option {pair}: {key} is a {type(accepted[key]).__name__}")
    return options
