"""Runs on a rotated model: what is solved, tuned, evaluated, packed, saved, converted and resumed is one model."""

import json

import pytest
import torch
from safetensors.torch import load_file

import main as main_command
import model_quantizer
from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.export.read import open_checkpoint
from quant.learn.config import Rotation
from quant.run.convert import convert
from quant.run.packed_model import load_resident, open_quantized, open_run
from quant.run.request import Request
from quant.run.stored import Allowed
from quant.tune.config import Tuning
from tests.helpers import CPU, asked, called, config_for, perform, replace

FOLDED, ALL = Rotation(("residual", "vo")), Rotation()


@pytest.fixture
def run(model_dir, text, tmp_path):
    """A small run of a model whose head is tied, rotated, rounded to nearest in 4 bits."""

    def request(**options) -> Request:
        given = {"model": str(model_dir("llama gqa, tied"))} | {
            "wbits": 4,
            "solver": "rtn",
            "options": {},
            "nsamples": 4,
            "limit": 4,
            "rotation": FOLDED,
        }
        given |= options
        return config_for(given.pop("model"), text, tmp_path, **given)

    return request


def measured(path, text, tmp_path, packed=False) -> float:
    """Perplexity of a checkpoint by itself."""
    request = config_for(path, text, tmp_path, wbits=16, limit=4, options={}, run_dir=tmp_path / "again", packed=packed)
    return perform(replace(request, overwrite=True))["perplexity"]["words"]["fp"]


