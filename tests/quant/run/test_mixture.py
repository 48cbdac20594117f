"""Mixtures of experts in a run: what is known of every expert's inputs, that none is left out, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import generate_act_scale_shift
import main
import model_quantizer
from models.load import load_config, load_model
from quant.blocks.fake_quant import ActSpec, quantize_activations
from quant.blocks.linears import ModuleCall
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.gram import GramStats, shrunk
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.report.experts import experts_plot, tokens_by_expert
from quant.report.page import heat, page
from quant.report.runs import open_run
from quant.run import experts as experts_of_runs
from quant.run import quantize
from quant.run.convert import convert
from quant.run.directory import OUTSIDE, RunDirectory
from quant.run.experts import drawn_others, stages
from quant.run.observe import observe, original_beside
from quant.run.packed_model import open_quantized
from quant.run.plan import estimate
from quant.run.rates import Rates, SolverCost
from quant.run.request import Request
from quant.run.shapes import shapes_of
from quant.run.statistics import Original
from tests.conftest import MIXTURES
from tests.helpers import CPU, called, config_for, perform, replace, same_codes

FORMATS = ("gptq_v2", "compressed-tensors", "bitplane")


def stream_of(path, tokens=24):
    model = load_model(str(path), dtype=torch.float32, cache_dir=path)
    ids = torch.randint(0, 200, (5, tokens), generator=torch.Generator().manual_seed(1))
    return BlockStream(model, ids, device=CPU, batch=2).capture(model.outside_weights(CPU))


def calls_of(stream, weights, index):
    """What the experts of a block are called with in every batch, as float64: hidden states, experts, router's weights."""
    block, found = stream.model.blocks[index], []
    handle = block.mlp.experts.register_forward_pre_hook(lambda m, args: found.append(args))
    for rows, arguments in zip(stream.rows, stream.arguments, strict=True):
        args, kwargs = arguments[index]
        with torch.no_grad():
            functional_call(block, weights.parameters, (stream.hidden[rows], *args), kwargs)
    handle.remove()
    x, experts, share = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x.double(), experts, share.double()


def inner(x, weights, e):
    """What an expert's last linear reads, token by token in float64."""
    gate, up = (weights.weight(f"mlp.experts.{e}.{name}").double() for name in ("gate_proj", "up_proj"))
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)


def means(pairs, share):
    """Mean of the outer products of pairs of rows, weighted by the square of the router's weights."""
    total = sum(w**2 * torch.outer(a, b) for a, b, w in zip(*pairs, share, strict=True))
    return total / sum(w**2 for w in share)


@pytest.mark.parametrize("act", [None, ActSpec(4)])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_statistics_of_experts_are_the_formulas_in_float64(name, act, model_dir):
    """H = n·mean of r²-weighted routed + n0·mean of others, and the products with the original's inputs likewise."""
    stream = stream_of(model_dir(name))
    model, full = stream.model, original_beside(stream)
    before = BlockWeights.read(model, 0, CPU)
    moved = before.with_parameters({k: t * 1.1 for k, t in before.parameters.items() if t.dim() == 2})
    stream.run(0, moved, advance=True)
    full.run(0, before, advance=True)
    weights = BlockWeights.read(model, 1, CPU)
    coarse = weights.with_parameters({k: t * 0.9 for k, t in weights.parameters.items() if "up_proj" in k})
    original = Original(full, weights, model.family.residual_at(model.config))
    stats = observe(stream, 1, coarse, model.groups_at(1), act, original)
    assert set(stats) == {group[0] for group in model.groups_at(1)}

    def rounded(x):
        return x if act is None else quantize_activations(x.float(), act.bits).double()

    x, experts, share = calls_of(stream, coarse, 1) if act is None else observed_calls(stream, coarse, 1, act)
    exact = calls_of(full, weights, 1)[0]
    for e in range(4):
        routed = [t for t in range(len(x)) if e in experts[t]]
        weight = [float(share[t][experts[t] == e]) for t in routed]
        read, other = rounded(x), exact
        for linear, n_in in ((f"mlp.experts.{e}.gate_proj", 32), (f"mlp.experts.{e}.down_proj", 32)):
            others = list(range(len(x)))
            if linear.endswith("down_proj"):
                read, other = rounded(inner(rounded(x), coarse, e)), inner(exact, weights, e)
                others = drawn_others(len(x), torch.tensor(routed), n_in // 2, 1_000_003 + e).tolist()
                assert not set(others) & set(routed) and len(others) == min(n_in // 2, len(x) - len(routed))
            own, n0 = stats[linear], n_in // 2
            for found, left in ((own.calibration.gram, read), (own.calibration.cross, other)):
                expected = len(routed) * means((left[routed], read[routed]), weight)
                expected = expected + n0 * means((left[others], read[others]), [1.0] * len(others))
                torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))
            assert own.routed == len(routed) and own.calibration.n_tokens == len(routed) + n0
            assert own is stats[linear], "asked for again, not made again"


