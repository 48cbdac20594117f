"""The command line as a person meets it: help, lists, plans, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import model_quantizer
from quant.cli import arguments, evaluate, flags, generate
from quant.cli import console as terminal
from quant.cli.commands import COMMANDS
from quant.cli.errors import exit_code_of
from quant.core.errors import InputError
from quant.core.files import RECORD
from quant.solvers import entries, get_solver, solver_options, solvers
from tests.helpers import called, replace

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """model_quantizer.py in this process."""
    return partial(called, model_quantizer, monkeypatch, capsys, "--no-report", "--cache-dir", tmp_path / "cache")


@pytest.fixture
def small(small, text):
    """Flags of a small run."""
    return [*small, "--dataset", text, "--num-iter", 2, "--wbits", 3]


def test_the_main_job_prints_one_table(command, small, tmp_path):
    code, out, err = command(*small, "--quantization-method", "rtn,gptq,quantease", "--save", tmp_path / "saved")
    assert code == 0 and "error" not in err
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["rtn"], ["gptq"], ["quantease"])]
    rows = [row for row in rows if len(row) == 10]
    assert [row[0] for row in rows] == ["rtn", "gptq", "quantease"]
    for row in rows:
        results = json.loads((tmp_path / "run" / row[0] / "results.json").read_text())
        assert float(row[1]) == pytest.approx(results["bits_per_weight"], abs=1e-3)
        assert float(row[2]) == pytest.approx(results["model_bits_per_weight"], abs=1e-3)
        assert float(row[5]) == pytest.approx(results["perplexity"]["words"]["quantized"], abs=1e-3)
        assert float(row[8]) == pytest.approx(results["mean_relative_error"], abs=1e-4)
        assert (tmp_path / "saved" / row[0] / "model.safetensors").exists()


def test_layers_are_compared_from_one_stream(command, small, tmp_path):
    methods = ["rtn", "gptq", "gptq_quantease", "quantease", "spqr"]
    code, out, _ = command(*small, "--quantization-method", ",".join(methods), "--compare-layers")
    assert code == 0 and "layer by layer" in out
    records = json.loads((tmp_path / "run" / "layers.json").read_text())
    assert {r["method"] for r in records} == set(methods)
    by_linear = {}
    for r in records:
        by_linear.setdefault((r["block"], r["name"]), []).append(r)
    assert len(by_linear) == 3 * 7
    for same in by_linear.values():
        assert len({r["relative_error_rtn"] for r in same}) == 1, "one set of statistics for all methods"
        assert len({r["n_tokens"] for r in same}) == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [RECORD, "layers.json"]


def test_outliers_and_spqr_from_the_command_line(command, small, tmp_path):
    code, _, _ = command(*small, "--outlier", 0.01, "--save", tmp_path / "saved")
    assert code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 3.32 < results["bits_per_weight"] < 5 and results["fidelity"]["words"]["kl_divergence"] > 0
    code, _, _ = command(*small, "--quantization-method", "spqr", "--outlier", 0.2, "--group-size", 16,
                         "--run-dir", tmp_path / "spqr")  # fmt: skip
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "spqr" / "journal.jsonl").open()]
    assert all("outlier_fraction" in line["info"] for line in lines)


def test_every_linear_is_listed_on_request(command, small):
    code, out, _ = command(*small, "--quantization-method", "rtn", "--compute-quantization-recon-error")
    assert code == 0 and out.count("mlp.down_proj") == 3


def test_spellings_of_a_flag_are_equal():
    parsed = [
        model_quantizer.parser().parse_args([flag, "64", "--true_sequential", f"{flag}=32"])
        for flag in ("--group-size", "--group_size", "--groupsize")
    ]
    assert all(p.groupsize == 32 and p.true_sequential for p in parsed)


def test_defaults_are_those_of_the_original():
    args = vars(model_quantizer.parser().parse_args([]))
    expected = {
        "dataset": "c4", "seed": 0, "nsamples": 128, "wbits": 16, "groupsize": -1, "sym": False, "num_iter": 30,
        "outlier": 0, "alpha": 1, "structure_outlier": False, "true_sequential": False,
        "quantization_method": "quantease", "num_layers_to_quantize": 1000, "act_order": False,
        "static_groups": False, "compute_quantization_recon_error": False, "percdamp": 0.01,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


def test_flags_of_solvers_are_declared_as_such():
    """A flag that was forgotten would be taken without a word and change nothing."""
    args = model_quantizer.parser().parse_args([])
    named = {option for function in solvers().values() for option in solver_options(function)}
    assert named & vars(args).keys() == set(args.solver_flags) and len(args.solver_flags) == 12


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rtn,autoround"], [None, {}]),
        (
            ["autoround", "--tune", "window:2", "--tune-iterations", "9", "--tune-last", "lm"],
            [{"scope": "window", "window": 2, "iterations": 9, "last": "lm"}],
        ),
        (
            ["rtn", "--tune", "block", "--tune-norms", "--tune-optimizer", "sign"],
            [{"norms": True, "optimizer": "sign"}],
        ),
        (
            ["rtn,autoround", "--tune", "window:12", "--tune-state", "half", "--tune-optimizer", "adam"],
            [
                {"scope": "window", "window": 12, "state": "half"},
                {"scope": "window", "window": 12, "state": "half", "optimizer": "adam"},
            ],
        ),
    ],
)
def test_flags_say_how_answers_are_tuned(words, expected):
    from quant.tune.config import AUTOROUND_TUNING, Tuning

    flags = ["--model", str(ROOT / "models/demo/llama"), "--wbits", "3", "--dataset", "demo", "--eval-datasets", "demo"]
    args = model_quantizer.parser().parse_args([*flags, "--quantization-method", *words])
    model_quantizer.prepare(args)
    runs = [request.run for request in model_quantizer.requests_of(args)]
    usual = {"rtn": Tuning(), "autoround": AUTOROUND_TUNING}
    for run, method, fields in zip(runs, words[0].split(","), expected, strict=True):
        assert (run.solver, run.method) == ("rtn", method)
        assert run.tuning == (None if fields is None else dataclasses.replace(usual[method], **fields))


def test_table_of_flags_sets_what_there_is():
    """Fields are those of the classes that are made of them, set once a command line; defaults of solvers are theirs."""
    from quant.blocks.fake_quant import ActSpec
    from quant.learn.config import Learning, Rotation, TransformSpec
    from quant.run.config import Output, RunConfig, SessionConfig
    from quant.tune.config import Tuning

    parts = {
        "": (SessionConfig, RunConfig, Output),
        "learning": (Learning,),
        "transform": (TransformSpec,),
        "act": (ActSpec,),
        "tuning": (Tuning,),
        "rotation": (Rotation,),
    }
    for where in {name for flag in flags.TABLE for name in flag.names}:
        declared = arguments.flags_of(where)
        names = [name for flag in declared for name in flag.names[where].split()]
        set_fields = [flag.field for flag in declared if flag.field not in (None, flags.OPTIONS)]
        assert len(names) == len(set(names)) and len(set_fields) == len(set(set_fields)), where
        for field in set_fields:
            part, _, name = field.rpartition(".")
            assert sum(name in kind.__dataclass_fields__ for kind in parts[part]) == 1, field
    defaults = {option: value for entry in entries().values() for option, value in entry.options.items()}
    options = [flag for flag in flags.TABLE if flag.field == flags.OPTIONS]
    for flag in options:
        for where in flag.names:
            assert (flag.of(where, "default") or False) == defaults[flag.dest(where)], flag.names


def test_messages_of_a_run_name_the_flags_that_were_given():
    line = "--seqlen 64 with --nsamples 3: --dataset x (not --data-dir or --seqlen-2)"
    assert arguments.in_words_of(flags.QUANTIZER, line) == line
    assert arguments.in_words_of(flags.SCALES, line) == (
        "--seq-len 64 with --num-samples 3: --calib_dataset x (not --data-dir or --seqlen-2)"
    )


def test_help_teaches(command):
    code, out, _ = command("--help")
    assert code == 0 and "examples:" in out and "models/demo/llama" in out and "Exit codes" in out


@pytest.mark.parametrize(
    "words",
    [
        "model_quantizer.py --help",
        "model_quantizer.py --no-such-flag",
        "model_quantizer.py --model models/demo/llama --wbits 11 --quantization-method gtpq --eval-datasets no.txt",
        "model_quantizer.py --model models/demo/llama --wbits 3 --dataset demo --solver-option steps=3 --device gpu",
        "main.py --help",
        "main.py --no-such-flag",
        "main.py --model /no/such --lwc --solver gptqq --calib_dataset wikitext3",
        "generate_act_scale_shift.py --help",
        "generate_act_scale_shift.py --model models/demo/llama --num-samples 0",
        "-m quant --help",
        "-m quant no-such-command",
        *(f"-m quant {command} --help" for command in COMMANDS),
        *(f"-m quant {command} --no-such-flag" for command in COMMANDS),
        "-m quant evaluate --model x --limit 0",
        "-m quant generate --model x --prompt y --max-new-tokens 0",
        "-m quant repeat no/such/run",
    ],
)
def test_help_and_mistakes_wait_for_no_library(words):
    """Nothing heavy is imported before work begins."""
    listing = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules, file=sys.stderr)); "
    start = "import runpy; sys.path.insert(0, ''); sys.argv = {argv!r}; runpy.{run}({name!r}, run_name='__main__')"
    first, *rest = words.split()
    program = (
        start.format(argv=rest, run="run_module", name=rest[0])
        if first == "-m"
        else start.format(argv=[first, *rest], run="run_path", name=first)
    )
    done = subprocess.run(
        [sys.executable, "-c", listing + program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said, _, names = done.stderr.partition("MODULES")
    assert done.returncode == (0 if "--help" in words else 2) and "Traceback" not in said, said
    assert said.startswith("error: ") == ("--help" not in words)
    assert names and not {"torch", "transformers", "rich", "numba", "datasets"} & set(names.split())


def test_names_that_are_known_early_are_those_of_the_rooms():
    from quant.core import env, names
    from quant.export import HOLDERS
    from quant.export.runtimes import RULES
    from quant.learn import recipe_entries, recipes

    assert (names.DEQUANTIZED, *HOLDERS) == names.FORMATS and set(names.RUNTIMES) == {rule.runtime for rule in RULES}
    assert [str(env.pick_dtype(name, env.pick_device("cpu"))) for name in names.DTYPES] == [
        f"torch.{n}" for n in names.DTYPES
    ]
    assert {name: solver_options(f) for name, f in solvers().items()} == {n: e.options for n, e in entries().items()}
    assert list(recipe_entries()) == list(recipes())


def test_list_names_methods_families_and_data(command):
    code, out, _ = command("--list")
    assert code == 0
    for word in ("rtn", "gptq", "quantease", "percdamp=0.01", "falcon", "gemma2", "dequantized", "wikitext2"):
        assert word in out


@pytest.mark.parametrize("name", ["llama-2-7b", "opt-66b", "falcon-180b"])
def test_dry_run_needs_a_configuration_only(name, command, tmp_path, monkeypatch):
    code, out, _ = command(
        "--model", f"benchmarks/configs/{name}", "--wbits", 3, "--dry-run", "--eval-datasets", "wikitext2",
        "--quantization-method", "rtn,quantease", "--num-iter", 1,
    )  # fmt: skip
    assert code == 0 and "nothing is run" in out and "bits per weight" in out
    parameters = {"llama-2-7b": "6.74B", "opt-66b": "65.72B", "falcon-180b": "178.5"}[name]
    assert parameters in out
    assert not (tmp_path / "cache").exists()


def test_dry_run_sizes_are_right(tmp_path):
    """LLaMA-2-7B: one block has 202 million parameters; 32 blocks of codes at 3 bits are 2.43 GB."""
    from models.load import load_config
    from quant.run.calibration import HELDOUT
    from quant.run.plan import estimate
    from quant.run.rates import Rates, SolverCost
    from quant.run.request import Request
    from quant.run.shapes import shapes_of

    config, _ = load_config("benchmarks/configs/llama-2-7b", tmp_path, with_weights=False)
    shapes = shapes_of(config)
    assert shapes.block == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 and shapes.n_blocks == 32
    plan = estimate(Request.of("x", wbits=3, num_layers=32), shapes, 2, Rates(1e12, 1e12), SolverCost(square=1e-9))
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    assert plan["device bytes: block"] == 2 * shapes.block
    assert plan["device bytes: statistics"] == 4 * (3 * 4096**2 + 11008**2)
    assert plan["disk bytes: run directory"] == 32 * weights
    assert plan["quantized bytes"] == pytest.approx(32 * weights * 3 / 8, rel=0.01)
    assert plan["seconds: gram"] == pytest.approx(
        32 * 128 * 2048 * (3 * 4096**2 * (1 + 1 / 8) + 11008**2 * (1 + 1 / 22)) / 1e12
    )
    evaluated = {
        "eval_datasets": ("wikitext2",),
        "limit": 5,
        "seqlen": 2048,
        "num_layers": 32,
        "wbits": 3,
        "calib_batch": 1,
    }
    limited = estimate(Request.of("x", **evaluated), shapes, 2, Rates(1e12, 1e12), SolverCost(square=1e-9))
    seen = (2048 + 128) / 2  # keys that a token sees, by tiles of queries
    attention = 32 * 4 * seen * 4096
    expected = 5 * 2048 * 2 * (2 * (shapes.outside + 32 * shapes.block) + attention) / 1e12
    assert limited["seconds: evaluate"] == pytest.approx(expected)
    assert limited["device bytes: peak"] >= 2 * shapes.outside + 5 * 4 * 2048 * 32000  # a window's logits, five times
    rows = {4096: 4 * 4096 + 2 * 11008, 11008: 4096}
    assert plan["seconds: forward"] == pytest.approx(
        32 * (128 + HELDOUT) * 2048 * 2 * (2 * shapes.block + 4 * seen * 4096) / 1e12
    )
    assert plan["seconds: solve"] == pytest.approx(32e-9 * sum(out * n**2 for n, out in rows.items()))
    energies = sum(3 * out * n * (1.125 * n + 2 * 512) for n, out in rows.items())
    assert plan["seconds: measure"] == pytest.approx(32 * energies / 1e12)


def test_a_plan_knows_the_size_of_a_file_and_of_the_process(tmp_path):
    """A quarter of a file's bytes are tokens; a process on a CPU has the libraries, what a device would hold, hidden states and
    the pages of the checkpoint; linears are multiplied once where there is room for what they write, and attention is computed twice."""
    from models.load import load_config
    from quant.run import plan as plans
    from quant.run import plan_calibration
    from quant.run.calibration import HELDOUT
    from quant.run.rates import Rates, SolverCost
    from quant.run.request import Request
    from quant.run.shapes import shapes_of

    shapes = shapes_of(load_config("benchmarks/configs/llama-2-7b", tmp_path, with_weights=False)[0])
    file = tmp_path / "notes.txt"
    file.write_text("x" * 4000)
    asked = {"wbits": 3, "seqlen": 128, "num_layers": 32, "nsamples": 8, "true_sequential": True}
    made = plans.estimate(
        Request.of("x", eval_datasets=(str(file),), **asked), shapes, 4, Rates(1e12, 1e12), SolverCost()
    )
    both = 2 * 1000
    attention = 4 * 128 * 4096
    expected = both * (2 * (shapes.outside + 32 * shapes.block) + 32 * attention) / 1e12
    assert made["seconds: evaluate"] == pytest.approx(expected)
    whole = plans.with_process(made, shapes, 2, 10**9)
    parts = made["device bytes: peak"] + made["host bytes: hidden states"] + 2 * shapes.parameters
    assert whole["host bytes: process"] == 10**9 + parts
    assert {key: value for key, value in whole.items() if key != "host bytes: process"} == made
    tokens = 1024 + 128 * HELDOUT
    assert made["seconds: forward"] == pytest.approx(32 * tokens * (2 * shapes.block + 2 * attention) / 1e12)
    slow = plans.estimate(Request.of("x", **asked), shapes, 4, Rates(1e12, 1e12, 1e9), SolverCost())
    between = 4 * (plan_calibration.OF_HIDDEN * 4096 + plan_calibration.OF_WIDEST * 11008) / 1e9
    assert slow["seconds: forward"] - made["seconds: forward"] == pytest.approx(32 * tokens * 4 * between)


def test_phases_of_a_solver_do_not_add_up():
    """Falcon-180B's down projection with GPTQ: its factorization and its sweep are not at their peaks together."""
    from quant.run.config import RunConfig
    from quant.run.plan import solver_bytes

    out, n_in = 14848, 59392
    a, g = 4 * out * n_in, 4 * n_in**2
    gptq = RunConfig(solver="gptq", wbits=3, options={"percdamp": 0.01, "act_order": False})
    assert solver_bytes(gptq, out, n_in) == a + 2 * g
    assert solver_bytes(gptq, n_in, out) == max(3.25 * a + 4 * out**2, a + 2 * 4 * out**2)
    assert solver_bytes(RunConfig(wbits=3, options={"num_iter": 30}), out, n_in) == 5 * a


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease", "gptq_quantease", "spqr"])
def test_memory_is_planned_for_the_solver_whatever_options_were_given(method):
    """Options without a flag, as spqr's scale_bits, are options all the same; so is one that was left out."""
    from quant.run.plan import solver_bytes

    words = ["--model", "x", "--wbits", "3", "--dataset", "demo", "--quantization-method", method]
    config = model_quantizer.request_from(words).run
    whole = replace(config, options=solver_options(get_solver(method)))
    bare = replace(config, options={}, learner="omniquant", solver=method)
    assert solver_bytes(config, 512, 256) == solver_bytes(whole, 512, 256) == solver_bytes(bare, 512, 256)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a process's peak")
