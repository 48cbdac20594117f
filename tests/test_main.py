"""main.py and generate_act_scale_shift.py as a person meets them, and the papers' runs as rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate_act_scale_shift
import main as main_command
import model_quantizer
from models.load import load_config
from quant.blocks.fake_quant import ActSpec
from quant.core import env
from quant.learn.config import Learning, TransformSpec
from quant.run.plan import estimate
from quant.run.rates import Rates, SolverCost
from quant.run.shapes import shapes_of
from quant.solvers import get_solver, solver_options, solvers
from tests.helpers import called

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """main.py, or another command line, in this process."""

    def call(*words: object, of=main_command) -> tuple[int, str, str]:
        quick = [] if of is generate_act_scale_shift else ["--no-report"]
        return called(of, monkeypatch, capsys, *quick, "--cache-dir", tmp_path / "cache", *words)

    return call


@pytest.fixture
def small(small, text):
    """Flags of a small run."""
    return [*small, "--calib_dataset", text, "--eval_ppl"]


def test_flags_of_the_originals_keep_name_and_default():
    """REFERENCE A.2; --abits is None until the method is known."""
    args = main_command.parser().parse_args([])
    assert vars(args) | {"abits": 16} == vars(args) | {
        "cache_dir": Path("cache"), "output_dir": Path("../log/"), "save_dir": None, "resume": None, "real_quant": False,
        "calib_dataset": "wikitext2", "nsamples": 128, "batch_size": 1, "seed": 2, "tasks": "", "eval_ppl": False,
        "num_fewshot": 0, "wbits": 4, "abits": 16, "group_size": None, "alpha": 0.5, "let_lr": 5e-3, "lwc_lr": 1e-2,
        "wd": 0, "epochs": 10, "let": False, "lwc": False, "aug_loss": False, "symmetric": False,
        "disable_zero_point": False, "a_dynamic_method": "per_token", "w_dynamic_method": "per_channel", "limit": -1,
        "multigpu": False, "deactive_amp": False, "attn_implementation": "eager", "net": None, "act_scales": None,
        "act_shifts": None, "use_matrix": False, "use_ln_matrix": False, "sf": 1.0, "method": None, "solver": "rtn",
        "let_rope": "tied",
    }  # fmt: skip
    for flags, expected in (([], 16), (["--use_matrix"], 4), (["--use_matrix", "--abits", "8"], 8)):
        args = main_command.parser().parse_args(flags)
        main_command.resolve(args)
        assert args.abits == expected
    given = vars(generate_act_scale_shift.parser().parse_args([]))
    assert given | {"num_samples": 128, "seq_len": 2048, "seed": 2, "calib_dataset": "wikitext2",
                    "scales_output_path": Path("act_scales"), "shifts_output_path": Path("act_shifts")} == given  # fmt: skip


def test_the_main_job_prints_progress_and_one_table(command, small, tmp_path):
    code, out, err = command(
        *small, "--wbits", 3, "--lwc", "--epochs", 2, "--net", "llama", "--save_dir", tmp_path / "out"
    )
    assert code == 0 and "error" not in err
    assert "the family comes from the model's configuration" in out
    assert "learn: 6 of 6 block 3 of 3: loss" in out and "W3A16" in out
    assert re.search(r"learn: 3 of 6 block 2 of 3: loss .* \(start .*\), about \d+ (s|min) left\n", out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == "omniquant" and results["solver"] == "rtn" and results["abits"] == 16
    assert (tmp_path / "out" / "model.safetensors").exists() and len(results["learning"]) == 3
    code, out, _ = command(*small, "--wbits", 3, "--lwc", "--epochs", 2)
    assert code == 0 and "finished before" in out, "the same command finds everything done"


def test_without_eval_ppl_nothing_is_evaluated(command, small, tmp_path):
    small.remove("--eval_ppl")
    code, out, _ = command(*small, "--wbits", 4, "--abits", 8, "--epochs", 0)
    assert code == 0 and "give --eval_ppl" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["perplexity"] == {} and results["abits"] == 8 and results["method"] == "rtn"


def test_five_levels_are_said_as_they_are(command, small, tmp_path):
    code, out, _ = command(*small, "--method", "abq", "--wbits", 2, "--lwc", "--epochs", 1)
    assert code == 0 and "codes of 5 levels: 2.32 bits of entropy, stored in 3" in out
    line = json.loads((tmp_path / "run" / "journal.jsonl").open().readline())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["bits_per_weight"] > 3 and results["entropy_bits"] == pytest.approx(2.3219, abs=1e-3)
    assert line["bits_per_weight"] > 3
    code, _, _ = command(*small, "--method", "abq", "--bit-balance", "off", "--wbits", 2, "--lwc", "--epochs", 1,
                         "--run-dir", tmp_path / "off")  # fmt: skip
    results = json.loads((tmp_path / "off" / "results.json").read_text())
    assert code == 0 and results["bits_per_weight"] < 3 and results["entropy_bits"] == 2


def test_statistics_from_a_file_are_those_measured(command, model_dir, text, tmp_path):
    model = model_dir("opt")
    code, out, _ = command("--model", model, "--calib_dataset", text, "--seq-len", 32, "--num-samples", 6, "--scales-output-path",
                           tmp_path / "s", "--shifts-output-path", tmp_path / "z", of=generate_act_scale_shift)  # fmt: skip
    assert code == 0 and "18 linears" in out
    code, _, err = command("--model", model, "--calib_dataset", text, of=generate_act_scale_shift)
    assert code == 2 and err.startswith("error: --seq-len 2048: ") and "takes at most 64" in err
    scales, shifts = (load_file(tmp_path / d / "opt.safetensors") for d in "sz")
    assert scales.keys() == shifts.keys() and "model.decoder.layers.2.fc2" in scales
    both = ["--model", model, "--calib_dataset", text, "--seqlen", 32, "--nsamples", 6, "--wbits", 4, "--abits", 4, "--let",
            "--attn_implementation", "sdpa", "--epochs", 0]  # fmt: skip
    files = ["--act-scales", tmp_path / "s/opt.safetensors", "--act-shifts", tmp_path / "z/opt.safetensors"]
    for name, more in (("measured", []), ("given", files)):
        assert command(*both, *more, "--run-dir", tmp_path / name)[0] == 0
    measured, given = (load_file(tmp_path / n / "blocks" / "00002.safetensors") for n in ("measured", "given"))
    for key, tensor in measured.items():
        if key.startswith("learned/"):
            assert float((given[key] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), key
    code, _, err = command(*both, *files, "--model", model_dir("llama"), "--run-dir", tmp_path / "x")
    assert code == 2 and "opt.safetensors was not made from this model" in err and not (tmp_path / "x").exists()
    sister = tmp_path / "sister"  # of the same shapes, with other weights
    shutil.copytree(model, sister)
    state = load_file(sister / "model.safetensors")
    save_file({k: t * 1.01 for k, t in state.items()}, sister / "model.safetensors", {"format": "pt"})
    code, _, err = command(*both, *files, "--model", sister, "--run-dir", tmp_path / "x")
    assert code == 2 and "was not made from this model but from one of hash" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--wbits 4 --symmetric", "gptq"),
        ("--wbits 4", "gptq_v2"),
        ("--wbits 5 --symmetric", "compressed-tensors"),
        ("--wbits 8 --symmetric --abits 8 --kvbits 16 --a_symmetric", "compressed-tensors"),
        ("--wbits 4 --abits 8", "bitplane"),
        ("--wbits 3 --solver spqr", "bitplane"),
        ("--wbits 2 --let --use_ln_matrix --abits 16", "bitplane"),
    ],
)
def test_real_quant_packs_what_was_made(command, small, flags, expected, tmp_path):
    """The first format that can hold it; the checkpoint measures what the run measured."""
    asked = flags if "--let" in flags else f"{flags} --epochs 0"
    config = main_command.request_from([*map(str, small), *asked.split(), "--real_quant", "--save_dir", "out"])
    assert config.output.format == expected
    if expected != "compressed-tensors":
        return
    code, out, _ = command(*small, *asked.split(), "--real_quant", "--save_dir", tmp_path / "out")
    assert code == 0 and f"will a {expected} checkpoint of this load?" in out
    results = json.loads((tmp_path / "run/results.json").read_text())
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    inputs = written["config_groups"]["group_0"]["input_activations"]
    assert (inputs and inputs["symmetric"]) == ("--a_symmetric" in flags or None)
    small[small.index("--model") + 1] = tmp_path / "out"
    code, out, _ = command(*small, "--wbits", 16, "--epochs", 0, "--run-dir", tmp_path / "again")
    again = json.loads((tmp_path / "again/results.json").read_text())
    # The run measured packed weights: sums in another order. On a symmetric grid a token's largest input lies half-way
    # between two codes (127.5 steps), so that the last bit of a sum may move it by one.
    close = 2e-3 if "--a_symmetric" in flags else 1e-5
    assert code == 0
    assert again["perplexity"]["words"]["fp"] == pytest.approx(results["perplexity"]["words"]["quantized"], rel=close)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--epochs 5", "nothing to learn: give --lwc, --let"),
        ("--epochs 0 --whole_model 5", "--whole_model 5 with nothing to learn: give --lwc, --let or both"),
        ("--lwc --whole_model -1", "--whole_model -1: use 0 or more"),
        ("--lwc --tune-online", "--tune-online: give --tune block, window:K or model too"),
        ("--lwc --tune model --tune-online", "--tune-online moves what flatquant and --use_ln_matrix leave beside"),
        (
            "--epochs 0 --wbits 16 --rotate vo --rotate-steps 5",
            "--rotate-steps learns for what is quantized: give --wbits",
        ),
        (
            "--epochs 0 --rotate-steps 5",
            "--rotate-steps learns the rotations of the stream and of values: give --rotate",
        ),
        (
            "--epochs 0 --rotate qk,down --rotate-steps 5",
            "--rotate-steps learns the rotations of the stream and of values",
        ),
        ("--use_matrix --lwc", "--use_matrix and --use_ln_matrix need --let"),
        (
            "--let --use_ln_matrix --save_dir out",
            "a matrix behind every norm, which a dequantized checkpoint cannot hold",
        ),
        ("--let --sf 0", "--sf 0: use a number above 0"),
        ("--let --stability_factor 1.5", "--sf 1.5: use a number above 0, at most 1"),
        ("--lwc --real_quant --abits 12", "no kernel takes activations of 12 bits"),
        ("--lwc --wbits 16 --real_quant", "--real_quant packs quantized weights: give --wbits 1 to 8"),
        ("--lwc --abits 1", "--abits 1: use 2 to 15"),
        ("--lwc --a_symmetric", "--a_symmetric is of activations: give --abits below 16"),
        ("--epochs 0 --wbits 8 --symmetric --abits 8 --save_dir out --format compressed-tensors", "use --kvbits 16"),
        ("--lwc --kvbits 20", "--kvbits 20"),
        ("--lwc --wbits 9", "--wbits 9"),
        ("--let --let-seams norm,up", "--let-seams up: use norm, vo, qk, mul"),
        ("--let --act-shifts x.safetensors", "--act-shifts needs --act-scales"),
        ("--let --act-scales nothing.safetensors", "no such file"),
        ("--lwc --solver gptqq", "did you mean gptq?"),
        ("--lwc --alpha 2", "--alpha 2"),
        ("--lwc --epochs -1", "--epochs -1"),
        ("--lwc --limit 0", "--limit 0"),
        ("--lwc --lwc_lr 0", "--lwc_lr 0: use a positive rate"),
        ("--lwc --calib_dataset wikitext3", "wikitext2"),
        ("--epochs 0 --resume somewhere", "--resume needs the --lwc and --let flags"),
        ("--lwc --epochs 0 --resume somewhere", "no manifest.json"),
        ("--lwc --group_size 7", "does not divide"),
        ("--lwx", "did you mean --lwc?"),
        ("--lwc --attn_implementation flex_attention", "--attn_implementation: invalid choice: 'flex_attention'"),
        ("--lwc --let-seams norm,vo", "--let-seams needs --let"),
        ("--lwc --without attention", "--without leaves out parts of abq"),
        ("--lwc --method abq --without loss", "--without loss: use compensation, distribution, attention"),
        ("--let --use_matrix --let-seams norm", "--use_matrix needs seams between heads"),
        ("--let --use_ln_matrix --let-seams vo", "--use_ln_matrix needs the norm seams"),
        ("--lwc --wd -1", "--wd -1: use 0"),
        ("--lwc --wd nan", "--wd nan: use 0"),
        ("--lwc --lwc_lr nan", "--lwc_lr nan: use a positive rate"),
        ("--let --let_lr inf", "--let_lr inf: use a positive rate"),
        ("--let --let_lr nan", "--let_lr nan: use a positive rate"),
        ("--lwc --patience -1", "--patience -1: use 1 or more epochs, or 0"),
        ("--lwc --wbits 16 --epochs 1", "--lwc clips quantized weights: give --wbits 1 to 8"),
        ("--let --wbits 16 --abits 16", "--let makes weights and activations easy to quantize: give one of --wbits"),
        ("--lwc --bit-balance on --wbits 8", "--bit-balance on: give --wbits 1 to 7"),
        ("--lwc --group_size 7 --dry-run", "does not divide"),
        ("--let --use_matrix --let-seams norm --dry-run", "--use_matrix needs seams between heads"),
        ("--method autoround --lwc", "--method autoround has its own ranges: drop --lwc and --let, or give --tune"),
        ("--method autoround --solver gptq", "--method autoround begins with rounding to nearest: drop --solver gptq"),
        ("--method autoround --wbits 16", "--method autoround rounds weights: give --wbits 1 to 8"),
        ("--lwc --tune block --wbits 16", "--tune block moves codes: give --wbits 1 to 8"),
        ("--lwc --tune-rate 0.1", "--tune-rate: give --tune block, window:K or model too"),
        (
            "--epochs 0 --solver spqr --tune block --nsamples 16",
            "--tune cannot hold scales that are quantized themselves",
        ),
        ("--lwc --tune block --nsamples 1", "raise --nsamples"),
        ("--lwc --wbits 5 --format gptq --dry-run", "format gptq: "),
        ("--lwc --wbits 4 --target gptqmodel --dry-run", "--target gptqmodel"),
    ],
)
def test_mistakes_get_one_clear_line(command, small, flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*small, *flags.split())
    assert (
        code == 2
        and says in err
        and "Traceback" not in err
        and all(line.startswith("error: ") for line in err.splitlines() if line)
    )
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_post_norm_blocks_are_explained(command, small, model_dir):
    for plan in ([], ["--dry-run"]):
        code, _, err = command(*small, "--model", model_dir("opt post-norm, projected"), "--let", *plan)
        assert code == 2 and "the residual reads the norms' outputs" in err and "--let-seams vo,qk,mul" in err
    code, _, err = command(
        *small, "--model", model_dir("opt post-norm, projected"), "--let", "--let-seams", "vo,mul", "--epochs", 1
    )
    assert code == 0, err


def test_another_configuration_and_another_model_are_refused(command, small, model_dir, tmp_path):
    assert command(*small, "--lwc", "--epochs", 1)[0] == 0
    code, _, err = command(*small, "--lwc", "--epochs", 2)
    assert code == 2 and "another configuration (learning:" in err
    code, _, err = command(*small, "--model", model_dir("mistral"), "--lwc", "--epochs", 0, "--resume", tmp_path / "run",
                           "--run-dir", tmp_path / "next")  # fmt: skip
    assert code == 2 and "learned on another model" in err
    code, _, err = command(*small, "--lwc", "--group_size", 16, "--epochs", 0, "--resume", tmp_path / "run",
                           "--run-dir", tmp_path / "next")  # fmt: skip
    assert code == 2 and "learned for another configuration (group_size: -1, here 16)" in err
    code, _, err = command(*small, "--lwc", "--wbits", 3, "--symmetric", "--epochs", 0, "--resume", tmp_path / "run",
                           "--run-dir", tmp_path / "next")  # fmt: skip
    assert code == 2 and "learned for another configuration (wbits: 4, here 3)" in err
    assert not (tmp_path / "next").exists()


def test_a_start_in_the_run_directory_is_not_discarded(command, small, tmp_path):
    """--overwrite would delete the parameters before they are read; so would it files of ranges."""
    learned = tmp_path / "run"
    assert command(*small, "--lwc", "--epochs", 1)[0] == 0
    before = {file: file.read_bytes() for file in learned.rglob("*") if file.is_file()}
    (tmp_path / "link").symlink_to(learned)
    scales = learned / "scales.safetensors"
    save_file({"x": torch.ones(1)}, scales)
    again = [*small, "--lwc", "--let", "--epochs", 0, "--overwrite", "--run-dir"]
    for flags in (["--resume", learned], ["--resume", tmp_path / "link"], ["--act-scales", scales]):
        code, _, err = command(*again, learned, *flags)
        assert code == 2 and f"--run-dir {learned} " in err and f" {flags[0]} {flags[1]}, which is read" in err
    code, _, err = command(*small, "--lwc", "--epochs", 0, "--resume", learned)
    assert code == 2 and "is the same place as --resume" in err
    assert before == {file: file.read_bytes() for file in before}
    assert (
        command(*small, "--lwc", "--epochs", 0, "--overwrite", "--resume", learned, "--run-dir", tmp_path / "b")[0] == 0
    )


def test_a_start_that_is_no_run_or_is_damaged_is_named(command, small, tmp_path):
    assert command(*small, "--lwc", "--epochs", 1)[0] == 0
    learned, manifest = tmp_path / "run", tmp_path / "run" / "manifest.json"
    again = [*small, "--lwc", "--epochs", 0, "--resume", learned, "--run-dir", tmp_path / "next"]
    whole = manifest.read_text()
    for content, says in (
        ("{}", "manifest.json is not of a run of this version (no 'configuration')"),
        ("[]", "holds no JSON object"),
        ('{"configuration": {"model_sha256": "0"}}', "manifest.json is not of a run of this version"),
        ("{", "is truncated or not JSON"),
    ):
        manifest.write_text(content)
        code, _, err = command(*again)
        assert code == 2 and len(err.splitlines()) == 1 and str(learned) in err and says in err
        assert "--overwrite" not in err, "it would be the flag of the new run"
    manifest.write_text(whole)
    block = learned / "blocks" / "00002.safetensors"
    block.write_bytes(block.read_bytes()[:-8])
    code, _, err = command(*again)
    assert code == 2 and f"{block} is damaged" in err and "--overwrite" not in err
    assert not (tmp_path / "next").exists()


# Every flag of learning: what it changes of the configuration, alone.
WIRING = {
    "--let_lr 0.011": ("learning.let_lr", 0.011),
    "--lwc_lr 0.012": ("learning.lwc_lr", 0.012),
    "--wd 0.013": ("learning.weight_decay", 0.013),
    "--epochs 7": ("learning.epochs", 7),
    "--batch_size 3": ("learning.batch", 3),
    "--patience 2": ("learning.patience", 2),
    "--aug_loss": ("learning.augmented", True),
    "--use_matrix": ("learning.transform.matrix", True),
    "--use_ln_matrix": ("learning.transform.norm_matrix", True),
    "--sf 0.25": ("learning.transform.stability", 0.25),
    "--alpha 0.75": ("learning.transform.alpha", 0.75),
    "--let-rope untied": ("learning.transform.tied", False),
    "--inverse-dtype float64": ("learning.transform.precise", True),
    "--let-seams vo,mul": ("learning.transform.kinds", ("vo", "mul")),
    "--abits 7": ("act.bits", 7),
    "--kvbits 5": ("act.kv_bits", 5),
    "--a_dynamic_method static": ("act.method", "static"),
    "--a_symmetric": ("act.symmetric", True),
    "--wbits 3": ("wbits", 3),
    "--group_size 64": ("group_size", 64),
    "--symmetric": ("symmetric", True),
    "--disable_zero_point": ("symmetric", True),
    "--bit-balance on": ("levels", 17),
    "--resume there": ("resume", Path("there")),
    "--solver gptq": ("solver", "gptq"),
    "--true-sequential": ("true_sequential", True),
    "--attn_implementation sdpa": ("attn_implementation", "sdpa"),
    "--calib_dataset c4": ("dataset", "c4"),
    "--nsamples 9": ("nsamples", 9),
    "--seqlen 99": ("seqlen", 99),
    "--seed 4": ("seed", 4),
    "--calib-batch 5": ("calib_batch", 5),
    "--head-bits 8": ("head_bits", 8),
    "--embedding-bits 5": ("embedding_bits", 5),
}
BASE = ["--model", "x", "--method", "affinequant", "--lwc", "--let", "--abits", "6", "--kvbits", "6"]


def flattened(record: dict, prefix: str = "") -> dict:
    """Entries of nested records by dotted names."""
    flat: dict = {}
    for key, value in record.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize("flags", WIRING)
def test_every_flag_reaches_its_own_entry(flags):
    entry, value = WIRING[flags]
    plain, given = (flattened(main_command.request_from([*BASE, *more]).to_json()) for more in ([], shlex.split(flags)))
    changed = {key for key in plain.keys() | given.keys() if plain.get(key) != given.get(key)}
    follows = {"--solver gptq": {"method", "options.percdamp"}}.get(flags, set())
    assert entry in changed and changed - {entry} <= follows, changed
    assert given[entry] == json.loads(json.dumps(value if not isinstance(value, Path) else str(value)))


def test_parts_of_abq_are_left_out():
    words = [*BASE, "--method", "abq"]
    whole, without = (
        main_command.request_from([*words, *more]) for more in ([], ["--without", "attention,distribution"])
    )
    assert (
        without.run.learning == replace(whole.run.learning, attention=False, distribution=False) != whole.run.learning
    )


@pytest.mark.parametrize("solver", sorted(solvers()))
def test_a_flag_of_learning_is_no_option_of_a_solver(solver):
    """SmoothQuant's exponent and QuantEase's step are both called alpha; only flags that say so are the solver's."""
    words = [*BASE, "--solver", solver, "--true-sequential", "--alpha", "0", "--num-iter", "7", "--percdamp", "0.2"]
    config = main_command.request_from(words)
    declared = {"num_iter": 7, "percdamp": 0.2}
    assert config.run.learning.transform.alpha == 0
    assert config.run.options == {
        name: declared[name] for name in solver_options(get_solver(solver)) if name in declared
    }


