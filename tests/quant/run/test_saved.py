"""Checkpoints that runs save: they measure what their run measured, whatever was quantized, and come as asked for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import main as main_command
import model_quantizer
from models import container
from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.names import FORMATS, GGUF, MLX, RUNTIMES
from quant.export.read import QuantizedCheckpoint
from quant.run.convert import convert
from quant.run.directory import RunDirectory
from quant.run.request import Request
from quant.run.session import open_session
from tests.helpers import DEMO, called, config_for, demo_config, perform, perplexity, replace

OURS = tuple(kind for kind in FORMATS if kind not in (GGUF, MLX))  # GGUF cuts text otherwise, MLX is not read back


def test_a_gguf_file_reads_back_as_the_numbers_that_the_run_measured(exported, tmp_path):
    """Its tokenizer cuts the demo's text otherwise: words are unigrams there."""
    base, _ = exported
    plain, read = (
        load_model(str(base / f"as-{kind}"), dtype=None, cache_dir=tmp_path) for kind in ("dequantized", GGUF)
    )
    assert len(plain.blocks) == len(read.blocks)
    for index in range(len(plain.blocks)):
        own, other = (model.block_weights(index, torch.device("cpu"), torch.float32) for model in (plain, read))
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_every_format_measures_what_the_run_measured(exported, whole):
    base, results = exported
    expected = results["perplexity"]["text"]["quantized"]
    for kind in OURS:
        measured, bits = perplexity(base / f"as-{kind}", base)
        assert measured == expected, kind
        assert kind == "dequantized" or bits == pytest.approx(results["bits_per_weight"])
        for file in (base / f"as-{kind}").glob("*.json"):
            assert str(whole.parent) not in file.read_text() and str(base) not in file.read_text(), file.name