@pytest.mark.parametrize("shape", [(400, 3200), (16000, 600)], ids=str)
@pytest.mark.parametrize(
    ("method", "options"), [("gptq", {}), ("gptq", {"act_order": True}), ("quantease", {})], ids=str
)
def test_planned_memory_is_what_a_solver_takes(method, options, shape):
    import torch

    from quant.core import env
    from quant.core.gram import GramStats
    from quant.core.linalg import relative_error
    from quant.core.types import QuantSpec
    from quant.run.config import RunConfig
    from quant.run.plan import solver_bytes

    solver, device = get_solver(method), torch.device("cpu")
    options = {k: v for k, v in (solver_options(solver) | options).items() if k != "num_iter"} | (
        {"num_iter": 1} if method == "quantease" else {}
    )
    solver(torch.randn(8, 200), GramStats.from_gram(torch.eye(200)), QuantSpec(3), **options)  # compile
    noise = torch.randn(shape[1], shape[1]) / 100
    weight, stats = torch.randn(shape), GramStats.from_gram(torch.eye(shape[1]) * 8 + noise + noise.T)
    del noise
    env.reset_peak(device)
    before = env.peak_bytes(device)["host"] - 4 * weight.numel()  # the float32 weight is in the plan
    answer = solver(weight, stats, QuantSpec(3), **options)
    took = env.peak_bytes(device)["host"] - before
    assert relative_error(weight, answer.dequantize(), stats.gram) < 0.1
    planned = solver_bytes(RunConfig(solver=method, wbits=3, options=options), *shape)
    assert took < 1.1 * planned + (40 << 20)