@pytest.mark.parametrize("kind", ["dequantized", "gptq_v2", "compressed-tensors", "bitplane"])
def test_folded_rotations_are_saved_as_a_plain_model(kind, run, model_dir, text, tmp_path):
    model = model_dir("llama" if kind == "gptq_v2" else "llama gqa, tied")  # it needs 32 outputs
    results = perform(run(save=tmp_path / "saved", format=kind, model=str(model)))
    saved = tmp_path / "saved"
    assert measured(saved, text, tmp_path) == pytest.approx(results["perplexity"]["words"]["quantized"], rel=1e-6)
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(saved / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(tensors)
    assert all(bool((t == 1).all()) for name, t in tensors.items() if name.endswith("norm.weight"))
    assert not any("rotation" in name for name in tensors)


def test_rotations_as_the_model_runs_are_kept_by_our_format(run, text, tmp_path):
    act = ActSpec(bits=8, kv_bits=4)
    results = perform(run(save=tmp_path / "saved", format="bitplane", rotation=ALL, act=act))
    expected = results["perplexity"]["words"]["quantized"]
    assert measured(tmp_path / "saved", text, tmp_path) == pytest.approx(expected, rel=1e-6)
    names = list(load_file(tmp_path / "saved/model.safetensors"))
    for ending in ("self_attn.online_heads", "mlp.down_proj.online_left", "mlp.down_proj.online_right"):
        assert sum(name.endswith(ending) for name in names) == 3
    with pytest.raises(
        InputError,
        match=r"a plain checkpoint cannot hold matrices behind norms or in front of linears: use format bitplane",
    ):
        convert(tmp_path / "saved", "dequantized", tmp_path / "plain")
    convert(tmp_path / "saved", "bitplane", tmp_path / "copy")
    assert measured(tmp_path / "copy", text, tmp_path) == pytest.approx(expected, rel=1e-6)
    convert(tmp_path / "run", "bitplane", tmp_path / "of-run")
    assert measured(tmp_path / "of-run", text, tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["dequantized", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("online", ["qk", "down"])
def test_other_formats_refuse_them_before_work(kind, online, run, tmp_path):
    request = run(save=tmp_path / "saved", format=kind, rotation=Rotation(("residual", online)))
    with pytest.raises(
        InputError, match=r"cannot hold matrices behind norms or in front of linears: use format bitplane"
    ):
        perform(request)
    assert not (tmp_path / "run/blocks").exists() and not (tmp_path / "saved").exists()


def test_packed_evaluation_and_a_resident_model_are_rotated_too(run, tmp_path):
    request = run(rotation=ALL, act=ActSpec(kv_bits=4))
    plain = perform(request)["perplexity"]["words"]["quantized"]
    packed = perform(replace(request, packed=True, run_dir=tmp_path / "packed"))["perplexity"]["words"]["quantized"]
    assert packed == pytest.approx(plain, rel=1e-4)
    ids = torch.arange(12)[None] * 5
    quantized = open_quantized(str(tmp_path / "run"), tmp_path / "cache")
    model, act = quantized.model, quantized.act
    stream = BlockStream(model, ids, device=CPU, batch=1).capture(model.outside_weights(CPU))
    finished = open_run(tmp_path / "run", tmp_path / "cache")
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, CPU)
        parameters = {f"{name}.weight": w.dequantize() for name, w in finished.quantized().solved(index).items()}
        stream.run(index, weights.with_parameters(parameters), advance=True, act=act)
    right = stream.logits(slice(0, 1), model.outside_weights(CPU))
    resident = load_resident(quantized, CPU)
    from quant.blocks.instrument import instrument

    with instrument(resident.blocks, resident.weights, resident.act), torch.no_grad():
        logits = resident.module(ids, use_cache=False).logits
    torch.testing.assert_close(logits, right, rtol=1e-3, atol=1e-3)


def test_full_precision_is_the_same_function(run, tmp_path):
    plain = perform(run(rotation=None))["perplexity"]["words"]
    turned = perform(run(rotation=ALL, run_dir=tmp_path / "other"))["perplexity"]["words"]
    assert turned["fp"] == pytest.approx(plain["fp"], rel=1e-5) and turned["quantized"] != plain["quantized"]


def test_an_interrupted_run_goes_on_with_the_same_codes(run, tmp_path):
    request = run(solver="quantease", options={"num_iter": 2}, rotation=ALL)
    whole = perform(request)["codes_sha256"]

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    again = replace(request, run_dir=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        perform(again, stop)
    assert perform(again)["codes_sha256"] == whole
    assert perform(replace(request, run_dir=tmp_path / "third", rotation=Rotation(seed=1)))["codes_sha256"] != whole


WITH: dict[str, dict] = {
    "tuning": {"tuning": Tuning(iterations=3), "nsamples": 16},
    "corrected target": {"solver": "quantease", "target_correction": 1.0, "residual_correction": True},
    "saliency": {"solver": "quantease", "saliency": 2},
    "learning": {"learner": "omniquant", "learning": asked(epochs=1, batch=2), "act": ActSpec(8, 8)},
}


@pytest.mark.parametrize("part", WITH)
@pytest.mark.parametrize("rotation", [FOLDED, ALL], ids=["folded", "all"])
def test_what_else_a_run_does_is_done_to_the_rotated_model(part, rotation, run, text, tmp_path):
    results = perform(run(**WITH[part], rotation=rotation, save=tmp_path / "saved", format="bitplane"))
    expected = results["perplexity"]["words"]["quantized"]
    assert measured(tmp_path / "saved", text, tmp_path) == pytest.approx(expected, rel=1e-6)


def test_a_request_is_kept_and_read_back(run):
    request = run(rotation=Rotation(("vo",), 7))
    assert Request.from_json(request.to_json(), "here", Allowed(paths=True)).run.rotation == Rotation(("vo",), 7)
    assert request.session.rotated == request.run.rotation and run(rotation=None).session.rotated is None


def test_a_plain_checkpoint_of_the_model_itself(run, text, tmp_path):
    """16 bits: the rotated model in full precision, as any reader has it."""
    results = perform(run(wbits=16, save=tmp_path / "saved"))
    assert measured(tmp_path / "saved", text, tmp_path) == pytest.approx(results["perplexity"]["words"]["fp"], rel=1e-6)
    model = load_model(str(tmp_path / "saved"), dtype=None, cache_dir=tmp_path, opener=open_checkpoint)
    assert model.checkpoint.extra == ()


@pytest.mark.parametrize("command", [model_quantizer, main_command])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rotate", "sideways"], "--rotate sideways: use residual, vo, qk, down or all"),
        (["--rotate", ""], "--rotate: use residual, vo, qk, down or all"),
        (["--rotate-seed", "3"], "--rotate-seed: give --rotate too"),
    ],
)
def test_flags_are_checked(command, words, says, small, monkeypatch, capsys):
    code, _, err = called(
        command,
        monkeypatch,
        capsys,
        *small,
        "--epochs" if command is main_command else "--num-iter",
        1,
        "--wbits",
        4,
        *words,
    )
    assert code == 2 and says in err


@pytest.mark.parametrize("command", [model_quantizer, main_command])
def test_the_flag_names_kinds(command):
    words = ["--model", "x", "--wbits", "4", *(["--epochs", "0"] if command is main_command else []), "--rotate"]
    assert command.request_from([*words, "all"]).run.rotation == ALL
    assert command.request_from([*words, "vo,residual", "--rotate-seed", "5"]).run.rotation == Rotation(FOLDED.kinds, 5)
    assert command.request_from(words[:-1]).run.rotation is None


def test_a_family_that_cannot_is_told_before_work(model_dir, text, tmp_path):
    request = config_for(model_dir("bloom"), text, tmp_path, rotation=Rotation(("residual",)))
    with pytest.raises(InputError, match="--rotate residual: .*its norms subtract the mean"):
        perform(request)
    assert not (tmp_path / "run").exists()