def test_shards(exported, tmp_path, monkeypatch):
    base, results = exported
    monkeypatch.setattr(container, "SHARD_BYTES", 200_000)
    convert(base / "saved", "gptq_v2", tmp_path / "cut")
    files = sorted(file.name for file in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    whole = load_file(base / "saved/model.safetensors")
    assert index["weight_map"].keys() == whole.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    tensors = {k: v for file in files for k, v in load_file(tmp_path / "cut" / file).items()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in whole.items())
    assert all(
        (tmp_path / "cut" / f).stat().st_size < 400_000 for f in files if len(load_file(tmp_path / "cut" / f)) > 1
    )
    assert perplexity(tmp_path / "cut", tmp_path)[0] == results["perplexity"]["text"]["quantized"]
    first = tmp_path / "cut" / files[0]
    save_file({k: v + 1 for k, v in load_file(first).items()}, first, {"format": "pt"})
    with pytest.raises(InputError, match=f"{files[0]} is not what was written"):
        QuantizedCheckpoint(tmp_path / "cut")


def test_a_quantized_model_is_not_quantized_again(exported, tmp_path):
    with pytest.raises(InputError, match="is quantized already"):
        open_session(demo_config(tmp_path, exported[0] / "saved"))


def test_a_target_that_cannot_load_is_refused_before_work(tmp_path):
    config = demo_config(tmp_path, DEMO / "llama", save=tmp_path / "out", format="gptq", target="vllm")
    session = open_session(config)
    with pytest.raises(InputError, match="--target vllm: with --format gptq, it takes symmetric grids only"):
        session.run(config.run, config.output)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_activation_quantizers_come_back(tmp_path, whole):
    config = replace(
        demo_config(tmp_path, whole, save=tmp_path / "w8a8", format="compressed-tensors"),
        wbits=8, group_size=-1, symmetric=True, act=ActSpec(8),
    )  # fmt: skip
    expected = perform(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "w8a8", tmp_path)[0] == expected
    checkpoint = QuantizedCheckpoint(tmp_path / "w8a8")
    assert checkpoint.act == ActSpec(8) and checkpoint.quantization["format"] == "int-quantized"


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'llama'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def test_classes_that_a_model_brings_come_along(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "model"
    shutil.copytree(DEMO / "llama", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    for name, code in CODE.items():
        (source / name).write_text(code)
    asked = demo_config(tmp_path, source, trust_remote_code=True, save=tmp_path / "saved", format="gptq_v2")
    perform(asked)
    for start, kind in (("run", "dequantized"), ("saved", "bitplane")):
        convert(tmp_path / start, kind, tmp_path / f"{start}-{kind}", trust_remote_code=True)
    for place in ("saved", "run-dequantized", "saved-bitplane"):
        assert json.loads((tmp_path / place / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {name: (tmp_path / place / name).read_text() for name in CODE} == CODE
    evaluated = replace(asked, model=str(tmp_path / "saved"), wbits=16, save=None, format="dequantized",
                        run_dir=tmp_path / "again")  # fmt: skip
    session = open_session(evaluated)
    assert type(session.model.module).__name__ == "OwnModel"
    assert session.run(evaluated.run, evaluated.output)["perplexity"]["text"]["fp"] > 1


QUICK = ["--eval-datasets", "demo", "--seqlen", 64, "--nsamples", 2, "--limit", 2, "--no-report"]


def test_a_plan_shows_who_loads_it_and_refuses_for_a_target(monkeypatch, capsys):
    asked = ["--model", DEMO / "llama", "--dataset", "demo", "--wbits", 4, "--group-size", 32, *QUICK, "--dry-run"]
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *asked, "--sym", "--format", "gptq")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith(RUNTIMES)}
    assert code == 0 and {"transformers", "vllm", "llama.cpp", "auto-gptq"} <= rows.keys()
    assert " yes " in rows["transformers"] and " yes " in rows["auto-gptq"]
    code, _, err = called(model_quantizer, monkeypatch, capsys, *asked, "--format", "gptq", "--target", "vllm")
    assert (
        code == 2
        and "--target vllm: with --format gptq, it takes symmetric grids only" in err
        and "Traceback" not in err
    )
    for flags, expected in (([], "gptq_v2"), (["--sym"], "gptq"), (["--outlier", 0.01], "bitplane")):
        code, out, _ = called(model_quantizer, monkeypatch, capsys, *asked, *flags, "--real_quant")
        assert code == 0 and f"will a {expected} checkpoint of this load?" in out


@pytest.mark.parametrize(
    ("flags", "expected"), [((), "gptq_v2"), (("--sym",), "gptq"), (("--outlier", 0.01), "bitplane")]
)
def test_real_quant_saves_packed(flags, expected, monkeypatch, capsys, tmp_path):
    """model_quantizer.py, as its help says."""
    words = ["--model", DEMO / "llama", "--dataset", "demo", "--wbits", 4, "--group-size", 32, "--num-iter", 2, *QUICK, *flags,
             "--cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "run", "--real_quant", "--save", tmp_path / "out"]  # fmt: skip
    code, _, err = called(model_quantizer, monkeypatch, capsys, *words)
    assert code == 0, err
    assert QuantizedCheckpoint(tmp_path / "out").format.name == expected
    assert model_quantizer.request_from([*map(str, words), "--format", "dequantized"]).output.format == "dequantized"
    assert model_quantizer.request_from([*map(str, words), "--wbits", "16"]).output.format == "dequantized"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--wbits 4 --symmetric", "gptq"), ("--wbits 4", "gptq_v2"), ("--wbits 3 --solver spqr", "bitplane"),
     ("--wbits 4 --abits 8", "bitplane")],
)  # fmt: skip
def test_real_quant_of_learned_methods_saves_packed(flags, expected, model_dir, text, monkeypatch, capsys, tmp_path):
    words = ["--model", model_dir("llama"), "--calib_dataset", text, "--eval_ppl", "--eval-datasets", text, "--seqlen", 32,
             "--nsamples", 4, "--limit", 4, "--epochs", 0, "--no-report", *flags.split(), "--cache-dir", tmp_path / "cache",
             "--run-dir", tmp_path / "run", "--real_quant", "--save_dir", tmp_path / "out"]  # fmt: skip
    code, _, err = called(main_command, monkeypatch, capsys, *words)
    assert code == 0, err
    assert QuantizedCheckpoint(tmp_path / "out").format.name == expected
    results = json.loads((tmp_path / "run/results.json").read_text())["perplexity"]["words"]["quantized"]
    # Packed and written out sum in another order, which moves single activations to the next of their 256 levels.
    near = 1e-4 if "--abits" in flags else 1e-5
    assert read_back(tmp_path / "out", text, tmp_path) == pytest.approx(results, rel=near)
    code, _, err = called(main_command, monkeypatch, capsys, *words, "--limit", 2, "--overwrite", "--save_dir", DEMO)
    assert code == 2 and "holds no checkpoint" in err and "--save " not in err


@pytest.mark.parametrize(("kind", "bits"), [("real", 2 + 32 / 16), ("fractional", 2 + 18 / 16)])
def test_minima_are_kept_resumed_packed_and_read_back(kind, bits, model_dir, text, tmp_path):
    """Run directory, every format that holds them, and a run that stops after its first block."""
    config = config_for(
        model_dir("llama"), text, tmp_path, wbits=2, group_size=16, grid_kind=kind, range="mse", limit=4,
        options={"num_iter": 4, "refit_grid": True}, save=tmp_path / "out", format="bitplane",
    )  # fmt: skip
    results = perform(config)
    assert results["grid_kind"] == kind and results["bits_per_weight"] == bits
    solved = RunDirectory(tmp_path / "run").read_weights(0)
    assert all(weight.spec.kind == kind and weight.grid.minimum is not None for weight in solved.values())
    expected = results["perplexity"]["words"]["quantized"]
    assert read_back(tmp_path / "out", text, tmp_path) == expected
    assert read_back(tmp_path / "out", text, tmp_path, packed=True, overwrite=True) == pytest.approx(expected, rel=1e-5)
    convert(tmp_path / "run", "dequantized", tmp_path / "plain")
    assert read_back(tmp_path / "plain", text, tmp_path) == expected
    for source in ("run", "out"):
        for name in ("gptq", "gptq_v2", "compressed-tensors"):
            with pytest.raises(InputError, match="cannot hold (real minima|fractional ones) .*use format bitplane"):
                convert(tmp_path / source, name, tmp_path / "no")
    first = RunDirectory(tmp_path / "run").block_file(0).read_bytes()
    for block in range(1, 8):
        RunDirectory(tmp_path / "run").block_file(block).unlink(missing_ok=True)
    again = perform(replace(config, save=None, format="dequantized"))
    assert again["codes_sha256"] == results["codes_sha256"]
    assert RunDirectory(tmp_path / "run").block_file(0).read_bytes() == first


def test_formats_of_integer_zeros_refuse_real_minima_before_work(monkeypatch, capsys, tmp_path):
    asked = ["--model", DEMO / "llama", "--dataset", "demo", "--wbits", 4, "--grid", "real", *QUICK]
    for kind in ("gptq", "gptq_v2", "compressed-tensors"):
        words = [*asked, "--run-dir", tmp_path / "run", "--save", tmp_path / "out", "--format", kind]
        code, _, err = called(model_quantizer, monkeypatch, capsys, *words)
        assert code == 2 and "cannot hold real minima (--grid real): use format bitplane" in err
        assert not (tmp_path / "run").exists()
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *asked, "--real_quant", "--dry-run")
    assert code == 0 and "will a bitplane checkpoint of this load?" in out


def test_weights_that_are_only_transformed_are_saved(model_dir, text, monkeypatch, capsys, tmp_path):
    words = ["--model", model_dir("llama"), "--calib_dataset", text, "--eval-datasets", "", "--seqlen", 32, "--nsamples", 4,
             "--epochs", 1, "--no-report", "--wbits", 16, "--abits", 8, "--let", "--cache-dir", tmp_path / "cache",
             "--run-dir", tmp_path / "run", "--save_dir", tmp_path / "out"]  # fmt: skip
    code, _, err = called(main_command, monkeypatch, capsys, *words)
    assert code == 0, err
    norms = [load_file(path / "model.safetensors")["model.layers.0.input_layernorm.weight"]
             for path in (model_dir("llama"), tmp_path / "out")]  # fmt: skip
    assert not torch.equal(*norms), "the transform is in it"


def read_back(path, text, tmp_path, **more):
    config = Request.of(model=str(path), eval_datasets=(str(text),), seqlen=32, limit=4, cache_dir=tmp_path / "cache",
                       run_dir=tmp_path / f"eval-{path.name}", **more)  # fmt: skip
    return perform(config)["perplexity"]["words"]["fp"]


LEARNED = {
    "folded": ("--let --lwc --wbits 4 --abits 16", ("gptq_v2", "compressed-tensors", "bitplane", "dequantized")),
    "matrix": (
        "--let --lwc --use_matrix --wbits 4 --abits 16",
        ("gptq_v2", "compressed-tensors", "bitplane", "dequantized"),
    ),
    "flatquant": ("--method flatquant --let --lwc --wbits 4 --abits 8 --attn_implementation sdpa", ("bitplane",)),
    "matrix behind norms": ("--let --use_matrix --use_ln_matrix --wbits 4 --abits 16", ("bitplane",)),
}


@pytest.mark.parametrize("case", LEARNED)
def test_learned_models_are_what_was_measured_in_every_format(case, model_dir, text, tmp_path):
    flags, kinds = LEARNED[case]
    words = ["--model", model_dir("llama"), "--calib_dataset", text, "--eval_ppl", "--eval-datasets", text, "--seqlen", 32,
             "--nsamples", 4, "--limit", 4, "--epochs", 2, *flags.split(), "--cache-dir", tmp_path / "cache",
             "--run-dir", tmp_path / "run"]  # fmt: skip
    config = main_command.request_from(list(map(str, words)))
    results = perform(config)["perplexity"]["words"]
    assert results["quantized"] != results["fp"]
    for kind in kinds:
        convert(tmp_path / "run", kind, tmp_path / kind)
        assert read_back(tmp_path / kind, text, tmp_path) == pytest.approx(results["quantized"], rel=1e-6), kind
    for kind in set(OURS) - {*kinds, "gptq"}:
        with pytest.raises(InputError, match="use format bitplane"):
            convert(tmp_path / "run", kind, tmp_path / kind)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_gptqs_config_tells_what_the_run_did(sequential, static, tmp_path):
    config = demo_config(tmp_path, DEMO / "llama", true_sequential=sequential, options={"static_groups": static, "act_order": static},
                         num_layers=1, save=tmp_path / "out", format="gptq_v2")  # fmt: skip
    config = replace(config, solver="gptq", eval_datasets=())
    perform(config)
    convert(tmp_path / "out", "gptq", tmp_path / "converted")
    for name in ("out", "converted"):
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert (written["true_sequential"], written["static_groups"], written["desc_act"]) == (
            sequential,
            static,
            False,
        )


def with_weight(source, target, name, change):
    """A copy of a model with one of its weights changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["gptq_v2", "compressed-tensors"])
def test_a_row_that_is_almost_zero_is_no_veto(kind, whole, tmp_path):
    """Its scale is the smallest that the format holds, before anything is measured; the journal has what that costs."""

    def dead(weight):
        weight[5] *= 1e-7
        return weight

    source = with_weight(whole, tmp_path / "model", "model.layers.1.mlp.up_proj.weight", dead)
    config = demo_config(tmp_path, source, save=tmp_path / "saved", format=kind)
    results = perform(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    rounded = {(line["block"], line["name"]): line["info"] for line in lines if "info" in line}
    assert rounded.keys() == {(1, "mlp.up_proj")}
    (info,) = rounded.values()
    assert info["rounded_scales"] == 4 and abs(info["rounded_scales_cost"]) < 1e-9
    assert perplexity(tmp_path / "saved", tmp_path)[0] == results["perplexity"]["text"]["quantized"]


def test_a_linear_that_float16_cannot_hold_is_refused_before_work(whole, tmp_path):
    source = with_weight(whole, tmp_path / "model", "model.layers.2.mlp.up_proj.weight", lambda weight: weight * 1e-7)
    config = demo_config(tmp_path, source, save=tmp_path / "saved", format="gptq_v2")
    with pytest.raises(InputError, match=r"block 2 mlp.up_proj: all its weights are too small .*: use format bitplane"):
        perform(config)
    assert not (tmp_path / "run").exists()
    config = replace(config, format="bitplane")
    results = perform(config)
    assert perplexity(tmp_path / "saved", tmp_path)[0] == results["perplexity"]["text"]["quantized"]


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_linear_whose_steps_float16_cannot_hold_is_refused_before_work(kind, whole, tmp_path):
    def spike(weight):
        weight[3, 5] = 1e6
        return weight

    source = with_weight(whole, tmp_path / "model", "model.layers.1.mlp.down_proj.weight", spike)
    config = demo_config(tmp_path, source, save=tmp_path / "saved", format=kind)
    with pytest.raises(
        InputError, match=r"block 1 mlp.down_proj: its largest weight is too large .*: use format bitplane"
    ):
        perform(config)
    assert not (tmp_path / "run").exists()
    results = perform(replace(config, format="bitplane"))
    assert perplexity(tmp_path / "saved", tmp_path)[0] == results["perplexity"]["text"]["quantized"]


@pytest.mark.parametrize("kind", ["gptq_v2", "dequantized"])
def test_a_damaged_tensor_of_the_last_block_is_named_before_the_first_is_solved(kind, whole, tmp_path):
    name = "model.layers.3.input_layernorm.weight"
    source = with_weight(whole, tmp_path / "model", name, lambda weight: weight * torch.nan)
    with pytest.raises(InputError, match=f"{name} holds NaN"):
        perform(demo_config(tmp_path, source, save=tmp_path / "saved", format=kind))
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_of_a_side_file_is_said_before_work(whole, tmp_path):
    """A person's file of a name that the new checkpoint needs, and the old one beside it did not have."""
    config = demo_config(tmp_path, whole, save=tmp_path / "saved", format="dequantized")
    perform(config)
    source = shutil.copytree(whole, tmp_path / "model")
    (source / "chat_template.jinja").write_text("the model's")
    mine = tmp_path / "saved" / "chat_template.jinja"
    mine.write_text("mine")
    again = replace(config, model=str(source), overwrite=True, run_dir=tmp_path / "other")
    with pytest.raises(InputError, match=r"chat_template.jinja was not written by this toolkit, .*: move it away"):
        perform(again)
    assert mine.read_text() == "mine" and not (tmp_path / "other").exists()
    mine.rename(tmp_path / "saved" / "quantize_config.json")  # of another software: it would describe this checkpoint
    with pytest.raises(InputError, match=r"quantize_config.json was not written by this toolkit"):
        perform(again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_checkpoints_of_16_bit_models_measure_what_the_run_measured(dtype, whole, tmp_path):
    """The run measures weights as a plain checkpoint keeps them, rounded to the model's dtype; so does every format."""
    source = shutil.copytree(whole, tmp_path / "model")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    results = perform(demo_config(tmp_path, source, save=tmp_path / "saved", format="gptq_v2"))
    expected = results["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "saved", tmp_path)[0] == expected
    for kind in ("bitplane", "compressed-tensors", "dequantized"):
        convert(tmp_path / "saved", kind, tmp_path / kind)
        assert perplexity(tmp_path / kind, tmp_path)[0] == expected, kind
