"""Whole runs on tiny models: results, resume after SIGKILL, evaluation against transformers, the saved checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.calibration import calibration_tokens, evaluation_tokens
from quant.core.errors import InputError, RunError
from quant.core.types import QuantSpec
from quant.evaluate.perplexity import ratio_interval
from quant.kernels import columns as blocks
from quant.kernels.columns import TorchKernels
from quant.run.calibration import heldout_windows
from quant.run.directory import RunDirectory
from quant.run.request import Request
from quant.run.session import open_session
from quant.run.stored import Allowed
from quant.solvers.gptq import gptq
from tests.conftest import DISTINCT
from tests.helpers import SEQLEN, config_for, direct_perplexity, long, perform, perform_all, replace
from tests.references import make_stats


def run(config: Request) -> dict:
    return perform(config)


@pytest.mark.parametrize("name", DISTINCT)
def test_every_family_end_to_end(name, model_dir, text, tmp_path):
    config = config_for(model_dir(name), text, tmp_path, save=tmp_path / "saved", true_sequential=name != "llama")
    results = run(config)
    tokens = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(model_dir(name)), seqlen=SEQLEN, limit=12)
    scores = results["perplexity"]["words"]
    full = AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32).eval()
    assert scores["fp"] == pytest.approx(direct_perplexity(full, tokens.ids), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert scores["quantized"] == pytest.approx(direct_perplexity(saved, tokens.ids), rel=1e-5)
    assert scores["token_sha256"] == tokens.sha256 and scores["tokens"] == 12 * SEQLEN
    low, high = scores["ratio_ci95"]
    assert low <= scores["quantized"] / scores["fp"] <= high
    # Every linear of every block is quantized, nothing else is touched.
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    assert len(records) == full.config.num_hidden_layers * len(open_session(config).model.linear_shapes())
    solved = {f"{r['block']}.{r['name']}" for r in records}
    for key, value in full.state_dict().items():
        quantized = any(key.endswith(f".{linear}.weight") for linear in solved)
        assert torch.equal(value, saved.state_dict()[key]) != quantized, key
    with torch.no_grad():
        logits_fp, logits = (m(tokens.ids).logits[:, :-1].double().log_softmax(-1) for m in (full, saved))
    kl = float((logits_fp.exp() * (logits_fp - logits)).sum(-1).mean())
    assert results["fidelity"]["words"]["kl_divergence"] == pytest.approx(kl, rel=1e-3)
    agreement = float((logits_fp.argmax(-1) == logits.argmax(-1)).double().mean())
    assert results["fidelity"]["words"]["top1_agreement"] == pytest.approx(agreement, abs=0.01)


def test_results_follow_the_contract(model_dir, text, tmp_path):
    results = run(config_for(model_dir("llama"), text, tmp_path, group_size=16))
    on_disk = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {k: v for k, v in results.items() if k != "run_dir"} == on_disk
    assert on_disk["schema"] == 1 and on_disk["method"] == "quantease" and on_disk["wbits"] == 3
    assert {"load", "calibrate", "solve", "evaluate", "export", "total"} <= on_disk["seconds"].keys()
    assert {"device", "host"} == on_disk["peak_bytes"].keys()
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    weights = sum(r["shape"][0] * r["shape"][1] for r in records)
    assert on_disk["quantized_bytes"] * 8 == pytest.approx(on_disk["bits_per_weight"] * weights, abs=8)
    assert on_disk["bits_per_weight"] == pytest.approx(3 + 19 / 16)
    assert on_disk["mean_relative_error"] == pytest.approx(sum(r["relative_error"] for r in records) / len(records))
    for record in records:
        assert 0 < record["relative_error"] < record["relative_error_rtn"] < 1
        assert record["verdict"] in ("ok", "look") and record["peak_bytes"] > 0 and record["seconds"] > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["calibration"]["shape"] == [12, SEQLEN] and manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "chosen", [None, TorchKernels("Triton kernels are not usable (no ptxas)")], ids=["own", "other"]
)
def test_manifest_and_journal_name_the_kernels(chosen, model_dir, text, tmp_path, monkeypatch):
    if chosen is not None:
        monkeypatch.setitem(blocks._chosen, "cpu", chosen)
    run(config_for(model_dir("llama"), text, tmp_path, solver="gptq", options={}, num_layers=1))
    said = "numba" if chosen is None else "torch: Triton kernels are not usable (no ptxas)"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["kernels"] == said
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    assert {record["kernels"] for record in records} == {said}, "of the process that solved it, which may be another"


def test_without_true_sequential_all_linears_see_the_same_pass(model_dir, text, tmp_path):
    """The first block's answers recomputed from transformers' own activations."""
    config = config_for(model_dir("opt"), text, tmp_path, solver="gptq", options={})
    run(config)
    solved = RunDirectory(tmp_path / "run").read_weights(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir("opt"))
    ids = calibration_tokens(str(text), tokenizer, nsamples=12, seqlen=SEQLEN, seed=0).ids
    model = AutoModelForCausalLM.from_pretrained(model_dir("opt"), dtype=torch.float32).eval()
    block = model.model.decoder.layers[0]
    for name in ("self_attn.k_proj", "fc2"):
        linear, seen = block.get_submodule(name), []
        handle = linear.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        handle.remove()
        expected = gptq(linear.weight.detach(), make_stats(seen[0].reshape(-1, linear.in_features)), QuantSpec(3))
        assert float((solved[name].codes != expected.codes).float().mean()) < 0.01


def test_later_blocks_and_stages_see_what_is_quantized(model_dir, text, tmp_path):
    plain = config_for(model_dir("llama"), text, tmp_path, run_dir=tmp_path / "plain", wbits=2)
    staged = replace(plain, run_dir=tmp_path / "staged", true_sequential=True)
    session = open_session(plain)
    session.run(plain.run, plain.output), session.run(staged.run, staged.output)
    for index, differ in ((0, ("self_attn.o_proj", "mlp.down_proj")), (1, ("self_attn.q_proj",))):
        a, b = (RunDirectory(tmp_path / d).read_weights(index) for d in ("plain", "staged"))
        assert all(not torch.equal(a[name].codes, b[name].codes) for name in differ)
    a, b = (RunDirectory(tmp_path / d).read_weights(0)["self_attn.q_proj"] for d in ("plain", "staged"))
    assert torch.equal(a.codes, b.codes), "the first group of the first block sees full precision in both"


def test_methods_together_equal_methods_alone(model_dir, text, tmp_path):
    base = config_for(model_dir("llama"), text, tmp_path)
    methods = {"rtn": {}, "gptq": {}, "quantease": {"num_iter": 3}}
    configs = [replace(base, solver=m, options=o, run_dir=tmp_path / "all" / m) for m, o in methods.items()]
    together = perform_all(configs)
    for config, results in zip(configs, together, strict=True):
        alone = run(replace(config, run_dir=tmp_path / "alone" / config.run.method))
        assert results["codes_sha256"] == alone["codes_sha256"] and results["method"] == config.run.method
        assert results["perplexity"] == alone["perplexity"] and results["fidelity"] == alone["fidelity"]
    again = perform_all(configs)
    assert [r["codes_sha256"] for r in again] == [r["codes_sha256"] for r in together]


@pytest.mark.parametrize(
    ("method", "options"),
    [("quantease", {"num_iter": 3, "outlier": 0.02}), ("quantease", {"num_iter": 3, "outlier": 0.05, "structure_outlier": True}),
     ("spqr", {"outlier": 0.2})], ids=["entries", "columns", "spqr"],
)  # fmt: skip
def test_outliers_survive_the_disk_and_the_checkpoint(method, options, model_dir, text, tmp_path):
    config = config_for(
        model_dir("llama"), text, tmp_path, solver=method, options=options, group_size=16, save=tmp_path / "saved"
    )
    results = run(config)
    weights = RunDirectory(tmp_path / "run").read_weights(0)
    assert all(w.check().outliers is not None for w in weights.values())
    assert any(w.outliers.value.numel() > 0 for w in weights.values())
    assert (weights["mlp.up_proj"].grid.bilevel is not None) == (method == "spqr")
    tokens = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(model_dir("llama")), seqlen=SEQLEN, limit=12)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert results["perplexity"]["words"]["quantized"] == pytest.approx(direct_perplexity(saved, tokens.ids), rel=1e-5)
    (tmp_path / "run" / "results.json").unlink()
    again = run(replace(config, save=None))
    assert again["perplexity"] == results["perplexity"] and again["codes_sha256"] == results["codes_sha256"]


def test_a_finished_run_of_before_measuring_was_a_stage_is_saved(model_dir, text, tmp_path):
    config = replace(config_for(model_dir("llama"), text, tmp_path), eval_datasets=(), save=None)
    run(config)
    file = tmp_path / "run" / "results.json"
    results = json.loads(file.read_text())
    assert results["seconds"].pop("measure") > 0
    file.write_text(json.dumps(results))
    again = run(replace(config, save=tmp_path / "later"))
    assert (tmp_path / "later" / "config.json").exists() and again["seconds"]["total"] > 0


def test_lower_precision_is_for_the_solver_alone(model_dir, text, tmp_path, monkeypatch):
    import quant.run.solving as recipe

    seen = []
    measure = lambda *a: lambda value: seen.append(torch.get_float32_matmul_precision()) or 0.1  # noqa: E731
    monkeypatch.setattr(recipe, "relative_to", measure)
    config = replace(config_for(model_dir("llama"), text, tmp_path, solver_precision="high"), eval_datasets=())
    inside = []
    session = open_session(config)
    solver = session.recipe(config.run).solver
    monkeypatch.setattr(
        "quant.run.inputs.get_solver",
        lambda name: lambda *a, **k: inside.append(torch.get_float32_matmul_precision()) or solver(*a, **k),
    )
    session.run(config.run, config.output)
    assert set(inside) == {"high"} and set(seen) == {"highest"}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["solver_precision"] == "high"


def test_base_model_is_evaluated_at_16_bits(model_dir, text, tmp_path):
    results = run(config_for(model_dir("bloom"), text, tmp_path, wbits=16, options={}))
    assert results["perplexity"]["words"]["fp"] > 1 and results["perplexity"]["words"]["quantized"] is None
    assert results["bits_per_weight"] == 32 and not list((tmp_path / "run" / "blocks").iterdir())


def test_only_the_first_blocks(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, num_layers=1, save=tmp_path / "saved")
    run(config)
    assert len(list((tmp_path / "run" / "blocks").iterdir())) == 1
    saved, full = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tmp_path / "saved", model_dir("llama"))
    )
    changed = {key for key in full if not torch.equal(full[key], saved[key])}
    assert changed and all(key.startswith("model.layers.0.") for key in changed)


@pytest.mark.parametrize("store", ["device", "disk"])
def test_activation_store_does_not_change_the_bits(store, model_dir, text, tmp_path):
    config = config_for(model_dir("mistral"), text, tmp_path)
    other = replace(config, run_dir=tmp_path / "other", activation_store=store)
    session = open_session(config)
    assert (
        session.run(config.run, config.output)["codes_sha256"] == session.run(other.run, other.output)["codes_sha256"]
    )


def test_a_finished_run_is_not_repeated(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    first = run(config)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    assert run(config) == first
    more = run(replace(config, limit=6))  # another evaluation: the codes stay
    assert more["perplexity"]["words"]["tokens"] == 6 * SEQLEN and more["codes_sha256"] == first["codes_sha256"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}


def test_another_configuration_in_the_same_place_is_refused(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    first = run(config)
    with pytest.raises(InputError, match=r"another configuration .*seed: 0 -> 1.*--overwrite"):
        run(replace(config, seed=1))
    with pytest.raises(InputError, match="wbits: 3 -> 4"):
        run(replace(config, wbits=4))
    assert run(replace(config, seed=1, overwrite=True))["codes_sha256"] != first["codes_sha256"]


def test_default_run_directories_differ_by_configuration(model_dir, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_for(model_dir("llama"), text, tmp_path, run_dir=None)
    session = open_session(config)
    changes: tuple[dict, ...] = ({}, {"wbits": 4}, {"seed": 2}, {"solver": "rtn"})
    paths = {session.run_path(replace(config.run, **change), config.output) for change in changes}
    assert len(paths) == 4 and all(path.parts[0] == "runs" for path in paths)
    other = open_session(replace(config, limit=3))
    assert other.run_path(config.run, config.output) in paths, "evaluation does not move the codes"


def _child(config: Request, connection) -> None:
    """Run in a process of its own and tell the parent of every step."""
    torch.set_num_threads(1)
    results = perform(config, lambda *event: connection.send(event))
    connection.send(("end", results["codes_sha256"], results["perplexity"], ""))


def _finish_or_kill(context, config: Request, kill_at: int | None, delay: float) -> tuple | None:
    """Start a run; SIGKILL it after its n-th step and a delay. Returns its last message if it ended by itself."""
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(config, sending))
    process.start()
    sending.close()
    steps, last = 0, None
    while True:
        try:
            last = receiving.recv()
        except EOFError:
            break
        steps += 1
        if steps == kill_at:
            process.join(delay)
            process.kill()  # SIGKILL; it may have ended by itself
            break
    process.join()
    return last if process.exitcode == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", *long("falcon 7b", "bloom")])
def test_killed_runs_continue_bit_identically(name, model_dir, text, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quant.run.session", "quant.solvers.quantease"])
    rng = random.Random(name)
    config = config_for(model_dir(name), text, tmp_path, true_sequential=True, save=tmp_path / "saved")
    whole = replace(config, run_dir=tmp_path / "whole", save=tmp_path / "saved-whole")
    expected = _finish_or_kill(context, whole, None, 0)
    kills, finished = 0, None
    for kill_at in (1, 2, 1, 2, 4):  # 1 to 3: blocks, later ones: evaluation and export
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "blocks").glob("*.safetensors")}
        finished = _finish_or_kill(context, config, kill_at, rng.random() * 0.004)
        kills += finished is None
        after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "blocks").glob("*.safetensors")}
        assert before.items() <= after.items(), "a finished block was written again"
    assert kills >= 4
    finished = _finish_or_kill(context, config, None, 0)
    assert finished is not None and finished == expected
    for index in range(3):
        a, b = (RunDirectory(tmp_path / d).read_weights(index) for d in ("run", "whole"))
        assert a.keys() == b.keys()
        for linear in a:
            assert torch.equal(a[linear].codes, b[linear].codes) and torch.equal(
                a[linear].grid.scale, b[linear].grid.scale
            )
    same = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("saved", "saved-whole")]
    assert same[0] == same[1]
    journals = [(tmp_path / d / "journal.jsonl").read_text().splitlines() for d in ("run", "whole")]
    names = [[(json.loads(line)["block"], json.loads(line)["name"]) for line in lines] for lines in journals]
    assert names[0] == names[1], "no line is missing or doubled"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_torn_journal_and_a_leftover_file_are_repaired(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    expected = run(config)
    directory = tmp_path / "run"
    journal = (directory / "journal.jsonl").read_text()
    (directory / "journal.jsonl").write_text(journal[: len(journal) // 2])
    (directory / "results.json").unlink()
    (directory / "blocks" / "00002.safetensors").unlink()
    (directory / "blocks" / "00002.safetensors.tmp").write_bytes(b"half")
    assert run(config)["codes_sha256"] == expected["codes_sha256"]
    assert len((directory / "journal.jsonl").read_text().splitlines()) == len(journal.splitlines())


def test_a_damaged_block_file_is_named(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    run(config)
    (tmp_path / "run" / "results.json").unlink()
    file = tmp_path / "run" / "blocks" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"00001.safetensors is damaged"):
        run(config)


def test_no_space_is_found_before_work_begins(model_dir, text, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs about .* GB, the disk has 0.00 GB free"):
        run(config_for(model_dir("llama"), text, tmp_path))
    assert not (tmp_path / "run").exists()


def test_no_space_in_the_middle_leaves_nothing_half_written(model_dir, text, tmp_path, monkeypatch):
    import errno

    real = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # manifest, journal, first block, second block
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    config = config_for(model_dir("llama"), text, tmp_path)
    session = open_session(config)
    heldout_windows(session, config.run)  # the token cache is not what is tested
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        session.run(config.run, config.output)
    monkeypatch.setattr(os, "fsync", real)
    assert [p.name for p in (tmp_path / "run" / "blocks").iterdir()] == ["00000.safetensors"]
    assert run(config)["perplexity"]


def test_singular_gram_names_the_linear(model_dir, text, tmp_path, monkeypatch):
    from quant.core import linalg

    real = linalg.upper_factor

    def fails(gram, percdamp):  # of calibration data; the check of the options has a diagonal one
        return real(gram, percdamp) if torch.equal(gram, gram.diag().diag()) else (gram, False)

    monkeypatch.setattr(linalg, "upper_factor", fails)
    with pytest.raises(RunError, match="block 0 self_attn.q_proj: the Gram matrix is singular"):
        run(config_for(model_dir("llama"), text, tmp_path, solver="gptq", options={}))


def test_overflow_in_half_precision_names_the_block(model_dir, text, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e20
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e20
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"block 1.*(not finite|NaN or infinite)"):
        run(config_for(path, text, tmp_path, options={}, solver="rtn"))


def test_tokenizer_of_another_model_is_refused(model_dir, text, tmp_path):
    import shutil

    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: i + 1000 for word, i in tokenizer["model"]["vocab"].items()}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer and model do not belong together"):
        run(config_for(path, text, tmp_path))


def test_ratio_interval_covers_the_truth():
    """Bootstrap over windows on simulated losses: about 95% of the intervals hold the true ratio."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        base = 3 + torch.randn(60, generator=generator, dtype=torch.float64)
        change = 0.05 + 0.1 * torch.randn(60, generator=generator, dtype=torch.float64)
        low, high = ratio_interval(base + change, base)
        covered += low <= float(torch.tensor(0.05).exp()) <= high
    assert 0.90 <= covered / 300 <= 0.98


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_epsilon(path: Path) -> None:
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize(
    ("name", "harm"),
    [("model.safetensors", cut), ("model.safetensors", Path.unlink), ("config.json", other_epsilon), ("config.json", Path.unlink)],
    ids=["cut", "deleted", "config edited", "config deleted"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["dequantized", "bitplane"])
def test_a_damaged_checkpoint_is_not_taken_for_done(kind, name, harm, model_dir, text, tmp_path):
    config = config_for(
        model_dir("llama"), text, tmp_path, save=tmp_path / "saved", format=kind, solver="rtn", options={}
    )
    run(config)
    written = (tmp_path / "saved" / name).read_bytes()
    stamp = (tmp_path / "saved" / name).stat().st_mtime_ns
    run(config)
    assert (tmp_path / "saved" / name).stat().st_mtime_ns == stamp, "what is whole is not written again"
    harm(tmp_path / "saved" / name)
    changed = (tmp_path / "saved" / name).exists() and (tmp_path / "saved" / name).read_bytes()
    assert changed != written
    with pytest.raises(InputError, match="saved is not empty; use another directory or --overwrite"):
        run(config)
    if changed:  # perhaps by the person: not what this toolkit wrote
        with pytest.raises(InputError, match=f"{name} was changed since it was written"):
            run(replace(config, overwrite=True))
        assert (tmp_path / "saved" / name).read_bytes() == changed
        (tmp_path / "saved" / name).unlink()
    run(replace(config, overwrite=True))
    assert (tmp_path / "saved" / name).read_bytes() == written


def test_overwrite_saves_again(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, save=tmp_path / "saved", solver="rtn", options={})
    run(config)
    stamp = (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns
    run(replace(config, overwrite=True))
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns > stamp


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors", "bitplane"])
def test_a_packed_format_of_nothing_quantized_is_refused_before_work(kind, model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, wbits=16, options={}, save=tmp_path / "saved", format=kind)
    with pytest.raises(InputError, match=f"{kind} holds quantized weights, .*: use format dequantized"):
        run(config)
    assert not (tmp_path / "run").exists()
    run(replace(config, format="dequantized"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


def with_a_faint_linear(source: Path, target: Path) -> Path:
    """A copy of a model with a linear whose scales are all too small for float16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-6
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_late_refusal_loses_no_scores(model_dir, text, tmp_path, monkeypatch):
    """What only the answers tell (a linear that learning made faint) comes when they are written: the scores of every
    method are there, and `convert` and another --format take the run as it is."""
    from quant.run.convert import convert

    monkeypatch.setattr("quant.run.inputs.misfit_float16", lambda largest, qmax: None)

    model = with_a_faint_linear(model_dir("llama"), tmp_path / "model")
    config = config_for(model, text, tmp_path, wbits=4, symmetric=True, solver="rtn", options={}, format="gptq",
                        save=tmp_path / "saved")  # fmt: skip
    other = replace(config, solver="gptq", run_dir=tmp_path / "other", save=tmp_path / "other-saved")
    with pytest.raises(RunError, match=r"layers.1.mlp.up_proj: gptq .* cannot hold these exactly: use format bitplane"):
        perform_all([config, other])
    assert not (tmp_path / "saved").exists() and not list(tmp_path.glob(".*"))
    for place in ("run", "other"):
        stored = json.loads((tmp_path / place / "results.json").read_text())
        assert stored["perplexity"]["words"]["quantized"] > 1 and stored["checkpoint_bytes"] == 0
    with pytest.raises(InputError, match="use format bitplane"):
        convert(tmp_path / "run", "gptq", tmp_path / "converted")
    convert(tmp_path / "run", "bitplane", tmp_path / "converted")
    results = run(replace(config, format="bitplane"))
    assert results["checkpoint_bytes"] == sum(f.stat().st_size for f in (tmp_path / "saved").iterdir())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["checkpoint_bytes"] > 0


def test_a_format_that_was_chosen_falls_back(model_dir, text, tmp_path, caplog):
    from quant.export.read import QuantizedCheckpoint
    from quant.run.choice import in_packed_format

    model = with_a_faint_linear(model_dir("llama"), tmp_path / "model")
    config = config_for(model, text, tmp_path, wbits=4, symmetric=True, solver="rtn", options={}, packed=True,
                        save=tmp_path / "saved")  # fmt: skip
    config = in_packed_format(config)
    assert (config.output.format, config.output.fallback) == ("gptq", "bitplane")
    assert in_packed_format(replace(config, target="gptqmodel")).output.fallback is None, "the target may not load that"
    stored = Request.from_json(config.to_json(), "the manifest", Allowed(paths=True))
    written = {"run_dir": config.output.run_dir, "save": config.output.save, "cache_dir": config.session.cache_dir}
    assert replace(stored, **written) == config, "all of it but where to write"
    run(config)
    assert "cannot hold these exactly: use format bitplane; saved as bitplane" in caplog.text
    assert QuantizedCheckpoint(tmp_path / "saved").format.name == "bitplane"
    stamp = (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns == stamp, "the fallback is what was asked for"


def in_float16(source: Path, target: Path) -> Path:
    """A copy of a model in float16 whose last linear reaches float16's largest number in every row."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = {name: tensor.half() for name, tensor in load_file(target / "model.safetensors").items()}
    last = tensors["model.layers.2.mlp.down_proj.weight"].float()
    tensors["model.layers.2.mlp.down_proj.weight"] = (last / last.abs().amax(1, keepdim=True) * 65504).half()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return target


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "rtn", "options": {}, "wbits": 2},
        {"solver": "gptq", "options": {}, "wbits": 4, "symmetric": True},
        {"solver": "quantease", "options": {"num_iter": 4, "outlier": 0.02, "refit_grid": True}, "group_size": 16},
        {"solver": "spqr", "options": {"outlier": 0.3}, "group_size": 16},
        {"solver": "spqr", "options": {}, "symmetric": True},
    ],
    ids=lambda options: f"{options['solver']} {options.get('symmetric', False)}",
)
def test_what_is_saved_in_float16_is_finite_and_what_was_evaluated(options, model_dir, text, tmp_path):
    from safetensors.torch import load_file

    model = in_float16(model_dir("llama"), tmp_path / "model")
    results = run(config_for(model, text, tmp_path, save=tmp_path / "saved", full_precision_eval=False, **options))
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16 and bool(torch.isfinite(tensor).all()), name
    assert float(tensors["model.layers.2.mlp.down_proj.weight"].abs().max()) > 50000, "the test reaches the end"
    again = run(config_for(tmp_path / "saved", text, tmp_path, wbits=16, options={}, run_dir=tmp_path / "again"))
    perplexity = results["perplexity"]["words"]["quantized"]
    assert again["perplexity"]["words"]["fp"] == pytest.approx(perplexity, rel=1e-6)
    assert "largest" not in (tmp_path / "run" / "manifest.json").read_text(), "it follows from the model"


def test_values_that_the_checkpoint_cannot_hold_stop_the_run_at_their_block(model_dir, text, tmp_path, monkeypatch):
    """A solver that does not keep to the bound: nothing of it is written."""
    from quant import solvers as registry

    def beyond(weight, stats, spec):
        answer = registry.get_solver("rtn")(weight, stats, spec)
        scale = answer.grid.scale * (1e6 if float(weight.abs().max()) > 1000 else 1)
        return replace(answer, grid=replace(answer.grid, scale=scale))

    monkeypatch.setitem(registry._solvers, "gptq", beyond)
    monkeypatch.setitem(registry._declarations, "gptq", registry.Declaration())
    model = in_float16(model_dir("llama"), tmp_path / "model")
    with pytest.raises(RunError, match=r"block 2 mlp.down_proj.weight: not every value is finite in float16"):
        run(config_for(model, text, tmp_path, solver="gptq", options={}))
    assert len(list((tmp_path / "run" / "blocks").iterdir())) == 2


def edit_block(path: Path, change) -> None:
    """Change the tensors of a block's file and keep what it says of them."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


HARM = {
    "codes": (lambda t: t["mlp.up_proj.codes"][0].bitwise_xor_(1), "another hash than when they were written"),
    "scales": (lambda t: t["mlp.up_proj.scale"].mul_(2), "another hash than when they were written"),
    "gone": (None, "00001.safetensors is missing; the command of the run solves it again"),
}


@pytest.mark.parametrize("case", HARM)
def test_blocks_are_what_was_solved(case, model_dir, text, tmp_path):
    from quant.run.convert import convert
    from quant.run.packed_model import load_resident, open_run

    change, message = HARM[case]
    config = config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={})
    run(config)
    file = tmp_path / "run" / "blocks" / "00001.safetensors"
    file.unlink() if change is None else edit_block(file, change)
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "run", "bitplane", tmp_path / "out")
    with pytest.raises(InputError, match=message):
        load_resident(open_run(tmp_path / "run", tmp_path, torch.float32).quantized(), torch.device("cpu"))
    if change is not None:
        with pytest.raises(InputError, match=message):
            run(replace(config, limit=6))
        with pytest.raises(InputError, match=message):
            RunDirectory(tmp_path / "run").read_changed(1)


def test_illegal_codes_with_a_right_hash_are_refused(model_dir, text, tmp_path, monkeypatch):
    from quant.run import directory as journal

    run(config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}))
    edit_block(tmp_path / "run" / "blocks" / "00001.safetensors", lambda t: t["mlp.up_proj.codes"].fill_(200))
    monkeypatch.setattr(journal.RunDirectory, "_verify", lambda *given: None)
    with pytest.raises(InputError, match=r"00001.safetensors is damaged .codes must be uint8 in 0..7"):
        RunDirectory(tmp_path / "run").read_weights(1)


@pytest.mark.parametrize("content", ["{}", "[]", '{"request": {}, "model": {}}', '{"request": 1}'])
def test_a_manifest_of_nothing_is_one_line(content, model_dir, text, tmp_path):
    from quant.run.packed_model import open_run

    config = config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={})
    run(config)
    (tmp_path / "run" / "manifest.json").write_text(content)
    for action in (lambda: open_run(tmp_path / "run", tmp_path), lambda: run(config)):
        with pytest.raises(InputError, match="manifest.json") as error:
            action()
        assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_ends_where_one_on_the_cpu_does(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, true_sequential=True)
    here = run(replace(config, device="cpu", run_dir=tmp_path / "cpu"))
    there = run(replace(config, device="cuda", dtype="float32"))
    assert there["mean_relative_error"] == pytest.approx(here["mean_relative_error"], rel=0.02)
    for key in ("fp", "quantized"):
        scores = [r["perplexity"]["words"][key] for r in (there, here)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3 if key == "fp" else 0.02)
    assert 0 < there["peak_bytes"]["device"] < 1 << 30 and here["peak_bytes"]["device"] == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["device"] == "cuda"


@pytest.mark.parametrize(
    ("method", "solver", "learned"),
    [
        ("omniquant", "rtn", "omniquant"),
        ("omniquant+gptq", "gptq", "omniquant"),
        ("omniquant + quantease", "quantease", "omniquant"),  # as tables of earlier versions named their runs
        ("mine+more", "rtn", "mine+more"),  # a plus of the name itself
        ("mine+more+gptq", "gptq", "mine+more"),
    ],
)
def test_the_method_that_learned_is_told_by_the_solver(method, solver, learned):
    from quant.run.resume import method_that_learned

    assert method_that_learned({"method": method, "solver": solver}) == learned