def observed_calls(stream, weights, index, act):
    """As `calls_of`, with quantized inputs of all linears."""
    found = []
    stream.run(index, weights, observe={ModuleCall("mlp.experts"): found.append}, act=act)
    x, experts, share = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x.double(), experts, share.double()


def test_shrinking_keeps_what_only_one_side_knows():
    torch.manual_seed(0)
    x, y, s = torch.randn(7, 3), torch.randn(11, 3), torch.rand(7)
    own, others, none = (GramStats(3) for _ in range(3))
    own.update(x, weights=s)
    others.update(y)
    routed, mean = (x.T * s) @ x / s.sum(), y.T @ y / 11
    torch.testing.assert_close(shrunk(own, float(s.sum()), others, 4).gram, 7 * routed + 4 * mean)
    torch.testing.assert_close(shrunk(none, 0.0, others, 4).gram, 4 * mean)
    torch.testing.assert_close(shrunk(own, float(s.sum()), none, 4).gram, 7 * routed)
    assert shrunk(own, float(s.sum()), others, 4).n_tokens == 11 and shrunk(own, 0.0, others, 4).n_tokens == 4
    assert float(shrunk(none, 0.0, none, 4).gram.abs().max()) == 0.0


def test_experts_and_what_is_shared_beside_them_are_one_stage(model_dir, tmp_path):
    model = load_model(str(model_dir("qwen2_moe")), dtype=None, cache_dir=tmp_path)
    first, second = (stages(model.groups_at(index)) for index in range(2))
    assert [len(stage) for stage in first] == [1, 1, 1, 1] and [len(stage) for stage in second] == [1, 1, 5, 5]
    assert second[3][0] == ("mlp.shared_expert.down_proj",) and second[3][-1] == ("mlp.experts.3.down_proj",)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_codes_and_every_gate_stays(name, model_dir, text, tmp_path):
    """Of the source's tensors, by their names on disk: matrices of blocks have codes, routers and norms are bit for bit the
    same; the formats hold what the run measured, and the library reads what is written out."""
    source = load_file(model_dir(name) / "model.safetensors")
    run = config_for(model_dir(name), text, tmp_path, solver="gptq", options={}, wbits=4, group_size=16, symmetric=True,
                     true_sequential=True, target_correction=1.0, residual_correction=True, nsamples=6, limit=4,
                     save=tmp_path / "saved")  # fmt: skip
    results = perform(run)
    gates = [n for n in source if n.endswith((".gate.weight", "shared_expert_gate.weight"))]
    matrices = [n for n, t in source.items() if t.dim() == 2 and ".layers." in n and n not in gates]
    assert len(gates) >= 1 and sum(".experts." in n for n in matrices) % 12 == 0
    for kind in FORMATS:
        convert(tmp_path / "run", kind, tmp_path / kind)
        checkpoint = QuantizedCheckpoint(tmp_path / kind)
        on_disk = {checkpoint.layout.on_disk(linear) for linear in checkpoint.linears}
        assert on_disk == {n.removesuffix(".weight") for n in matrices}
        written = load_file(tmp_path / kind / "model.safetensors")
        kept = [n for n in source if n not in matrices]
        assert all(torch.equal(written[n], source[n]) for n in kept)
        ignored = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"].get("ignore")
        assert ignored is None or {n.removesuffix(".weight") for n in gates} <= set(ignored)
    first, *others = (QuantizedCheckpoint(tmp_path / kind) for kind in FORMATS)
    for checkpoint in others:
        names = [f"{linear}.weight" for linear in first.linears]
        assert all(same_codes(first.quantized(n), checkpoint.quantized(n)) for n in names)
    plain = load_file(tmp_path / "saved" / "model.safetensors")
    assert plain.keys() == source.keys() and all(torch.equal(plain[n], source[n]) for n in gates)
    again = perform(replace(run, model=str(tmp_path / "bitplane"), wbits=16, options={}, solver="rtn", save=None, target_correction=0.0,
                            residual_correction=False, true_sequential=False, run_dir=tmp_path / "again"))  # fmt: skip
    (measured,), (read,) = results["perplexity"].values(), again["perplexity"].values()
    assert read["fp"] == pytest.approx(measured["quantized"], rel=1e-5)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ours = load_model(str(tmp_path / "bitplane"), dtype=torch.float32, cache_dir=tmp_path, opener=open_checkpoint)
    weights, ids = dict(ours.outside_weights(CPU)), torch.arange(40).view(2, 20)
    for index in range(2):
        own = ours.block_weights(index, CPU)
        weights |= {f"model.layers.{index}.{n}": t for n, t in own.items()}
    with torch.no_grad():
        logits = functional_call(ours.module, weights, (ids,), {"use_cache": False}).logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    records = [record for block in RunDirectory(tmp_path / "run").finished_blocks() for record in block.records]
    tokens = {r.name: r.n_tokens for r in records if ".experts." in r.name and r.block == 1}
    assert sum(n for linear, n in tokens.items() if linear.endswith("gate_proj")) == 2 * 6 * 32
    assert all(tokens[f"mlp.experts.{e}.gate_proj"] == tokens[f"mlp.experts.{e}.down_proj"] for e in range(4))


