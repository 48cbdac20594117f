"""GPT-2: linears in the place of Conv1D, read from transposed weights, and written as other software reads them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.load import load_model
from quant.core.errors import InputError
from quant.run.convert import convert
from tests.conftest import VOCABULARY
from tests.helpers import CPU, config_for, perform, replace


def opened(path, tmp_path, **options):
    return load_model(str(path), dtype=torch.float32, cache_dir=tmp_path, **options)


def test_weights_are_the_transposes_of_what_is_stored(model_dir, tmp_path):
    stored = load_file(model_dir("gpt2") / "model.safetensors")
    model = opened(model_dir("gpt2"), tmp_path)
    weights = model.block_weights(1, CPU)
    for name, shape in {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }.items():
        assert model.linear_shapes()[name] == shape and isinstance(model.blocks[1].get_submodule(name), torch.nn.Linear)
        assert torch.equal(weights[f"{name}.weight"], stored[f"transformer.h.1.{name}.weight"].t())


def test_files_of_the_hub_have_no_prefix_and_a_causal_mask(model_dir, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(model_dir("gpt2") / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    (old / "config.json").write_text((model_dir("gpt2") / "config.json").read_text())
    for index in range(3):
        ours, theirs = (opened(path, tmp_path).block_weights(index, CPU) for path in (old, model_dir("gpt2")))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_weight_that_is_not_transposed_is_refused(model_dir, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    tensors = load_file(model_dir("gpt2") / "model.safetensors")
    tensors["transformer.h.2.mlp.c_fc.weight"] = tensors["transformer.h.2.mlp.c_fc.weight"].t().contiguous()
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    (wrong / "config.json").write_text((model_dir("gpt2") / "config.json").read_text())
    with pytest.raises(InputError, match=r"h.2.mlp.c_fc.weight has shape \(32, 128\) .* asks for \(128, 32\)"):
        opened(wrong, tmp_path)


def test_codes_are_carried_by_the_formats_that_have_linears_by_their_inputs(model_dir, text, tmp_path):
    """What a run computes is what its packed checkpoints hold, and what transformers loads from the plain one."""
    config = config_for(
        model_dir("gpt2"), text, tmp_path, wbits=4, group_size=32, solver="rtn", options={}, nsamples=4, limit=4
    )
    results = perform(config)
    for kind in ("gptq_v2", "bitplane", "dequantized"):
        convert(tmp_path / "run", kind, tmp_path / kind, cache_dir=tmp_path / "cache")
    packed = load_file(tmp_path / "gptq_v2" / "model.safetensors")
    assert packed["transformer.h.0.attn.c_attn.qweight"].shape == (32 * 4 // 32, 96)
    plain = load_file(tmp_path / "dequantized" / "model.safetensors")
    assert plain["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    for kind in ("gptq_v2", "bitplane"):
        convert(tmp_path / kind, "dequantized", tmp_path / f"{kind} again", cache_dir=tmp_path / "cache")
        again = load_file(tmp_path / f"{kind} again" / "model.safetensors")
        assert again.keys() == plain.keys() and all(torch.equal(again[k], plain[k]) for k in plain)
    measured = perform(
        replace(config, model=str(tmp_path / "gptq_v2"), wbits=16, group_size=-1, run_dir=tmp_path / "measured")
    )
    expected = results["perplexity"]["words"]["quantized"]
    assert measured["perplexity"]["words"]["fp"] == pytest.approx(expected, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(model_dir("gpt2"), dtype=torch.float32).eval()
    ids = torch.randint(1, VOCABULARY, (2, 16))
    with torch.no_grad():
        moved = (saved(ids).logits - original(ids).logits).norm() / original(ids).logits.norm()
    assert 1e-3 < float(moved) < 0.5, "quantized, and not scrambled"
    with pytest.raises(InputError, match="compressed-tensors describes linears, and those of gpt2 models are none"):
        convert(tmp_path / "run", "compressed-tensors", tmp_path / "no", cache_dir=tmp_path / "cache")