BAD = {
    "no model": ([], "--model is missing"),
    "no such model": (["--model", "/no/such", "--wbits", 11], "no such model directory: /no/such"),
    "no such device": (["--device", "cuda:7", "--wbits", 11], "--device cuda:7 is not there"),
    "bits": (["--wbits", 11], "--wbits 11: use 1 to 8, or 16"),
    "one symmetric bit": (["--wbits", 1, "--sym"], "drop --sym"),
    "group": (["--groupsize", 0], "--groupsize 0"),
    "a symmetric grid with a minimum": (["--wbits", 3, "--grid", "real", "--sym"], "drop one of them"),
    "two levels of scales with a minimum": (
        ["--wbits", 3, "--grid", "real", "--quantization-method", "spqr"],
        "--grid real: spqr's scales",
    ),
    "another width than a super-block's": (
        ["--grid", "q4_k", "--wbits", 3],
        "--grid q4_k has codes of 4 bits: drop --wbits 3",
    ),
    "other groups than a super-block's": (
        ["--grid", "q3_k", "--groupsize", 64],
        "every 16 columns: drop --groupsize 64",
    ),
    "another width than nvfp4's": (
        ["--grid", "nvfp4", "--wbits", 3],
        "--grid nvfp4 has codes of 4 bits: drop --wbits 3",
    ),
    "other groups than fp8's": (["--grid", "fp8", "--groupsize", 64], "use --groupsize -1 or 128 in place of 64"),
    "floats that are tuned": (["--grid", "mxfp4", "--tune", "block"], "drop --tune and autoround"),
    "floats of a preset that tunes": (["--grid", "fp8", "--preset", "best"], "--preset balanced has none"),
    "floats with two levels of scales": (
        ["--grid", "fp8", "--quantization-method", "spqr"],
        "spqr quantizes its scales",
    ),
    "a correction that would be made twice": (
        ["--wbits", 3, "--target-correction", 1],
        "grows from block to block: give --true-sequential",
    ),
    "a method that corrects twice": (
        ["--wbits", 3, "--quantization-method", "qronos"],
        "qronos: several linears of a block would make up for one error",
    ),
    "rotations that learn for floats": (
        ["--grid", "nvfp4", "--rotate", "residual", "--rotate-steps", 5],
        "evenly spaced levels; drop it",
    ),
    "packed products of fp8": (["--grid", "fp8", "--real_quant"], "evenly spaced levels; drop --real_quant"),
    "outliers beside floats": (["--grid", "iq4_nl", "--outlier", 0.01], "holds codes alone: drop --outlier"),
    "parts of rows that share a scale": (
        ["--grid", "fp8", "--groupsize", 128, "--saliency", 2],
        "128 rows share a scale: drop one of them",
    ),
    "mixed floats": (["--grid", "nvfp4", "--avg-bits", 4.5], "4 bits everywhere: drop --avg-bits"),
    "inputs of a base model": (["--act-grid", "fp8"], "give --wbits 1 to 8 or --grid fp8"),
    "super-blocks out of order": (
        ["--grid", "q2_k", "--act-order"],
        "--grid q2_k holds columns in order: drop --act-order",
    ),
    "outliers beside super-blocks": (
        ["--grid", "q2_k", "--outlier", 0.01],
        "--grid q2_k holds codes alone: drop --outlier",
    ),
    "mixed super-blocks": (["--grid", "q5_k", "--avg-bits", 4.5], "5 bits everywhere: drop --avg-bits"),
    "a head of other bits": (["--grid", "q6_k", "--head-bits", 4], "--head-bits 4: --grid q6_k has 6 bits there too"),
    "rounding that is tuned": (
        ["--grid", "q6_k", "--quantization-method", "autoround"],
        "autoround tunes scales and zero",
    ),
    "a grid of no codes": (["--grid", "real"], "--grid real is of quantized weights: give --wbits 1 to 8"),
    "negative outliers": (["--outlier", -0.1], "--outlier -0.1"),
    "outliers with gptq": (
        ["--wbits", 3, "--quantization-method", "gptq", "--outlier", 0.01],
        "quantease and spqr only",
    ),
    "all are outliers": (["--wbits", 3, "--outlier", 1], "a share of the weights, below 1"),
    "outliers that are no number": (["--wbits", 3, "--outlier", "nan"], "--outlier nan"),
    "outliers with two meanings": (
        ["--wbits", 3, "--quantization-method", "quantease,spqr", "--outlier", 0.1],
        "a share of the weights for quantease and a threshold for spqr",
    ),
    "a step backwards": (["--wbits", 3, "--alpha", -5], "--alpha -5"),
    "a step that is no number": (["--wbits", 3, "--alpha", "nan"], "--alpha nan"),
    "no method": (["--wbits", 3, "--quantization-method", ","], "names no method"),
    "a method twice": (["--wbits", 3, "--quantization-method", "gptq,gptq"], "gptq is named twice"),
    "columns of nothing": (["--wbits", 3, "--structure-outlier"], "--structure-outlier needs --outlier"),
    "a preset of another method": (
        ["--wbits", 3, "--quantization-method", "rtn", "--preset", "best"],
        "is for quantease",
    ),
    "a rate of nothing": (["--wbits", 3, "--tune-rate", 0.1], "--tune-rate: give --tune block, window:K or model too"),
    "a last block of nothing": (["--wbits", 3, "--tune-last", "lm"], "--tune-last: give --tune block"),
    "a last block of no kind": (["--wbits", 3, "--tune", "block", "--tune-last", "x"], "invalid choice: 'x'"),
    "windows of nothing": (
        ["--wbits", 3, "--tune", "window:0"],
        "--tune window:0: use block, window:K with 1 to 9999 blocks",
    ),
    "windows of no number": (
        ["--wbits", 3, "--tune", "window"],
        "--tune window: use block, window:K with 1 to 9999 blocks",
    ),
    "blocks in windows": (["--wbits", 3, "--tune", "block:2"], "--tune block:2: use block, window:K"),
    "a last block of all": (
        ["--wbits", 3, "--tune", "model", "--tune-last", "lm"],
        "--tune-last lm is of the last block: --tune model",
    ),
    "moments of the sign": (
        ["--wbits", 3, "--quantization-method", "autoround", "--tune-state", "half"],
        "--tune-state half: the gradient's sign has no moments",
    ),
    "a share of everything": (["--wbits", 3, "--tune", "block", "--tune-drop", 1], "--tune-drop 1: use a share"),
    "comparing what is tuned": (
        ["--wbits", 3, "--quantization-method", "rtn,autoround", "--compare-layers"],
        "--compare-layers keeps no codes to tune: drop autoround",
    ),
    "two orders": (["--wbits", 3, "--act-order", "--group-aware"], "are two orders"),
    "comparing the base model": (["--compare-layers"], "--compare-layers needs --wbits"),
    "comparing from two streams": (
        ["--wbits", 3, "--compare-layers", "--true-sequential"],
        "drop --true-sequential",
    ),
    "a format of nothing": (["--wbits", 3, "--format", "gptq"], "give --save DIR too"),
    "software": (["--wbits", 3, "--target", "vlm"], "invalid choice: 'vlm'"),
    "tasks": (["--tasks", "demo_yesno", "--task-path", "nowhere"], "--task-path nowhere is not a directory"),
    "method": (["--wbits", 3, "--quantization-method", "gtpq"], "did you mean gptq?"),
    "data": (["--wbits", 3, "--dataset", "wikitex2"], "did you mean wikitext2?"),
    "evaluation data": (["--eval-datasets", "nothing.txt"], "no such file: nothing.txt"),
    "samples": (["--nsamples", 0], "--nsamples 0: use 1 or more"),
    "damping": (["--percdamp", 0], "--percdamp 0"),
    "data dir": (["--data-dir", "/no/where"], "--data-dir /no/where is not a directory"),
    "misspelt flag": (["--grupsize", 3], "did you mean --groupsize?"),
    "no number": (["--wbits", "three"], "invalid int value"),
}