def test_a_solver_option_of_a_flags_name_is_the_solvers():
    config = main_command.request_from(
        [*BASE, *shlex.split("--solver quantease --alpha 0.75 --solver-option alpha=1.5 --solver-option outlier=0.01")]
    )
    assert config.run.learning.transform.alpha == 0.75
    assert config.run.options == {"num_iter": 30, "alpha": 1.5, "outlier": 0.01}


def test_all_flags_of_learning_at_once(tmp_path):
    for name in ("s", "z"):
        (tmp_path / name).touch()
    words = [*BASE, *shlex.split(
        "--method abq --wbits 2 --abits 7 --kvbits 5 --a_dynamic_method per_tensor --a_symmetric --use_matrix "
        "--use_ln_matrix --sf 0.25 --alpha 0.75 --let-seams vo,norm --let-rope untied --inverse-dtype float64 --epochs 7 "
        "--batch_size 3 --let_lr 0.011 --lwc_lr 0.012 --wd 0.013 --patience 2 --solver gptq --percdamp 0.2"
    ), "--act-scales", str(tmp_path / "s"), "--act-shifts", str(tmp_path / "z")]  # fmt: skip
    config = main_command.request_from(words)
    transform = TransformSpec(let=True, kinds=("vo", "norm"), matrix=True, norm_matrix=True, shift=True, alpha=0.75,
                              tied=False, stability=0.25, precise=True)  # fmt: skip
    assert config.run.learning == Learning(
        transform, clip=True, compensation=True, epochs=7, let_lr=0.011, lwc_lr=0.012, weight_decay=0.013, batch=3,
        augmented=True, distribution=True, attention=True, patience=2,
    )  # fmt: skip
    assert config.run.act == ActSpec(bits=7, kv_bits=5, method="per_tensor", symmetric=True)
    assert (config.run.method, config.run.solver, config.run.levels, config.run.options["percdamp"]) == (
        "abq+gptq",
        "gptq",
        5,
        0.2,
    )
    assert (config.run.act_scales, config.run.act_shifts) == (tmp_path / "s", tmp_path / "z")


