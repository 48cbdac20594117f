"""Our checkpoints in transformers with compressed-tensors, and checkpoints in the layout of llm-compressor in our
evaluator: the same perplexity and logits."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quant.blocks.fake_quant import ActSpec
from quant.export.read import open_checkpoint
from quant.export.runtimes import loadability
from quant.run.convert import convert
from quant.run.request import Request
from quant.run.session import open_session
from tests.helpers import DEMO, demo_config, in_float32, long, perform, perplexity, reference_logits, replace

CT = "compressed-tensors"
# Relative distance of the logits. SAME: measured 0. DEQUANTIZED: transformers rounds scales, measured 1.3e-4.
# ASYMMETRIC_INPUTS: their range always includes zero and their sums differ, measured 2.7e-3.
SAME, DEQUANTIZED, ASYMMETRIC_INPUTS, IN_BFLOAT16 = 1e-6, 5e-4, 1e-2, 3e-2
W8A8 = {"wbits": 8, "symmetric": True, "group_size": -1}
CASES = {
    "W4": ("llama", {"wbits": 4, "symmetric": True}),
    "W4, asymmetric": ("llama", {"wbits": 4}),
    "W3": ("opt", {"wbits": 3, "symmetric": True}),
    "W3, asymmetric": ("bloom", {"wbits": 3}),
    "W3, Falcon": ("falcon", {"wbits": 3, "symmetric": True}),
    "W8A8": ("mistral", W8A8 | {"act": ActSpec(8, symmetric=True)}),
    "nvfp4": ("llama", {"wbits": 4, "group_size": 16, "grid_kind": "nvfp4"}),
    "mxfp4": ("opt", {"wbits": 4, "group_size": 32, "grid_kind": "mxfp4"}),
    "fp8": ("bloom", {"wbits": 8, "group_size": -1, "grid_kind": "fp8"}),
    "fp8, blocks": ("llama", {"wbits": 8, "group_size": 128, "grid_kind": "fp8"}),
    "fp8, inputs too": ("llama", {"wbits": 8, "group_size": -1, "grid_kind": "fp8", "act": ActSpec.on("fp8")}),
    "W8A8, asymmetric inputs": ("llama", W8A8 | {"act": ActSpec(8)}),
}
MORE = ("mxfp4", "fp8", "fp8, blocks", "W8A8")  # that others of these stand for in make test


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in MORE), *long(*MORE)])
def test_transformers_computes_what_we_compute(name, tmp_path):
    """From a model in float32: in float16 the two sides round weights differently, and inputs on the edge between two
    levels of their grid turn that into a step (relative distance of the logits then 2e-2 with W8A8).
    """
    family, options = CASES[name]
    config = Request.of(
        model=str(in_float32(family, tmp_path / "whole")), dataset="demo", eval_datasets=(), nsamples=4, seqlen=256,
        solver="rtn", run_dir=tmp_path / "run", **({"group_size": 32} | options),
    )  # fmt: skip
    perform(config)
    content = convert(tmp_path / "run", CT, tmp_path / "checkpoint")
    (needs,) = (row[2] for row in loadability(CT, content) if row[0] == "transformers")
    evaluation = Request.of(model=str(tmp_path / "checkpoint"), dataset="demo", eval_datasets=("demo",), nsamples=4,
                           seqlen=256, solver="rtn", limit=4, run_dir=tmp_path / "eval")  # fmt: skip
    session = open_session(evaluation)
    perplexity = session.run(evaluation.run, evaluation.output)["perplexity"]["demo"]["fp"]
    ids = session.evaluation["demo"].ids
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "dequantize" in needs else {}
    four_bit_floats = config.run.grid_kind in ("nvfp4", "mxfp4")  # which it writes out in bfloat16
    dtype = torch.bfloat16 if four_bit_floats else torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=dtype, **more)
    with torch.inference_mode():
        logits = theirs(ids, use_cache=False).logits.float()
    if four_bit_floats:
        stored, modules = open_checkpoint(tmp_path / "checkpoint"), dict(theirs.named_modules())
        for name in stored.linears:
            assert torch.equal(modules[name].weight.float(), stored.quantized(f"{name}.weight").dequantize()), name
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    ours = reference_logits(session, ids)
    distance = float((logits - ours).norm() / ours.norm())
    bound = (
        ASYMMETRIC_INPUTS
        if config.run.act.kind == "integer" and config.run.act.active and not config.run.act.symmetric
        else DEQUANTIZED
        if more
        else IN_BFLOAT16
        if four_bit_floats
        else SAME
    )
    assert distance < bound, distance
    assert float(losses.double().mean().exp()) == pytest.approx(perplexity, rel=1e-2 if four_bit_floats else 1e-4)


def foreign_words(codes, bits):
    """Codes [rows, n] in int32 words along the row, first code lowest, by numpy: dense, for widths that divide a word."""
    per = 32 // bits
    padded = np.pad(codes.numpy().astype(np.uint64), ((0, 0), (0, -codes.shape[1] % per)))
    shifts = (np.arange(per) * bits).astype(np.uint64)
    words = (padded.reshape(len(padded), -1, per) << shifts).sum(-1).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def foreign_args(bits, symmetric, group):
    """Weight settings with every entry that llm-compressor writes."""
    return {"actorder": None, "block_structure": None, "dynamic": False, "group_size": group, "num_bits": bits,
            "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group" if group else "channel",
            "symmetric": symmetric, "type": "int", "zp_dtype": None if symmetric else "torch.int8"}  # fmt: skip


def foreign_checkpoint(path, exact, rounded, groups, ignore):
    """A checkpoint of the demo model in llm-compressor's layout, and beside it what it stands for, in float32: code times
    scale exactly, and rounded to the dtype of the model, as readers do that write it out.

    groups: (targets, bits, symmetric, group) in order; the first whose pattern fits a linear counts.
    """
    for target in (path, exact, rounded):
        shutil.copytree(DEMO / "llama", target, ignore=shutil.ignore_patterns("model.safetensors"))
    packed, plain = {}, {}
    for name, tensor in load_file(DEMO / "llama" / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        wanted = [
            g for g in groups if any(re.match(t[3:], linear) if t.startswith("re:") else t == "Linear" for t in g[0])
        ]
        if ".layers." not in name or tensor.dim() != 2 or linear in ignore:
            packed[name], plain[name] = tensor, tensor.float()
            continue
        _, bits, symmetric, group = wanted[0]
        n_out, n_in = tensor.shape
        w = tensor.float().view(n_out, -1, group or n_in)
        top = 2 ** (bits - 1) - 1
        if symmetric:
            scale, zero = (w.abs().amax(-1) / (top + 0.5)).clamp(min=1e-4), torch.zeros(w.shape[:2])
        else:
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).clamp(min=1e-4)
            zero = (-top - 1 - low / scale).round().clamp(-top - 1, top)
        scale = scale.half().float()
        codes = ((w / scale[..., None]).round() + zero[..., None]).clamp(-top - 1, top)
        plain[name] = ((codes - zero[..., None]) * scale[..., None]).view(n_out, n_in)
        packed[f"{linear}.weight_packed"] = foreign_words(codes.view(n_out, n_in).long() + top + 1, bits)
        packed[f"{linear}.weight_scale"] = scale.to(tensor.dtype)
        packed[f"{linear}.weight_shape"] = torch.tensor([n_out, n_in])
        if not symmetric:
            packed[f"{linear}.weight_zero_point"] = foreign_words(zero.long().T + top + 1, bits).T.contiguous()
    save_file(packed, path / "model.safetensors", {"format": "pt"})
    save_file(plain, exact / "model.safetensors", {"format": "pt"})
    config = json.loads((DEMO / "llama" / "config.json").read_text())
    dtype = getattr(torch, config["dtype"])
    save_file({k: v.to(dtype).float() for k, v in plain.items()}, rounded / "model.safetensors", {"format": "pt"})
    for reference in (exact, rounded):
        (reference / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    settings = {
        "config_groups": {
            f"group_{i}": {"format": "pack-quantized", "input_activations": None, "output_activations": None,
                           "targets": targets, "weights": foreign_args(bits, symmetric, group)}
            for i, (targets, bits, symmetric, group) in enumerate(groups)
        },
        "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head", *ignore], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.2",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (path / "recipe.yaml").write_text("default_stage: {}\n")


FOREIGN = {
    "W4A16": ([(["Linear"], 4, True, 32)], []),
    "W4A16 asymmetric": ([(["Linear"], 4, False, 64)], []),
    "W8A16 by rows": ([(["Linear"], 8, True, None)], []),
    "mixed": ([(["re:.*down_proj$"], 8, False, None), (["re:.*(q|k|v|o|gate|up)_proj$"], 4, True, 32)],
              ["model.layers.3.mlp.up_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_checkpoints_in_the_layout_of_llm_compressor_are_read(case, tmp_path):
    """Written by hand, without any of our writer: evaluated written out and packed as the weights it stands for."""
    groups, ignore = FOREIGN[case]
    foreign_checkpoint(tmp_path / "foreign", tmp_path / "exact", tmp_path / "rounded", groups, ignore)
    exact, expected = (perplexity(tmp_path / name, tmp_path)[0] for name in ("exact", "rounded"))
    assert perplexity(tmp_path / "foreign", tmp_path)[0] == expected
    config = replace(demo_config(tmp_path, tmp_path / "foreign"), wbits=16, packed=True, run_dir=tmp_path / "packed")
    assert perform(config)["perplexity"]["text"]["fp"] == pytest.approx(exact, rel=1e-5)
    if case != "mixed":
        convert(tmp_path / "foreign", "bitplane", tmp_path / "planes")
        assert perplexity(tmp_path / "planes", tmp_path)[0] == expected
