"""Packed models: the evaluator's numbers, whole models in memory, text."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.cli import generate as command
from quant.core.errors import InputError
from quant.export.read import QuantizedCheckpoint
from quant.kernels.matmul.weight import PackedLinear
from quant.run.convert import convert
from quant.run.directory import RunDirectory
from quant.run.generate import generate
from quant.run.packed_model import load_resident, open_quantized, open_run
from quant.run.request import Request
from quant.run.writing import whole_weights
from tests.helpers import CPU, DEMO, called, long, perform


def run_of(path, text, tmp_path, name="run", **changes):
    config = Request.of(
        model=str(path), nsamples=4, limit=6, solver="rtn", cache_dir=tmp_path / "cache", run_dir=tmp_path / name,
        **({"wbits": 4, "dataset": str(text), "eval_datasets": (str(text),), "seqlen": 32} | changes),
    )  # fmt: skip
    return config, perform(config)


FORMS = {
    "llama gqa, tied": {"group_size": 16},
    "opt": {},
    "bloom": {"act": ActSpec(8, 8), "wbits": 3},
    "falcon 40b": {"symmetric": True},
    "gemma2": {"num_layers": 1},
}


@pytest.mark.parametrize("family", FORMS)
def test_packed_weights_give_the_perplexity_of_the_written_out_ones(family, model_dir, text, tmp_path):
    asked = FORMS[family]
    _, plain = run_of(model_dir(family), text, tmp_path, "plain", **asked)
    _, packed = run_of(model_dir(family), text, tmp_path, "packed", packed=True, **asked)
    assert packed["codes_sha256"] == plain["codes_sha256"]
    for name, entry in plain["perplexity"].items():
        assert packed["perplexity"][name]["quantized"] == pytest.approx(entry["quantized"], rel=2e-5)
        assert packed["perplexity"][name]["fp"] == entry["fp"]
    assert plain["packed_bytes"] == 0 and packed["packed_bytes"] > 0


def test_a_packed_checkpoint_is_evaluated_packed(model_dir, text, tmp_path):
    config, results = run_of(model_dir("llama"), text, tmp_path, save=tmp_path / "saved", format="bitplane")
    base = Request.of(model=str(config.output.save), eval_datasets=(str(text),), seqlen=32, limit=6, packed=True,
                     cache_dir=tmp_path / "cache", run_dir=tmp_path / "base")  # fmt: skip
    evaluated = perform(base)
    (name,) = results["perplexity"]
    assert evaluated["perplexity"][name]["fp"] == pytest.approx(results["perplexity"][name]["quantized"], rel=2e-5)
    assert evaluated["packed_bytes"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", *long("float16")])
def test_half_precision_rounds_written_out_weights_only(dtype, text, tmp_path):
    """Weights that are evaluated packed are code times scale; written out they are rounded to the checkpoint's dtype, in
    a run and from a checkpoint of any format."""
    source, model = DEMO / "llama", tmp_path / "model"
    shutil.copytree(source, model)
    tensors = {n: t.float().to(getattr(torch, dtype)) for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    described = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
    (model / "config.json").write_text(json.dumps(described))
    asked = {
        "wbits": 3,
        "group_size": 32,
        "symmetric": True,
        "dataset": "demo",
        "eval_datasets": ("demo",),
        "seqlen": 64,
    }
    config, plain = run_of(model, text, tmp_path, "plain", save=tmp_path / "saved", **asked)
    _, packed = run_of(model, text, tmp_path, "packed", packed=True, **asked)
    formats = ("gptq", "compressed-tensors", "bitplane")
    for kind in formats:
        convert(config.output.run_dir, kind, tmp_path / kind)
    scores = {}
    for kind, keep in [("saved", False), *((kind, keep) for kind in formats for keep in (False, True))]:
        base = Request.of(model=str(tmp_path / kind), eval_datasets=("demo",), seqlen=64, limit=6, packed=keep,
                         cache_dir=tmp_path / "cache", run_dir=tmp_path / f"eval-{kind}-{keep}")  # fmt: skip
        scores[kind, keep] = perform(base)["perplexity"]["demo"]["fp"]
    written_out, exact = (r["perplexity"]["demo"]["quantized"] for r in (plain, packed))
    assert all(value == written_out for (_, keep), value in scores.items() if not keep)
    assert all(value == pytest.approx(exact, rel=2e-6) for (_, keep), value in scores.items() if keep)
    assert abs(written_out / exact - 1) > 2e-6  # measured 4e-5 and 1e-3
    model_again = QuantizedCheckpoint(tmp_path / "bitplane")
    name = next(n for n in model_again.names() if n.endswith("up_proj.weight"))
    assert str(model_again.read(name).dtype) == f"torch.{dtype}"
    base = Request.of(model=str(tmp_path / "bitplane"), eval_datasets=(), seqlen=64, run_dir=tmp_path / "again",
                     cache_dir=tmp_path / "cache", save=tmp_path / "plain-again")  # fmt: skip
    perform(base)
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("saved", "plain-again"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first), "in its dtype again"


@pytest.mark.parametrize("family", FORMS)
def test_a_model_in_memory_answers_as_its_checkpoint(family, model_dir, text, tmp_path):
    asked = {k: v for k, v in FORMS[family].items() if k != "act"}
    config, _ = run_of(model_dir(family), text, tmp_path, save=tmp_path / "saved", **asked)
    resident = load_resident(open_run(config.output.run_dir, tmp_path, torch.float32).quantized(), CPU)
    reference = AutoModelForCausalLM.from_pretrained(config.output.save, dtype=torch.float32).eval()
    ids = torch.randint(1, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), instrument(resident.blocks, resident.weights, resident.act):
        packed = [m for m in resident.module.modules() if isinstance(m, PackedLinear)]
        assert len(packed) == len(RunDirectory(config.output.run_dir).read_weights(0)) * len(
            [i for i in range(len(resident.blocks)) if i < config.run.num_layers]
        )
        logits = resident.module(ids, use_cache=False).logits
    expected = reference(ids).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    tokens = list(generate(resident, ids, 8))
    with torch.no_grad():
        whole = reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens == whole[0, 20:].tolist()


def test_memory_of_a_model_is_what_is_counted(text, tmp_path):
    path = DEMO / "mistral"
    config, results = run_of(path, text, tmp_path, group_size=64, packed=True)
    resident = load_resident(open_run(config.output.run_dir, tmp_path, torch.float32).quantized(), CPU)
    assert resident.packed_bytes == results["packed_bytes"]
    assert resident.stored_bytes == results["quantized_bytes"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    linears = sum(m.weight.nbytes for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.nbytes for p in model.parameters()) - linears
    assert resident.other_bytes == pytest.approx(rest, rel=0.01)
    total = resident.packed_bytes + resident.other_bytes
    assert total == pytest.approx(results["quantized_bytes"] + rest, rel=0.05)
    assert resident.packed_bytes < linears / 6


def test_text_streams(text, tmp_path, monkeypatch, capsys):
    path = DEMO / "llama"
    config, _ = run_of(path, text, tmp_path, save=tmp_path / "saved", format="bitplane", wbits=8)
    said = []
    for model in (config.output.run_dir, config.output.save, path):  # a run, a packed checkpoint, a plain one
        code, out, _ = called(
            command, monkeypatch, capsys, "--model", model, "--prompt", "Anna went", "--max-new-tokens", 12
        )
        assert code == 0 and out.startswith("Anna went ") and "tokens a second" in out
        said.append(out.splitlines()[0])
    assert said[0] == said[1] and len(said[0].split()) > 6
    warm = ("--temperature", 1.5, "--seed", 3)
    first, second = (
        called(command, monkeypatch, capsys, "--model", path, "--prompt", "Anna went", *warm)[1].splitlines()[0]
        for _ in "ab"
    )
    assert first == second != said[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens 0: use 1 or more"),
        (("--temperature", -1), "--temperature -1: use 0 or more"),
        (("--max-new-tokens", 100000), "the model takes at most"),
        (("--prompt", ""), "--prompt is empty"),
    ],
)
def test_mistakes(words, expected, monkeypatch, capsys):
    path = DEMO / "opt"
    given = {"--model": path, "--prompt": "Anna"} | dict([words])
    code, _, err = called(command, monkeypatch, capsys, *[part for pair in given.items() for part in pair])
    assert code == 2 and expected in err and "Traceback" not in err


def test_runs_that_cannot_be_opened(model_dir, text, tmp_path):
    config, _ = run_of(model_dir("llama"), text, tmp_path)
    copy = tmp_path / "other"
    copy.mkdir()
    for file in model_dir("llama").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(copy)
    save_file(
        {n: t.contiguous() + 1 for n, t in model.state_dict().items()}, copy / "model.safetensors", {"format": "pt"}
    )
    manifest = json.loads((config.output.run_dir / "manifest.json").read_text())
    manifest["request"]["model"] = str(copy)
    (config.output.run_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not the model of the run any more"):
        open_quantized(str(config.output.run_dir), tmp_path / "cache")
    (config.output.run_dir / "results.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        open_quantized(str(config.output.run_dir), tmp_path / "cache")


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    ("kind", "bits", "size"), [pytest.param("nvfp4", 4, 16, marks=pytest.mark.long), ("fp8", 8, -1)]
)
def test_models_in_floats_talk(kind, bits, size, outside, text, tmp_path):
    """Four bits packed, fp8 written out: the logits of the weights that codes stand for. outside: the tied head and embedding too."""
    beyond = {"head_bits": bits} if outside else {}
    run_of(DEMO / "llama", text, tmp_path, wbits=bits, group_size=size, grid_kind=kind, **beyond)
    convert(tmp_path / "run", "dequantized", tmp_path / "plain")
    if not outside:
        convert(tmp_path / "run", "compressed-tensors", tmp_path / "saved")
    plain = load_model(str(tmp_path / "plain"), dtype=torch.float32, cache_dir=tmp_path / "cache")
    ids = torch.arange(24)[None]
    expected = torch.func.functional_call(plain.module, whole_weights(plain, CPU), (ids,)).logits
    for source in ("run",) if outside else ("run", "saved"):
        resident = load_resident(open_quantized(str(tmp_path / source), tmp_path / "cache", torch.float32), CPU)
        assert (resident.packed_bytes > 0) == (kind != "fp8" or outside)
        with torch.inference_mode(), instrument(resident.blocks, resident.weights, resident.act):
            own = resident.module(ids).logits
        assert float((own - expected).norm() / expected.norm()) < 2e-3  # what is written out is rounded to float16