@pytest.mark.parametrize("solver", ["rtn", "quantease", "spqr", "gptaq", "qronos"])
def test_solvers_take_experts(solver, model_dir, text, tmp_path):
    """Each gives a finite perplexity, and the sum of errors over experts is no larger than rounding's."""
    results = perform(
        config_for(model_dir("qwen3_moe, first dense"), text, tmp_path, solver=solver, options={}, nsamples=4)
    )
    (entry,) = results["perplexity"].values()
    assert 1 < entry["quantized"] < 1e4
    records = [r for b in RunDirectory(tmp_path / "run").finished_blocks() for r in b.records if ".experts." in r.name]
    own, nearest = (sum(getattr(r, key) for r in records) for key in ("relative_error", "relative_error_rtn"))
    assert len(records) == 12 and (own == nearest if solver == "rtn" else own < nearest)


@pytest.mark.parametrize("solver", ["gptq", "quantease"])
def test_experts_that_are_solved_at_once_are_those_solved_alone(solver, model_dir, text, tmp_path, monkeypatch):
    """As on a GPU: stacks of three linears of one shape, the last one smaller; every expert has its line in the journal."""
    asked = {"solver": solver, "options": {}, "nsamples": 4, "limit": 4, "target_correction": 1.0}
    run = config_for(model_dir("mixtral"), text, tmp_path, **asked, run_dir=tmp_path / "alone")
    alone, sizes = perform(run), []
    together = quantize.solve_together
    monkeypatch.setitem(experts_of_runs.BYTES_AT_ONCE, "cpu", 3 * experts_of_runs.COPIES * 4 * 32**2)
    monkeypatch.setattr(quantize, "solve_together", lambda *a: sizes.append(len(a[1])) or together(*a))
    at_once = perform(replace(run, run_dir=tmp_path / "at once"))
    assert sizes == 2 * [3, 3, 3, 3]  # two blocks; 32 inputs and outputs each
    (one,), (other,) = alone["perplexity"].values(), at_once["perplexity"].values()
    assert other["quantized"] == pytest.approx(one["quantized"], rel=0.01)
    lines = [
        [r for b in RunDirectory(tmp_path / name).finished_blocks() for r in b.records] for name in ("alone", "at once")
    ]
    for first, second in zip(*lines, strict=True):
        assert (first.block, first.name, first.n_tokens) == (second.block, second.name, second.n_tokens)
        assert second.relative_error == pytest.approx(first.relative_error, rel=0.03)
        assert second.relative_error_rtn == pytest.approx(first.relative_error_rtn, rel=0.01) and second.seconds > 0


