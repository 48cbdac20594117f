"""Whole runs that learn: resumed, evaluated again, saved, refused; losses that fall on the demo models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.calibration import evaluation_tokens
from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.run.directory import RunDirectory
from quant.run.resume import check_ranges
from quant.run.session import open_session
from tests.helpers import CPU, DEMO, asked, direct_perplexity, learned_config, long, perform, replace


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon 7b", "falcon 40b", "llama gqa, tied", "qwen3", "gemma2"])
def test_a_saved_learned_model_is_an_ordinary_checkpoint(name, model_dir, text, tmp_path):
    """Scales, shifts (with new biases in Falcon) and matrices of heads are folded: transformers gives our perplexity."""
    learning = replace(
        asked("abq", abits=4, matrix=True, stability=0.3), epochs=3, attention=False, let_lr=0.005, lwc_lr=0.1
    )
    config = learned_config(model_dir(name), text, tmp_path, learning=learning, save=tmp_path / "saved")
    results = perform(config)
    assert len(results["learning"]) == 3
    assert all(log["loss_end"] < 0.95 * log["loss_start"] for log in results["learning"])
    tokens = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(model_dir(name)), seqlen=32, limit=6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert results["perplexity"]["words"]["quantized"] == pytest.approx(direct_perplexity(saved, tokens.ids), rel=2e-5)
    if name.startswith("falcon"):
        assert (
            saved.config.bias and float(saved.state_dict()["transformer.h.0.self_attention.dense.bias"].abs().max()) > 0
        )


def test_activations_alone_and_fixed_ranges(model_dir, text, tmp_path):
    """W16A8: nothing is solved, the transformed weights are kept; ``static`` stores a range for every linear."""
    learning = asked(lwc=False, abits=8, epochs=1)
    errors = {}
    for method in ("per_token", "per_tensor", "static"):
        config = learned_config(model_dir("opt"), text, tmp_path, wbits=16, act=ActSpec(8, 8, method), learning=learning,
                            run_dir=tmp_path / method)  # fmt: skip
        results = perform(config)
        errors[method] = results["fidelity"]["words"]["kl_divergence"]
        assert all(len(log["shifted"]) == 3 for log in results["learning"])
        changed = RunDirectory(tmp_path / method).read_changed(2)
        assert "self_attn.q_proj.weight" in changed.parameters and not RunDirectory(tmp_path / method).read_weights(2)
        assert ("fc2" in changed.input_ranges) == (method == "static")
    assert 0 < errors["per_token"] < errors["per_tensor"]
    assert errors["static"] > errors["per_token"]


def test_kv_cache_alone(model_dir, text, tmp_path):
    config = learned_config(model_dir("llama"), text, tmp_path, wbits=16, learning=None, act=ActSpec(16, 4))
    coarse = perform(config)["fidelity"]["words"]["kl_divergence"]
    config = replace(config, act=ActSpec(16, 8), run_dir=tmp_path / "eight")
    assert 0 < perform(config)["fidelity"]["words"]["kl_divergence"] < coarse / 4


def tensors_of(path: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((path / "blocks").iterdir())]


def test_killed_in_the_middle_of_training_and_continued(model_dir, text, tmp_path):
    """Bit-identical codes, changed tensors and learned parameters."""
    learning = asked("abq", abits=4, epochs=3, batch=2, lwc_lr=0.05)
    whole = learned_config(
        model_dir("llama"), text, tmp_path, learning=learning, act=ActSpec(4, 4), run_dir=tmp_path / "whole"
    )
    perform(whole)
    for stop in (1, 4, 5, 9):
        config = replace(whole, run_dir=tmp_path / f"stopped-{stop}")

        def interrupt(stage: str, done: int, total: int, note: str, stop=stop) -> None:
            if stage == "learn" and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            perform(config, interrupt)
        assert len(tensors_of(config.output.run_dir)) == (stop - 1) // 3
        perform(config)
        for a, b in zip(tensors_of(config.output.run_dir), tensors_of(whole.output.run_dir), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert any(k.startswith("learned/") for k in a) and any(k.startswith("changed/") for k in a)


def test_learned_parameters_are_evaluated_again(model_dir, text, tmp_path):
    """--epochs 0 --resume: the same model; with epochs it goes on from there."""
    learning = asked("affinequant", matrix=True, norm_matrix=True, stability=0.2, epochs=2, batch=2, abits=4)
    first = learned_config(
        model_dir("llama"), text, tmp_path, learning=learning, act=ActSpec(4, 4), learner="affinequant"
    )
    trained = perform(first)
    again = replace(
        first, learning=replace(learning, epochs=0), resume=first.output.run_dir, run_dir=tmp_path / "again"
    )
    repeated = perform(again)
    assert repeated["codes_sha256"] == trained["codes_sha256"]
    assert repeated["perplexity"] == trained["perplexity"]
    more = replace(first, resume=first.output.run_dir, run_dir=tmp_path / "more")
    continued = perform(more)
    for log, before in zip(continued["learning"][:1], trained["learning"], strict=False):
        assert log["loss_start"] == pytest.approx(before["loss_end"], rel=1e-5) and log["loss_end"] < log["loss_start"]
    assert trained["learning"][0]["online_parameters"] == 2 * 32 * 32


def test_a_start_of_another_configuration_is_refused(model_dir, text, tmp_path):
    """The first difference is named; what decides only the training, or the rounding, may differ; no block may lack."""
    learning = asked("affinequant", matrix=True, norm_matrix=True, stability=0.2, epochs=1, batch=6, abits=4)
    first = learned_config(
        model_dir("llama"),
        text,
        tmp_path,
        learning=learning,
        act=ActSpec(4, 4),
        eval_datasets=(),
        learner="affinequant",
    )
    perform(first)
    again = replace(first, resume=first.output.run_dir, run_dir=tmp_path / "again")
    session = open_session(again)
    for other, says in (
        (replace(again, wbits=2), "wbits: 3, here 2"),
        (replace(again, group_size=16), "group_size: -1, here 16"),
        (replace(again, symmetric=True), "symmetric: False, here True"),
        (replace(again, levels=5), "levels: None, here 5"),
        (replace(again, act=ActSpec(8, 4)), "activations, bits: 4, here 8"),
        (replace(again, learner="omniquant"), "method: affinequant, here omniquant"),
        (replace(again, learning=replace(learning, clip=False)), "clip: True, here False"),
        (
            replace(again, learning=asked("affinequant", matrix=True, abits=4)),
            "transform, norm_matrix: True, here False",
        ),
    ):
        with pytest.raises(InputError, match=f"learned for another configuration \\({says}\\)"):
            session.run(other.run, other.output)
    trained = replace(learning, epochs=0, let_lr=1.0, transform=replace(learning.transform, stability=0.5, alpha=0.7))
    allowed = replace(again, learning=trained, solver="gptq", learner="affinequant", run_dir=tmp_path / "allowed")
    session.run(allowed.run, allowed.output)
    file = RunDirectory(first.output.run_dir).block_file(2)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="00002.safetensors is damaged"):
        session.run(again.run, again.output)
    file.unlink()
    with pytest.raises(InputError, match="block 2 was not finished there"):
        session.run(again.run, again.output)
    assert not again.output.run_dir.exists()


def test_a_solver_rounds_on_the_learned_grid(model_dir, text, tmp_path):
    config = learned_config(model_dir("llama"), text, tmp_path)
    perform(config)
    errors = {}
    for solver in ("rtn", "gptq", "quantease", "gptq_quantease"):
        one = replace(config, solver=solver, options={}, resume=config.output.run_dir, run_dir=tmp_path / solver,
                      learning=replace(config.run.learning, epochs=0))  # fmt: skip
        session = open_session(one)
        errors[solver] = session.run(one.run, one.output)["mean_relative_error"]
        for index in range(3):
            for name, weight in RunDirectory(tmp_path / solver).read_weights(index).items():
                learned = RunDirectory(config.output.run_dir).read_weights(index)[name]
                assert torch.equal(weight.grid.scale, learned.grid.scale), (solver, name)
    assert errors["quantease"] < errors["gptq"] < errors["rtn"] and errors["gptq_quantease"] < errors["gptq"]


def test_ranges_from_a_file(model_dir, text, tmp_path):
    """Ones measured elsewhere are used; another model's are refused."""
    config = learned_config(model_dir("llama"), text, tmp_path, learning=asked(lwc=False, epochs=0))
    session = open_session(config)
    names = [f"model.layers.{i}.{name}" for i in range(3) for name in session.model.linear_shapes()]
    sizes = {name: session.model.linear_shapes()[name.split(".", 3)[3]][1] for name in names}
    save_file({name: torch.full((n,), 4.0) for name, n in sizes.items()}, tmp_path / "scales.safetensors")
    given = replace(config, act_scales=tmp_path / "scales.safetensors", run_dir=tmp_path / "given")
    perform(given)
    weight = session.model.block_weights(1, CPU)["mlp.gate_proj.weight"].abs().amax(0)
    both = torch.maximum(weight, session.model.block_weights(1, CPU)["mlp.up_proj.weight"].abs().amax(0))
    scale = RunDirectory(given.output.run_dir).read_learned(1)["norm.post_attention_layernorm.scale"]
    torch.testing.assert_close(scale[0], (4.0 / both).sqrt())
    other = tmp_path / "other.safetensors"
    refused = replace(given, act_scales=other, run_dir=tmp_path / "x")
    whole = {name: torch.ones(n) for name, n in sizes.items()}
    last = "model.layers.2.mlp.down_proj"
    short = {name: vector for name, vector in whole.items() if name != last}
    for wrong in ({"model.layers.0.fc1": torch.ones(3)}, whole | {last: torch.ones(3)}, short):
        save_file(wrong, other)
        with pytest.raises(InputError, match="other.safetensors was not made from this model: it has no"):
            session.run(refused.run, refused.output)
    negative = whole | {last: torch.linspace(-1, 1, sizes[last])}
    for wrong in (negative, whole | {last: torch.full((sizes[last],), math.nan)}):
        save_file(wrong, other)
        with pytest.raises(InputError, match=f"--act-scales .*other.safetensors: {last} has"):
            session.run(refused.run, refused.output)
    save_file(negative, tmp_path / "shifts.safetensors")  # shifts may be negative
    save_file(whole, other)
    shifted = replace(refused, act_shifts=tmp_path / "shifts.safetensors")
    check_ranges(shifted.run, session.model, session.model_sha256)
    with pytest.raises(InputError, match="--act-scales and --act-shifts exchanged"):
        exchanged = replace(refused.run, act_scales=tmp_path / "shifts.safetensors", act_shifts=other)
        session.run(exchanged, refused.output)
    save_file(whole | {last: torch.full((sizes[last],), -math.inf)}, tmp_path / "shifts.safetensors")
    with pytest.raises(InputError, match=f"--act-shifts .*: {last} has entries that are not finite"):
        session.run(shifted.run, shifted.output)
    save_file(whole, other, {"model_sha256": "0" * 64})
    with pytest.raises(InputError, match="not made from this model but from one of hash 000000000000"):
        session.run(refused.run, refused.output)
    save_file(whole, other, {"model_sha256": session.model_sha256})
    check_ranges(refused.run, session.model, session.model_sha256)
    assert not refused.output.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", *long("opt", "bloom", "falcon", "mistral")])