@pytest.mark.parametrize(
    ("flags", "levels"),
    [("--wbits 1", 3), ("--wbits 2", 5), ("--wbits 3", None), ("--wbits 2 --bit-balance off", None),
     ("--wbits 3 --bit-balance on", 9), ("--wbits 2 --method omniquant", None),
     ("--wbits 2 --method omniquant --bit-balance on", 5)],
)  # fmt: skip
def test_who_gets_balanced_levels(flags, levels):
    config = main_command.request_from(["--model", "x", "--method", "abq", "--lwc", *flags.split()])
    assert config.run.levels == levels


def test_arithmetic_on_a_gpu(monkeypatch):
    """The papers' automatic mixed precision is bfloat16 here; --deactive_amp turns it off."""
    monkeypatch.setattr(env, "pick_device", lambda name: torch.device("cuda"))
    for flags, dtype in (([], "bfloat16"), (["--deactive_amp"], "float32"), (["--dtype", "float16"], "float16"),
                         (["--deactive_amp", "--dtype", "bfloat16"], "bfloat16")):  # fmt: skip
        assert main_command.request_from([*BASE, *flags]).session.dtype == dtype


def test_a_plan_refuses_what_the_run_refuses_and_nothing_else(command, small, tmp_path):
    """Matrices behind norms fit no dequantized checkpoint, which only matters where one is written."""
    matrices = [*small, "--wbits", 4, "--abits", 16, "--let", "--use_ln_matrix", "--epochs", 0]
    code, out, err = command(*matrices, "--dry-run")
    assert code == 0 and "nothing is run" in out, err
    assert command(*matrices)[0] == 0
    for plan in (["--dry-run"], []):
        code, _, err = command(*matrices, "--target", "vllm", "--run-dir", tmp_path / "x", *plan)
        assert code == 2 and "matrices behind norms" in err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("abits", [4, 16])
