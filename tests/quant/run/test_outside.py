"""Head and embedding: solved on their own inputs, deployed, counted, saved, read back, continued, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import main as main_command
import model_quantizer
from models.load import load_model
from models.vocabulary import Vocabulary, vocabulary_of
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.evaluate import passes, perplexity, scorer
from quant.export.read import QuantizedCheckpoint
from quant.run import outside
from quant.run.config import RunConfig
from quant.run.content import PART
from quant.run.convert import convert
from quant.run.directory import OUTSIDE, RunDirectory
from quant.run.packed_model import load_resident, open_quantized
from quant.run.plan import estimate, outside_cost, solver_bytes
from quant.run.rates import Rates, SolverCost
from quant.run.repeat import repeat
from quant.run.request import Request
from quant.run.session import open_session
from quant.run.shapes import Kind, Shapes
from quant.run.stored import Allowed
from quant.solvers.gptq import gptq
from quant.solvers.rtn import rtn
from tests.conftest import LLAMA, save_tokenizer
from tests.helpers import CPU, DEMO, perform, replace

WORDS = 288  # of the vocabulary: a multiple of 32
FAMILIES = {"untied": ("llama", False), "tied": ("llama", True), "scaled": ("gemma2", True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random models with a head of their own, a tied one, and a tied one whose embedding scales."""
    made = {}
    for name, (kind, tied) in FAMILIES.items():
        torch.manual_seed(7)
        options = LLAMA | {"vocab_size": WORDS, "num_hidden_layers": 2, "tie_word_embeddings": tied}
        options |= {"sliding_window": 8} if kind == "gemma2" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        made[name] = tmp_path_factory.mktemp("model") / name
        model.save_pretrained(made[name])
        save_tokenizer(made[name])
    return made


def asked(model, text, place, **more):
    plain = {"wbits": 4, "group_size": 16, "solver": "gptq", "nsamples": 4, "seqlen": 32, "limit": 4}
    files = {
        "dataset": str(text),
        "eval_datasets": (str(text),),
        "cache_dir": place / "cache",
        "run_dir": place / "run",
    }
    return Request.of(model=str(model), **(plain | files | more))


def measured(checkpoint, request, place):
    """Perplexity of a checkpoint, and what its results.json says."""
    again = request.but(
        model=str(checkpoint), wbits=16, head_bits=None, embedding_bits=None, save=None, format="dequantized",
        run_dir=place / f"eval-{checkpoint.name}-{request.output.packed}", options={},
    )  # fmt: skip
    results = perform(again)
    (scores,) = results["perplexity"].values()
    return scores["fp"], results


def quantized_perplexity(results):
    (scores,) = results["perplexity"].values()
    return scores["quantized"]


def head_inputs(model, ids):
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.inference_mode():
        for window in ids:
            model(window[None])
    handle.remove()
    return torch.cat(seen).flatten(0, 1).double()


@pytest.mark.parametrize("corrected", [0.0, 1.0])
def test_the_head_is_solved_on_what_it_reads(models, text, tmp_path, corrected):
    """Against inputs of the head in transformers' own model, and errors in float64."""
    request = asked(models["untied"], text, tmp_path, head_bits=3, target_correction=corrected, save=tmp_path / "saved")
    session = open_session(request)
    session.run(request.run, request.output)
    ids = session.calibration(request.run).ids
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    x, full = head_inputs(quantized, ids), head_inputs(original, ids)
    weight, gram = original.lm_head.weight.detach().double(), x.T @ x
    target = weight
    if corrected:
        damping = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        target = weight + weight @ (full.T @ x - gram) @ torch.linalg.inv(gram + damping)
    answer = RunDirectory(tmp_path / "run").read_weights(OUTSIDE)["lm_head"]
    error = answer.dequantize().double() - target
    expected = float((error @ x.T).square().sum() / (target @ x.T).square().sum())
    line = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[-1])
    assert (line["block"], line["name"], line["shape"], line["bits"]) == (2, "lm_head", [WORDS, 32], 3)
    assert line["n_tokens"] == ids.numel() and line["relative_error_heldout"] > 0
    assert line["relative_error"] == pytest.approx(expected, rel=2e-3)
    assert torch.equal(quantized.lm_head.weight, answer.dequantize())
    if not corrected:
        alone = gptq(weight.float(), GramStats.from_gram(gram.float(), ids.numel()), QuantSpec(3, 16))
        assert (alone.codes == answer.codes).double().mean() > 0.99
        assert line["relative_error"] < line["relative_error_rtn"]