LARGE = "1" + "0" * 20
ABSURD = {
    **{f"{flag} {LARGE}": (f"model_quantizer.py --model x --wbits 3 {flag} {LARGE}", f"{flag} {LARGE}: use at most 10000000")
       for flag in ("--nsamples", "--num-iter", "--seqlen", "--groupsize", "--num-layers-to-quantize", "--calib-batch",
                    "--limit", "--num_fewshot")},
    **{f"main.py {flag}": (f"main.py --model x --lwc {flag} {LARGE}", f"{flag} {LARGE}: use at most 10000000")
       for flag in ("--epochs", "--patience", "--batch_size", "--group_size")},
    **{f"percdamp {value}": (f"main.py --model x --solver gptq --epochs 0 --percdamp {value}", ": use a number above 0, at most 1")
       for value in ("nan", "inf", "-1", "0", "1e308")},
    **{f"rate {value}": (f"main.py --model x --lwc --lwc_lr {value}", ": use a positive rate") for value in ("nan", "inf", "0", "-1")},
    "seed": (f"model_quantizer.py --model x --seed {LARGE}", f"--seed {LARGE}: use at most 9223372036854775807"),
    "seed below": (f"main.py --model x --epochs 0 --seed -{LARGE}", f"--seed -{LARGE}: use at most 9223372036854775807"),
    "fewshot": ("model_quantizer.py --model x --num_fewshot -5", "--num_fewshot -5: use 0 or more"),
    "option": (f"model_quantizer.py --model x --wbits 3 --solver-option num_iter={LARGE}", "--solver-option num_iter"),
    "option, inf": ("main.py --model x --epochs 0 --solver gptq --solver-option percdamp=1e400", "--solver-option percdamp inf: use a number above 0"),
    "option, nested": (f"main.py --model x --epochs 0 --solver gptq --solver-option percdamp={'[' * 3000}", "percdamp is a float"),
    "option, no flag": (f"main.py --model x --epochs 0 --solver gptq --solver-option block_size={LARGE}", "block_size 1"),
    "temperature": ("quant.cli.generate --model x --prompt y --temperature nan", "--temperature nan: use 0 or more, a finite number"),
    "tokens": (f"quant.cli.generate --model x --prompt y --max-new-tokens {LARGE}", "use at most 10000000"),
    "generate's seed": (f"quant.cli.generate --model x --prompt y --seed {LARGE}", "use at most 18446744073709551615"),
    "prompt": ("quant.cli.generate --model x --prompt a\udcff", "'a\\udcff' is not UTF-8 text"),
    "a place": ("main.py --model x --run-dir a\udcff", "'a\\udcff' is not UTF-8 text"),
    "cpus": ("scripts.sweep t.yaml --executor slurm --cpus inf", "--cpus inf: use a number"),
    "gpus": ("scripts.sweep t.yaml --executor slurm --gpus nan", "--gpus nan: use 0 or more"),
    "together": (f"scripts.sweep t.yaml --together {LARGE}", f"--together {LARGE}: use at most 10000000"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSURD)
def test_numbers_and_words_that_no_command_takes_are_refused_before_work(case, monkeypatch, capsys):
    line, message = ABSURD[case]
    name, *words = line.split()
    module = importlib.import_module(name.removesuffix(".py"))
    code, out, err = called(module, monkeypatch, capsys, *words)
    assert code == 2 and message in err and out == ""
    assert len(err.splitlines()) == 1 and len(err) < 600


def test_the_smallest_temperature_divides(monkeypatch, capsys, tmp_path):
    words = ["--model", "models/demo/llama", "--prompt", "the", "--max-new-tokens", 3, "--cache-dir", tmp_path]
    answers = [called(generate, monkeypatch, capsys, *words, "--temperature", t) for t in ("0", "1e-45", "1e-320")]
    assert [code for code, *_ in answers] == [0, 0, 0]
    texts = {out.splitlines()[0] for _, out, _ in answers}
    assert len(texts) == 1, "the most likely token, as with 0"


def test_groups_that_the_shapes_decide(command, small):
    code, out, _ = command(*small, "--quantization-method", "rtn", "--groupsize", "auto", "--limit", 2)
    assert code == 0 and "groups of 32" in out
    code, _, err = command(*small, "--groupsize", "7", "--wbits", 3)
    assert code == 2 and "use one of 2, 4, 8, 16, 32, -1, which fit every linear, or auto" in err
    code, _, err = command(*small, "--groupsize", "wide")
    assert code == 2 and "'wide' is neither a whole number nor auto" in err


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_and_exit_2(case, command):
    arguments, message = BAD[case]
    model = [] if case == "no model" else ["--model", "x"]
    code, out, err = command(*model, *arguments)
    assert code == 2 and message in err and out == ""
    assert "Traceback" not in err and all(line.startswith("error: ") for line in err.splitlines())


def test_an_option_that_no_method_takes_is_noted(command, small):
    code, out, _ = command(*small, "--quantization-method", "rtn,spqr", "--num-iter", 7, "--dry-run")
    assert code == 0 and "note: --num-iter is an option of gptq_quantease, quantease, not of rtn, spqr" in out
    code, out, _ = command(*small, "--quantization-method", "rtn,quantease", "--num-iter", 7, "--dry-run")
    assert code == 0 and "note:" not in out
    assert out.count("checkpoint of this load?") == 1  # the methods have one answer


def test_all_mistakes_at_once(command):
    code, _, err = command("--wbits", 12, "--nsamples", 0, "--eval-datasets", "wikitext", "--limit", 0)
    assert code == 2 and len(err.splitlines()) == 5


BAD_INPUT = {
    "no directory": (lambda p: {"--model": p / "nothing"}, "no such model directory"),
    "empty directory": (lambda p: {"--model": p}, "holds no config.json"),
    "too short": (lambda p: {"--seqlen": 64, "--dataset": short(p)}, "a window of --seqlen 64 needs 65"),
    "too long": (lambda p: {"--seqlen": 65}, "takes at most 64 tokens"),
    "group size": (
        lambda p: {"--groupsize": 24},
        "group_size=24 does not divide in_features=32; use one of 2, 4, 8, 16, 32, -1, which fit every linear, or auto",
    ),
    "no cuda": (lambda p: {"--device": "cuda:7"}, "is not there"),
    "no device": (lambda p: {"--device": "gpu"}, "use auto, cpu, cuda or cuda:N"),
    "unreachable": (lambda p: {"--dataset": "c4"}, "--data-dir DIR"),
    "unwritable": (lambda p: {"--run-dir": short(p) / "run"}, "cannot write the run directory"),
    "save to a file": (lambda p: {"--save": short(p)}, "is a file; give a directory"),
    "save to a full directory": (lambda p: {"--save": short(p).parent}, "is not empty"),
    "other files in the way": (lambda p: {"--run-dir": short(p).parent}, "holds other files"),
    "option": (lambda p: {"--solver-option": "steps=3"}, "quantease takes num_iter"),
    "an option's value": (lambda p: {"--solver-option": "block_size=-1"}, "block_size=-1: use 1 or more columns"),
    "an option's budget": (lambda p: {"--outlier": "0.9"}, "leave nothing to quantize"),
    "option's type": (lambda p: {"--solver-option": "num_iter=many"}, "num_iter is a int"),
}


def short(path: Path) -> Path:
    """A file with next to nothing in it."""
    (path / "full").mkdir(exist_ok=True)
    (path / "full" / "short.txt").write_text("1 2 3")
    return path / "full" / "short.txt"


@pytest.mark.parametrize("case", BAD_INPUT)
def test_unusable_input_is_one_line_and_leaves_nothing(case, command, small, tmp_path):
    make, message = BAD_INPUT[case]
    (tmp_path / "input").mkdir()
    changes = make(tmp_path / "input")
    code, _, err = command(*small, *(word for pair in changes.items() for word in pair))
    assert code == 2 and message in err, err
    assert "Traceback" not in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_solver_options_reach_the_solver(command, small, tmp_path):
    code, _, _ = command(*small, "--solver-option", "num_iter=1", "--solver-option", "relax=False")
    assert code == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["configuration"]["options"]["num_iter"] == 1 and not manifest["configuration"]["options"]["relax"]


def test_a_solver_of_ones_own_in_one_file(command, small, tmp_path, monkeypatch):
    """Drop a file into quant/solvers/ and it is a method of the command line."""

    from quant import solvers as registry

    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "halfway.py").write_text(
        '"""Half-way."""\n'
        "from quant.core.grid import fit_grid\n"
        "from quant.solvers import solver\n"
        "from quant.core.types import QuantizedWeight\n\n\n"
        '@solver("halfway")\n'
        "def halfway(weight, stats, spec, *, grid=None, shrink=1.0):\n"
        '    """Round to nearest on a shrunken grid."""\n'
        "    grid = grid or fit_grid(weight * shrink, spec)\n"
        "    return QuantizedWeight(grid.quantize(weight), grid, spec)\n"
    )
    monkeypatch.setattr(registry, "__path__", [*registry.__path__, str(tmp_path / "plugins")])
    code, out, _ = command(*small, "--quantization-method", "halfway", "--solver-option", "shrink=0.9")
    registry._solvers.pop("halfway")
    assert code == 0 and "halfway" in out