def test_planned_bits_of_online_matrices(command, small, model_dir, abits, tmp_path):
    words = [*map(str, small), "--wbits", "4", "--abits", str(abits), "--let", "--lwc", "--method", "flatquant"]
    assert command(*words, "--epochs", "0")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    shapes = shapes_of(load_config(str(model_dir("llama")), tmp_path, with_weights=False)[0])
    plan = estimate(main_command.request_from(words), shapes, 4, Rates(1e12, 1e12), SolverCost())
    assert plan["bits per weight"] == pytest.approx(results["bits_per_weight"])
    assert all(log["online_parameters"] and log["online_flops"] for log in results["learning"])


@pytest.mark.parametrize("wbits", [4, 16])
def test_planned_bits_are_the_bits_of_the_run(command, small, model_dir, wbits, tmp_path):
    """Matrices behind norms are in both, also where no weight is quantized; the tiny model is kept in 32 bits."""
    words = [*map(str, small), "--wbits", str(wbits), "--abits", "8", "--let", "--use_ln_matrix", "--epochs", "0"]
    assert command(*words)[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    config = main_command.request_from(words)
    shapes = shapes_of(load_config(str(model_dir("llama")), tmp_path, with_weights=False)[0])
    plan = estimate(config, shapes, 4, Rates(1e12, 1e12), SolverCost())
    weights = sum(out * n_in for _, out, n_in in shapes.linears)
    online = 16 * 2 * 32**2 / weights
    if wbits == 16:
        assert plan["bits per weight"] == pytest.approx(16 + online)
        assert results["bits_per_weight"] == pytest.approx(32 + online)
        assert results["quantized_bytes"] == 3 * (weights * 4 + 2 * 2 * 32**2)
    else:
        assert plan["bits per weight"] == pytest.approx(results["bits_per_weight"])
        assert plan["bits per weight"] > 4 + online
        assert plan["quantized bytes"] == pytest.approx(results["quantized_bytes"])


@pytest.mark.parametrize("learned", ["--lwc --epochs 1", "--epochs 0"])
def test_planned_bits_count_the_outliers_of_the_solver(command, small, model_dir, learned, tmp_path):
    """Whatever the run is called: learned, it is omniquant+quantease."""
    words = [*map(str, small), *shlex.split(f"--wbits 4 --solver quantease --num-iter 3 {learned}")]
    words += ["--solver-option", "outlier=0.05"]
    assert command(*words)[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    shapes = shapes_of(load_config(str(model_dir("llama")), tmp_path, with_weights=False)[0])
    plan = estimate(main_command.request_from(words), shapes, 4, Rates(1e12, 1e12), SolverCost())
    weights = sum(out * n_in for _, out, n_in in shapes.linears)
    rows = 32 * sum(out + 1 for _, out, _ in shapes.linears)  # pointers of sparse rows: much where rows are this short
    assert plan["bits per weight"] + rows / weights == pytest.approx(results["bits_per_weight"], rel=0.005)


def test_weights_that_stay_have_no_outliers_in_the_plan(model_dir, tmp_path):
    words = [*shlex.split("--model x --wbits 16 --abits 8 --let --solver quantease --solver-option outlier=0.05")]
    shapes = shapes_of(load_config(str(model_dir("llama")), tmp_path, with_weights=False)[0])
    plan = estimate(main_command.request_from(words), shapes, 4, Rates(1e12, 1e12), SolverCost())
    assert plan["bits per weight"] == 16


def test_the_plan_of_a_learned_run(command):
    flags = [
        "--model",
        ROOT / "benchmarks/configs/llama-2-7b",
        "--wbits",
        4,
        "--abits",
        4,
        "--lwc",
        "--let",
        "--dry-run",
    ]
    code, out, err = command(*flags, "--seqlen", 128, "--nsamples", 2)
    assert code == 0, err
    assert "seconds: learn" in out and "device: learning" in out


def test_every_row_of_the_papers_is_a_command_without_mistakes(tmp_path):
    rows = [
        line.split("\t") for line in (ROOT / "scripts/papers.tsv").read_text().splitlines() if not line.startswith("#")
    ]
    assert rows[0] == ["paper", "family", "sizes", "setting", "flags"] and len(rows) > 80
    settings = {row[3] for row in rows[1:]}
    assert {
        "W2A16",
        "W2A16g64",
        "W2A16g128",
        "W3A16",
        "W3A16g128",
        "W4A16",
        "W4A16g128",
        "W6A6",
        "W4A4",
        "W4A8",
        "W3A8",
        "W2A8",
    } <= settings
    for paper, *_, setting, flags in rows[1:]:
        of = model_quantizer if paper == "quantease" else main_command
        args = of.parser().parse_args(["--model", "x", *shlex.split(flags)])
        if of is main_command:
            main_command.resolve(args)
            assert args.method == paper and f"W{args.wbits}A{args.abits}" == setting.split("g")[0]
            assert (f"g{args.group_size}" if args.group_size else "") == setting.removeprefix(setting.split("g")[0])
            assert args.epochs == (40 if args.wbits == 2 else 20)
            assert args.deactive_amp == (paper != "omniquant"), "AffineQuant and ABQ-LLM train in float32"
        else:
            args.methods, args.corpora = [args.quantization_method], []
        assert of.mistakes(args) == []


def test_the_cost_of_matrices_behind_norms_is_said(command, small, tmp_path):
    code, out, _ = command(*small, "--wbits", 3, "--abits", 16, "--let", "--use_ln_matrix", "--sf", 0.1, "--epochs", 1)
    online = 3 * 2 * 32 * 32
    assert (
        code == 0
        and f"online matrices: {online} numbers in 16 bits (counted in bits per weight), {2 * online} flops" in out
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    weights = sum(line["shape"][0] * line["shape"][1] for line in lines)
    stored = sum(line["storage_bits"] for line in lines) + 16 * online
    assert results["bits_per_weight"] == pytest.approx(stored / weights)