def test_quantized_activations_and_packed_weights_agree(model_dir, text, tmp_path):
    asked = {"solver": "rtn", "options": {}, "wbits": 4, "act": ActSpec(4, 4), "nsamples": 2, "limit": 4}
    for name in ("mixtral", "qwen3_moe"):
        run = config_for(model_dir(name), text, tmp_path, **asked, run_dir=tmp_path / name)
        plain = perform(run)
        packed = perform(replace(run, packed=True, run_dir=tmp_path / f"{name} packed"))
        assert packed["codes_sha256"] == plain["codes_sha256"] and packed["packed_bytes"] > 0
        for one, entry in plain["perplexity"].items():
            assert packed["perplexity"][one]["quantized"] == pytest.approx(entry["quantized"], rel=2e-5)
            assert entry["quantized"] != entry["fp"]


def test_head_and_embedding_of_a_mixture_are_quantized_too(model_dir, text, tmp_path):
    """The checkpoint measures what the run measured, experts and head from their codes."""
    asked = {
        "solver": "gptq",
        "options": {},
        "wbits": 4,
        "head_bits": 8,
        "embedding_bits": 8,
        "nsamples": 4,
        "limit": 4,
    }
    run = config_for(model_dir("mixtral"), text, tmp_path, **asked)
    results = perform(run)
    answers = RunDirectory(tmp_path / "run").read_weights(OUTSIDE)
    assert sorted(answers) == ["lm_head", "model.embed_tokens"]
    assert results["model_bits_per_weight"] < 9
    convert(tmp_path / "run", "bitplane", tmp_path / "bitplane")
    assert {"lm_head", "model.embed_tokens"} <= open_quantized(
        str(tmp_path / "bitplane"), tmp_path / "cache"
    ).outside().keys()
    again = perform(replace(run, model=str(tmp_path / "bitplane"), wbits=16, solver="rtn", head_bits=None,
                            embedding_bits=None, run_dir=tmp_path / "again"))  # fmt: skip
    (measured,), (read,) = results["perplexity"].values(), again["perplexity"].values()
    assert read["fp"] == pytest.approx(measured["quantized"], rel=1e-6) != measured["fp"]