def test_lines_of_progress_say_how_long_it_takes(monkeypatch):
    """From the pace since a stage was first seen; a second run of one name counts anew."""
    clock = iter([0.0, 10.0, 40.0, 400_000.0, 400_001.0])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    out = io.StringIO()
    show = terminal.ProgressBars(Console(file=out, width=120)).for_method("x")
    for done in (1, 2, 3, 10, 1, 2):
        show("learn", done, 10, "block")
    assert out.getvalue().splitlines() == [
        "x learn: 1 of 10 block",
        "x learn: 2 of 10 block, about 80 s left",
        "x learn: 3 of 10 block, about 2 min left",
        "x learn: 10 of 10 block",
        "x learn: 1 of 10 block",
        "x learn: 2 of 10 block, about 8 s left",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--limit 0", "--limit 0: use 1 or more"),
        ("--seqlen 1", "--seqlen 1: use 2 or more"),
        ("--calib-batch 0", "--calib-batch 0: use 1 or more"),
        ("--data-dir nothing", "--data-dir nothing is not a directory"),
        ("--eval-datasets wikitext3", "wikitext2"),
    ],
)
def test_mistakes_of_the_evaluation_are_one_line(flags, says, model_dir, monkeypatch, capsys):
    words = ["quant.evaluate.perplexity", "--model", str(model_dir("llama")), "--eval-datasets", "demo", *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    assert exit_code_of(evaluate.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_interrupt_says_how_to_go_on(command, small, monkeypatch):
    from quant.run.session import Session

    def stop(self, config, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run_all", stop)
    code, _, err = command(*small)
    assert code == 130 and "the same command continues" in err


def test_deterministic_algorithms_are_asked_for_and_recorded(command, small, tmp_path):
    import torch

    try:
        code, _, _ = command(*small, "--quantization-method", "gptq", "--deterministic")
        assert code == 0 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["hardware"]["deterministic"] is True


def test_a_saved_checkpoint_is_measured_by_the_same_ruler(command, small, text, tmp_path, monkeypatch, capsys):
    assert command(*small, "--quantization-method", "gptq", "--save", tmp_path / "saved")[0] == 0
    words = [
        "--model",
        tmp_path / "saved",
        "--eval-datasets",
        text,
        "--seqlen",
        32,
        "--limit",
        4,
        "--out",
        tmp_path / "e.json",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    assert exit_code_of(evaluate.main) == 0 and "base" in capsys.readouterr().out
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["perplexity"]["words"]["quantized"]
    scores = json.loads((tmp_path / "e.json").read_text())["perplexity"]["words"]
    assert scores["fp"] == pytest.approx(expected, rel=1e-5) and scores["token_sha256"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(tmp_path / "nothing")])
    assert exit_code_of(evaluate.main) == 2


def test_nothing_is_grouped_where_weights_stay(model_dir, tmp_path):
    """--groupsize auto asks nothing of the shapes then."""
    path = tmp_path / "odd"
    shutil.copytree(model_dir("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 27}))
    words = ["--model", str(path), "--groupsize", "auto", "--wbits"]
    assert model_quantizer.request_from([*words, "16"]).run.group_size == -1
    with pytest.raises(InputError, match="odd number of inputs"):
        model_quantizer.request_from([*words, "3"])


def test_a_place_that_no_shell_filled_in_is_refused(command, monkeypatch, capsys, tmp_path):
    """A user without a home has ~ in the default; --cache-dir=~/x reaches a command as it is written."""
    code, _, err = command("--model", ROOT / "models" / "demo" / "llama", "--cache-dir", "~/x", "--dry-run")
    assert code == 2 and err == "error: --cache-dir ~/x: ~ is no directory here; set HOME or give another place\n"
    for name, words in {"convert": ("x", "--to", "gptq", "--out", tmp_path / "y"), "repeat": (tmp_path,)}.items():
        module = importlib.import_module(f"quant.cli.{name}")
        code, _, err = called(module, monkeypatch, capsys, *words, "--cache-dir", "~/x")
        assert code == 2 and "--cache-dir ~/x: ~ is no directory here" in err


def requests(*words):
    args = model_quantizer.parser().parse_args([str(word) for word in words])
    model_quantizer.prepare(args)
    return model_quantizer.requests_of(args)


def test_what_the_memory_decides_is_said(command, small, text):
    code, out, err = command(*small, "--preset", "best", "--dry-run")
    said = " ".join((out + err).split())
    assert code == 0 and "quantease: --tune auto is --tune model here; data" in said and "+self:28" in said


def test_a_preset_is_its_flags_and_flags_that_are_given_stay(small, model_dir, text, monkeypatch):
    flags_of = {
        "fast": ["--range", "mse", "--search-grid", "--refit-grid"],
        "balanced": ["--range", "mse", "--search-grid", "--refit-grid", "--true-sequential", "--target-correction", 1,
                     "--residual-correction"],
    }  # fmt: skip
    flags_of["best"] = [*flags_of["balanced"], "--tune", "model", "--tune-norms", "--dataset", f"{text}+self:28"]
    for preset, words in flags_of.items():
        assert requests(*small, "--preset", preset) == requests(*small, *words)
    mixed = requests(*small, "--preset", "best", "--tune", "block", "--target-correction", 0.5)[0].run
    assert (mixed.tuning.scope, mixed.target_correction, mixed.options["search_grid"]) == ("block", 0.5, True)
    assert requests("--model", model_dir("gemma2"), "--dataset", text, "--eval-datasets", text, "--wbits", 3,
                    "--preset", "balanced")[0].run.residual_correction is False  # fmt: skip
    base = requests(*small, "--wbits", 16, "--preset", "best")[0].run
    assert not base.quantizes and not base.target_correction and base.tuning is None
    monkeypatch.setattr("quant.core.env.total_bytes", lambda device: 1_000_000)
    best = requests(*small, "--preset", "best")[0].run
    assert best.tuning.scope == "block" and best.dataset == str(text)