def test_loss_falls_on_every_block_of_the_demo_models(family, tmp_path):
    for method, wbits, abits, matrices in (
        ("omniquant", 3, 16, {}),
        ("affinequant", 4, 4, {"matrix": True, "stability": 0.1}),
        ("abq", 4, 4, {}),
    ):
        config = learned_config(
            DEMO / family, "demo", tmp_path, seqlen=128, nsamples=12, eval_datasets=(), wbits=wbits, learner=method,
            act=ActSpec(abits, abits), run_dir=tmp_path / method,
            learning=asked(method, wbits, abits, epochs=3, lwc_lr=0.05, **matrices),
        )  # fmt: skip
        results = perform(config)
        falls = [log["loss_end"] / log["loss_start"] for log in results["learning"]]
        # Three epochs: of one block the best iterate may be the start, by how a machine rounds.
        assert max(falls) <= 1 and sorted(falls)[-2] < 0.995, (family, method, falls)


@pytest.mark.slow
@pytest.mark.long
def test_planted_outliers_are_learned_away(tmp_path):
    """Norm channels scaled by 30 without changing the function: W4A4 with LET ends where the plain model does."""
    from quant.learn.affine import Affine, apply_seam

    model = load_model(str(DEMO / "llama"), dtype=torch.float32, cache_dir=tmp_path)
    state = load_file(DEMO / "llama" / "model.safetensors")
    storage = next(iter(state.values())).dtype
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, CPU)
        for seam in model.family.seams(model.config):
            if seam.kind == "norm":
                scale = torch.ones(1, model.config.hidden_size)
                scale[0, [5, 40, 77]] = 1 / 30
                weights = apply_seam(weights, seam, model.family.heads(model.config), Affine(scale))
        state |= {f"model.layers.{index}.{k}": v.to(storage) for k, v in weights.named().items()}
    planted = tmp_path / "planted"
    planted.mkdir()
    for file in (DEMO / "llama").iterdir():
        (planted / file.name).write_bytes(file.read_bytes())
    save_file(state, planted / "model.safetensors", {"format": "pt"})
    scores = {}
    for name, path in (("plain", DEMO / "llama"), ("planted", planted)):
        for learning in (None, asked(wbits=4, abits=4, epochs=3, lwc_lr=0.05, let_lr=0.01)):
            config = learned_config(
                path, "demo", tmp_path, seqlen=128, nsamples=16, limit=12, eval_datasets=("demo",), wbits=4,
                act=ActSpec(4, 4), learning=learning, learner="omniquant" if learning else None,
                run_dir=tmp_path / f"{name}-{learning is not None}",
            )  # fmt: skip
            measured = perform(config)["perplexity"]["demo"]
            scores[name, learning is not None] = measured["quantized"]
    assert measured["fp"] == pytest.approx(
        json.loads((tmp_path / "plain-True/results.json").read_text())["perplexity"]["demo"]["fp"], rel=1e-3
    )
    assert scores["planted", True] < 1.03 * scores["plain", True]
    assert scores["planted", False] > 1.3 * scores["planted", True], "the outliers matter"


def test_half_precision_of_another_kind_loses_nothing(model_dir, text, tmp_path):
    """A float16 checkpoint trained in bfloat16: codes come from the checkpoint's own weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama")).half()
    model.save_pretrained(tmp_path / "half")
    for file in model_dir("llama").glob("*token*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    config = learned_config(
        tmp_path / "half", text, tmp_path, dtype="bfloat16", wbits=8, learning=asked(let=False, epochs=0)
    )
    perform(config)
    kept = RunDirectory(config.output.run_dir).read_weights(1)["mlp.up_proj"]
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"].float()
    assert torch.equal(kept.codes, kept.grid.quantize(weight))
    assert not torch.equal(kept.codes, kept.grid.quantize(weight.bfloat16().float())), "bfloat16 would show"


def test_a_matrix_behind_a_norm_cannot_be_saved(model_dir, text, tmp_path):
    config = learned_config(
        model_dir("llama"), text, tmp_path, learning=asked("affinequant", norm_matrix=True), save=tmp_path / "saved"
    )
    with pytest.raises(InputError, match="matrices behind norms.*bitplane"):
        perform(config)
    assert not (tmp_path / "run").exists()