def test_an_embedding_is_rounded_row_by_row_with_a_searched_range(models, text, tmp_path):
    """With columns of equal weight, and better than the range from smallest to largest, which is computed in float64."""
    perform(asked(models["untied"], text, tmp_path, embedding_bits=2, eval_datasets=()))
    weight = load_file(models["untied"] / "model.safetensors")["model.embed_tokens.weight"].double()
    (answer,) = RunDirectory(tmp_path / "run").read_weights(OUTSIDE).values()
    errors = (answer.dequantize().double() - weight).view(WORDS, -1, 16).square().sum(-1)
    groups = weight.view(WORDS, -1, 16)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    plain = (high - low) / 3
    zero = (-low / plain).round()
    codes = ((groups / plain[..., None]).round() + zero[..., None]).clamp(0, 3)
    minmax = ((codes - zero[..., None]) * plain[..., None] - groups).square().sum(-1)
    assert float(errors.sum()) < 0.95 * float(minmax.sum())  # a searched range is worth this much at 2 bits
    alone = rtn(weight.float(), GramStats.from_gram(torch.eye(32)), QuantSpec(2, 16, range="mse"))
    assert torch.equal(alone.codes, answer.codes) and torch.equal(alone.grid.scale, answer.grid.scale)
    line = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[-1])
    assert line["name"] == "model.embed_tokens" and line["method"] == "rtn"
    assert line["relative_error"] == pytest.approx(float(errors.sum() / weight.square().sum()), rel=1e-5)


CASES = {
    "head": ("untied", {"head_bits": 3}, ("dequantized", "gptq_v2", "compressed-tensors", "bitplane")),
    "head of the same bits": ("untied", {"head_bits": 4}, ("gptq_v2", "compressed-tensors")),
    "both": ("untied", {"head_bits": 4, "embedding_bits": 8}, ("dequantized", "bitplane")),
    "tied": ("tied", {"head_bits": 5}, ("dequantized", "bitplane")),
    "scaled": ("scaled", {"embedding_bits": 8}, ("dequantized", "bitplane")),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_measure_what_the_run_measured(case, models, text, tmp_path):
    """From the run and from another checkpoint, written out and packed; and a whole model in memory."""
    name, bits, kinds = CASES[case]
    request = asked(models[name], text, tmp_path, **bits)
    results = perform(request)
    expected, digest = quantized_perplexity(results), results["codes_sha256"]
    full = next(iter(results["perplexity"].values()))["fp"]
    assert expected != full and results["model_bits_per_weight"] > 4
    packed = perform(request.but(packed=True, run_dir=tmp_path / "packed"))
    assert packed["codes_sha256"] == digest and quantized_perplexity(packed) == pytest.approx(expected, rel=2e-5)
    assert next(iter(packed["perplexity"].values()))["fp"] == full
    for kind in kinds:
        convert(tmp_path / "run", kind, tmp_path / kind)
        score, again = measured(tmp_path / kind, request, tmp_path)
        assert score == expected, kind
        if kind == "dequantized":
            continue
        assert again["bits_per_weight"] == pytest.approx(results["bits_per_weight"])
        assert again["model_bits_per_weight"] == pytest.approx(results["model_bits_per_weight"])
        score, again = measured(tmp_path / kind, request.but(packed=True), tmp_path)
        assert score == pytest.approx(expected, rel=2e-5) and again["packed_bytes"] > 0
        convert(tmp_path / kind, "bitplane", tmp_path / f"{kind}-bitplane")
        solved = RunDirectory(tmp_path / "run").read_weights(OUTSIDE)
        back = open_quantized(str(tmp_path / f"{kind}-bitplane"), tmp_path / "cache").outside()
        assert back.keys() == solved.keys() and all(torch.equal(back[n].codes, one.codes) for n, one in solved.items())
    plain = open_quantized(str(tmp_path / kinds[-1]), tmp_path / "cache", torch.float32)
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        logits = called(load_resident(plain, CPU), ids)
        run = called(load_resident(open_quantized(str(tmp_path / "run"), tmp_path / "cache", torch.float32), CPU), ids)
    torch.testing.assert_close(logits, run, rtol=1e-5, atol=1e-5)
    if "dequantized" in kinds:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32)
        ends = vocabulary_of(model)
        assert ends.tied == (name != "untied")
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, run, rtol=1e-3, atol=1e-3)


def called(resident, ids):
    from quant.blocks.instrument import instrument

    with instrument(resident.blocks, resident.weights, resident.act):
        return resident.module(ids, use_cache=False).logits