def test_an_expert_without_tokens_is_solved_on_all_and_named(model_dir, text, tmp_path, caplog):
    """Of four experts two are out of every token's reach."""
    model = shutil.copytree(model_dir("qwen3_moe"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for index in range(2):
        row = tensors[f"model.layers.{index}.mlp.gate.weight"][:1]
        tensors[f"model.layers.{index}.mlp.gate.weight"] = torch.cat([row, -row, 0 * row, 0 * row])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    declared = json.loads((model / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (model / "config.json").write_text(json.dumps(declared))
    results = perform(config_for(model, text, tmp_path, solver="gptq", options={}, nsamples=4, target_correction=0.5))
    assert results["verdicts"]["bad"] == 0
    records = [r for b in RunDirectory(tmp_path / "run").finished_blocks() for r in b.records if ".experts." in r.name]
    lonely = {r.name for r in records if r.n_tokens == 0}
    assert lonely == {f"mlp.experts.{e}.{part}_proj" for e in (2, 3) for part in ("gate", "up", "down")}
    assert all(r.verdict == "look" and r.relative_error < r.relative_error_rtn for r in records if r.name in lonely)
    assert "block 0 mlp.experts.2.gate_proj: no calibration token was routed to it" in caplog.text


REFUSED = ("--rotate vo", "--column-scales", "--tune block", "--saliency 2", "--avg-bits 3.5", "--bias-correction")


@pytest.mark.parametrize("flags", REFUSED)
@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
def test_what_mixtures_are_not_offered_is_one_line(flags, plan, model_dir, text, tmp_path, monkeypatch, capsys):
    words = ["--model", model_dir("mixtral"), "--dataset", text, "--eval-datasets", text, "--seqlen", 32, "--nsamples", 2,
             "--run-dir", tmp_path / "run", *flags.split(), *plan, *(() if "bits" in flags else ("--wbits", 4))]  # fmt: skip
    code, _, errors = called(model_quantizer, monkeypatch, capsys, *words)
    assert code == 2 and len(errors.strip().splitlines()) == 1, errors
    assert flags.split()[0] in errors and "not for mixtures of experts (mixtral)" in errors
    assert not (tmp_path / "run").exists()


def test_learned_methods_refuse_mixtures(model_dir, text, tmp_path, monkeypatch, capsys):
    words = ["--model", model_dir("qwen3_moe"), "--calib_dataset", text, "--eval-datasets", text, "--seqlen", 32, "--nsamples", 2,
             "--run-dir", tmp_path / "run", "--wbits", 4, "--lwc"]  # fmt: skip
    code, _, errors = called(main, monkeypatch, capsys, *words)
    assert code == 2 and "omniquant: not for mixtures of experts (qwen3_moe); use rtn" in errors
    model = load_model(str(model_dir("qwen3_moe")), dtype=None, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"^learned methods are not for mixtures of experts \(qwen3_moe\)$"):
        generate_act_scale_shift.measure(type("Opened", (), {"model": model}), None, None)


@pytest.mark.parametrize(
    "name, billions, active",
    [
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("mixtral-8x7b", 46.70, 12.88),
        pytest.param("qwen3-235b-a22b", 235.09, 22.19, marks=pytest.mark.long),
    ],
)
def test_plans_of_large_mixtures_are_the_sums(name, billions, active, tmp_path):
    """Parameters as published; one expert's Gram matrices at a time; passes meet the experts of a token alone."""
    config, _ = load_config(f"benchmarks/configs/{name}", tmp_path, with_weights=False)
    shapes = shapes_of(config)
    kind = shapes.kinds[0]
    assert shapes.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    met = shapes.outside + sum(own.active for own in shapes.kinds)
    assert met / 1e9 == pytest.approx(active, abs=0.03)
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    hidden, count, each = config.hidden_size, config.num_local_experts, config.num_experts_per_tok
    assert len(kind.routed) == 2 * count and kind.share == each / count
    request = Request.of(
        "x", wbits=4, solver="gptq", group_size=32, num_layers=1, true_sequential=True, seqlen=2048, nsamples=8
    )
    plan, tokens = estimate(request, shapes, 2, Rates(1e12, 1e12), SolverCost(square=1e-12)), 8 * 2048
    assert plan["device bytes: statistics"] == 4 * (
        3 * max(hidden, inner) ** 2 + max(hidden, inner if inner > hidden else hidden) ** 2
    )
    assert plan["host bytes: hidden states"] == 2 * tokens * hidden * 2
    blocks = {n: 1 + 1 / -(-n // 512) for n in (hidden, inner, config.num_attention_heads * 128)}
    grams = (1 + 1 + each) * blocks[hidden] * hidden**2 + each * blocks[inner] * inner**2
    heads = config.num_attention_heads * 128
    assert plan["seconds: gram"] == pytest.approx(tokens * (grams + blocks[heads] * heads**2) / 1e12)
    solved = sum(out * n_in**2 for _, out, n_in in kind.linears)
    assert plan["seconds: solve"] == pytest.approx(1e-12 * solved)
    assert solved > count * 2 * inner * hidden**2


def test_the_page_has_a_picture_of_experts_and_one_line_for_all(model_dir, text, tmp_path):
    run = config_for(model_dir("qwen2_moe"), text, tmp_path, solver="rtn", options={}, nsamples=2)
    perform(run)
    opened = open_run(tmp_path / "run")
    tokens = tokens_by_expert(opened)
    assert {block for block, _ in tokens} == {1} and sum(tokens.values()) == 2 * 2 * 32
    html, pictures = page([opened], "a mixture", tmp_path)
    assert "experts" in pictures and "<h2>Experts</h2>" in html
    assert "<image" not in html, "the page shows no images"
    columns = heat(opened.records)["names"]
    together = [f"mlp.experts.#.{part}_proj" for part in ("gate", "up", "down")]
    assert [name for name in columns if ".experts." in name] == together
    own = [
        r["relative_error"]
        for r in opened.records
        if r["name"].startswith("mlp.experts.") and r["name"].endswith("up_proj")
    ]
    assert heat(opened.records)["rows"][1]["cells"][columns.index(together[1])]["error"] == pytest.approx(sum(own) / 4)
    dense = replace_records(opened, [r for r in opened.records if ".experts." not in r["name"]])
    assert experts_plot(dense) is None and tokens_by_expert(dense) == {}


def replace_records(run, records):
    return dataclasses.replace(run, records=records)