def test_half_precision_is_what_is_saved(models, text, tmp_path):
    """A head in float16 is deployed as float16 holds it: transformers computes the run's perplexity from the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    save_tokenizer(tmp_path / "half")
    request = asked(tmp_path / "half", text, tmp_path, head_bits=8, save=tmp_path / "saved", dtype="float32")
    session = open_session(request)
    expected = quantized_perplexity(session.run(request.run, request.output))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    stored = load_file(tmp_path / "saved" / "model.safetensors")["lm_head.weight"]
    answer = RunDirectory(tmp_path / "run").read_weights(OUTSIDE)["lm_head"]
    assert stored.dtype == torch.float16 and torch.equal(stored, answer.dequantize().half())
    (tokens,) = session.evaluation.values()
    with torch.inference_mode():
        losses = [theirs(w[None], labels=w[None]).loss.double() for w in tokens.ids]
    assert float(torch.stack(losses).mean().exp()) == pytest.approx(expected, rel=1e-5)


def test_sizes_are_counted(models, text, tmp_path):
    """The whole model by hand: every tensor of its file once, solved ones as they are stored."""
    results = perform(asked(models["untied"], text, tmp_path, head_bits=3, eval_datasets=()))
    tensors = load_file(models["untied"] / "model.safetensors")
    count = sum(t.numel() for t in tensors.values())
    groups = 16 + 4, 16 + 3  # bits of a scale and of a zero point
    linears = [t.numel() for n, t in tensors.items() if ".layers." in n and t.dim() == 2]
    blocks = sum(n * 4 + n // 16 * groups[0] for n in linears)
    head = tensors["lm_head.weight"].numel()
    whole = 32 * (count - sum(linears) - head) + blocks + head * 3 + head // 16 * groups[1]
    assert results["bits_per_weight"] == pytest.approx(blocks / sum(linears))
    assert results["model_bits_per_weight"] == pytest.approx(whole / count)
    assert results["model_bytes"] == -(-whole // 8) and results["head_bits"] == 3 and "embedding_bits" not in results
    base = perform(asked(models["tied"], text, tmp_path / "base", wbits=16, options={}, eval_datasets=()))
    assert base["model_bits_per_weight"] == 32 and "head_bits" not in base


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(models, text, tmp_path, monkeypatch):
    request = asked(models["untied"], text, tmp_path, head_bits=4, embedding_bits=4)
    usual = RunDirectory.write_block

    def write(self, index, *given, **named):
        if index == OUTSIDE:
            raise KeyboardInterrupt
        return usual(self, index, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_block", write)
        with pytest.raises(KeyboardInterrupt):
            perform(request)
    assert not RunDirectory(tmp_path / "run").block_file(OUTSIDE).exists()
    continued = perform(request)
    whole = perform(request.but(run_dir=tmp_path / "whole"))
    assert continued["codes_sha256"] == whole["codes_sha256"]
    assert continued["perplexity"] == whole["perplexity"]
    (tmp_path / "run" / "results.json").unlink()
    solves = []
    with monkeypatch.context() as patch:
        patch.setattr(outside, "_solve", lambda *given: solves.append(given))
        assert perform(request)["codes_sha256"] == whole["codes_sha256"] and not solves
    lines = [json.loads(line)["name"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert lines[-2:] == ["model.embed_tokens", "lm_head"] and len(lines) == 2 * 7 + 2
    assert repeat(tmp_path / "run", tmp_path / "again", Allowed(paths=True), tmp_path / "cache") == []
    file = RunDirectory(tmp_path / "run").block_file(OUTSIDE)
    other = RunDirectory(tmp_path / "other")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    file.write_bytes(file.read_bytes()[:-5] + b"\0\1\2\3\4")
    with pytest.raises(InputError, match="outside.safetensors is damaged"):
        RunDirectory(tmp_path / "run").read_weights(OUTSIDE)
    stale = other.read_summary(OUTSIDE)
    assert other.finished_outside(stale.behind) is not None and other.finished_outside("of other blocks") is None


def test_rows_are_solved_in_parts(models, text, tmp_path, monkeypatch):
    """The same codes, and the line of all rows, as without parts."""
    lines, codes = [], []
    for name, part in (("whole", outside.PART), ("parts", 100 * 32)):
        monkeypatch.setattr(outside, "PART", part)
        perform(asked(models["untied"], text, tmp_path, head_bits=3, eval_datasets=(), run_dir=tmp_path / name))
        lines.append(json.loads((tmp_path / name / "journal.jsonl").read_text().splitlines()[-1]))
        codes.append(RunDirectory(tmp_path / name).read_weights(OUTSIDE)["lm_head"].codes)
    assert float((codes[0] == codes[1]).double().mean()) > 0.999
    for key in ("relative_error", "relative_error_rtn", "relative_error_heldout", "bits_per_weight", "weight_peak"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3), key
    assert lines[1]["shape"] == lines[0]["shape"] and lines[1]["storage_bits"] == lines[0]["storage_bits"]


REFUSED = [
    ("tied", {"head_bits": 4, "embedding_bits": 3}, "lm_head is tied to model.embed_tokens, one tensor of one width"),
    ("tied", {"head_bits": 4, "format": "gptq_v2"}, "is an embedding, which the head is tied to: use format bitplane"),
    ("tied", {"head_bits": 4, "format": "compressed-tensors"}, "is an embedding, which the head is tied to"),
    ("untied", {"embedding_bits": 4, "format": "gptq_v2"}, "model.embed_tokens is an embedding: use format bitplane"),
    ("untied", {"embedding_bits": 4, "format": "compressed-tensors"}, "model.embed_tokens is an embedding"),
    ("untied", {"head_bits": 5, "format": "gptq_v2"}, "gptq_v2 holds 2, 3, 4 or 8 bits, not 5"),
    ("untied", {"head_bits": 1, "symmetric": True}, "--head-bits, --embedding-bits: a symmetric grid of 2 levels"),
    ("untied", {"head_bits": 4, "format": "bitplane", "target": "vllm"}, "vllm"),
    ("untied", {"head_bits": 4, "wbits": 2, "levels": 5, "format": "bitplane"}, "bitplane holds one number of levels"),
]


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_does_not_fit_is_refused_before_work(name, changes, says, models, text, tmp_path):
    request = asked(models[name], text, tmp_path, save=tmp_path / "saved", **changes)
    session = open_session(request)
    with pytest.raises(InputError, match=says):
        session.run(request.run, request.output)
    assert not (tmp_path / "run").exists() and not (tmp_path / "saved").exists()


def test_config_says_what_readers_look_for(models, text, tmp_path):
    perform(asked(models["untied"], text, tmp_path, head_bits=8, symmetric=True, eval_datasets=()))
    for kind in ("gptq", "compressed-tensors"):
        convert(tmp_path / "run", kind, tmp_path / kind)
    gptq_config = QuantizedCheckpoint(tmp_path / "gptq").quantization
    assert gptq_config["lm_head"] is True and gptq_config["bits"] == 4
    assert gptq_config["dynamic"] == {"+:lm_head$": {"bits": 8}}
    theirs = QuantizedCheckpoint(tmp_path / "compressed-tensors").quantization
    assert "lm_head" not in theirs["ignore"]
    assert [g["targets"] for g in theirs["config_groups"].values()] == [["Linear"], ["lm_head"]]
    assert theirs["config_groups"]["group_1"]["weights"]["num_bits"] == 8
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.float32)
    convert(tmp_path / "run", "dequantized", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.arange(20).view(1, 20)
    with torch.inference_mode():
        torch.testing.assert_close(written(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_large_vocabulary_is_evaluated_in_parts(models, text, tmp_path, monkeypatch, local_task):
    """Logits of a few tokens at a time: the same perplexity, divergence, and scores of tasks."""
    results = []
    for name, elements in (("whole", passes.HEAD_ELEMENTS), ("parts", 5 * WORDS)):
        for module in (passes, perplexity, scorer):
            monkeypatch.setattr(module, "HEAD_ELEMENTS", elements)
        request = asked(models["tied"], text, tmp_path, tasks=("mine",), task_path=local_task, run_dir=tmp_path / name)
        results.append(perform(request))
    whole, parts = results
    for name, scores in whole["perplexity"].items():
        for key in ("fp", "quantized"):
            assert parts["perplexity"][name][key] == pytest.approx(scores[key], rel=1e-6)
        assert parts["fidelity"][name] == pytest.approx(whole["fidelity"][name], rel=1e-5)
    assert parts["zero_shot"]["mine"]["quantized"] == whole["zero_shot"]["mine"]["quantized"]


WORDS_OF = {
    "model_quantizer": (model_quantizer, "--wbits 3 --quantization-method rtn"),
    "main": (main_command, "--wbits 3 --eval_ppl --epochs 0"),
}


@pytest.mark.parametrize("command", WORDS_OF)
def test_flags(command):
    module, plain = WORDS_OF[command]
    words = ["--model", "x", *plain.split()]
    request = module.request_from([*words, "--head-bits", "4", "--embedding-bits", "8"])
    assert (request.run.head_bits, request.run.embedding_bits) == (4, 8)
    assert "head_bits" in request.to_json()
    for more, says in (
        ("--head-bits 9", "--head-bits 9: use 1 to 8, or leave it out"),
        ("--embedding-bits 0", "--embedding-bits 0: use 1 to 8"),
        ("--wbits 16 --head-bits 4", "--head-bits 4 quantizes what is outside the blocks besides: give --wbits 1 to 8"),
    ):
        with pytest.raises(InputError, match=says):
            module.request_from([*words, *more.split()])
    if module is model_quantizer:
        with pytest.raises(InputError, match="drop --head-bits and --embedding-bits"):
            module.request_from([*words, "--compare-layers", "--embedding-bits", "4"])


def test_names_of_earlier_runs_stay(models, text, tmp_path):
    request = asked(models["untied"], text, tmp_path)
    session = open_session(request)
    plain = session.configuration(request.run)
    assert not {"head_bits", "embedding_bits"} & plain.keys()
    assert session.configuration(request.but(head_bits=8).run) == plain | {"head_bits": 8}


def test_a_plan_solves_a_vocabulary_in_parts():
    """128k words of 4096 numbers: the Gram matrix, and a solver at work on a part; of a solver of coupled rows on all."""
    ends = Vocabulary("embedding", "head", (128_256, 4096), (128_256, 4096), tied=False)
    kinds = (Kind(10**8, ((("a", 4096, 4096),),)),) * 2
    shapes = Shapes(kinds, 2 * 128_256 * 4096, 4096, 2048, vocabulary=128_256, ends=ends)
    rates, cost, tokens = (
        Rates(1e12, 1e12),
        SolverCost(lambda n_out, n_in: n_in**3, 1e-13, 0.0, 1e-12, 1e-15),
        128 * 2048,
    )
    run = RunConfig(solver="gptq", wbits=4, head_bits=8)
    most, seconds = outside_cost(run, shapes, tokens, 1, rates, cost)
    part = PART // 4096
    assert most == 4 * 4096**2 + solver_bytes(run, part, 4096) < 2e9
    passes_and_gram = tokens * 2 * 10**8 * 2 / 1e12 + tokens * 4096**2 * 1.25 / 1e12
    solving = 128_256 * (4096e-12 + 4096**2 * 1e-15) + -(-128_256 // part) * 4096**3 * 1e-13
    assert seconds == pytest.approx(passes_and_gram + solving, rel=0.1)
    whole, _ = outside_cost(replace(run, solver="spqr"), shapes, tokens, 1, rates, cost)
    assert whole > 128_256 * 4096 * 4
    assert outside_cost(replace(run, head_bits=None), shapes, tokens, 1, rates, cost) == (0, 0)
    request = Request.of("x", solver="gptq", wbits=4, head_bits=8, embedding_bits=4, nsamples=128)
    plan = estimate(request, shapes, 2, rates, cost)
    blocks, other = 2 * 4096**2, 2 * (10**8 - 4096**2)
    bits = blocks * (4 + 20 / 4096) + other * 16 + 128_256 * 4096 * (8 + 24 / 4096 + 4 + 20 / 4096)
    assert plan["bits per weight, whole model"] == pytest.approx(bits / (blocks + other + 2 * 128_256 * 4096))
    assert plan["device bytes: head and embedding"] == pytest.approx(most)
    behind = plan["device bytes: peak"] - shapes.outside * 2
    assert behind < 3e9, "logits of a window of 2048 tokens would be 5 GB"


def test_a_gguf_file_holds_it(tmp_path):
    """Codes of a tied tensor in llama.cpp's blocks: the file as a model has the numbers of the run."""
    bits = {"wbits": 4, "group_size": 32, "symmetric": True, "head_bits": 8, "solver": "rtn", "nsamples": 2}
    perform(asked(DEMO / "llama", "demo", tmp_path, **bits | {"eval_datasets": ()}))
    convert(tmp_path / "run", "gguf", tmp_path / "file")
    (file,) = (tmp_path / "file").glob("*.gguf")
    model = load_model(str(file), dtype=torch.float32, cache_dir=tmp_path / "cache")
    (answer,) = RunDirectory(tmp_path / "run").read_weights(OUTSIDE).values()
    name = "model.embed_tokens.weight"
    assert answer.spec.bits == 8 and "lm_head.weight" not in model.checkpoint
    torch.testing.assert_close(model.outside_weights(CPU)[name], answer.dequantize(), rtol=1e-6, atol=0)
