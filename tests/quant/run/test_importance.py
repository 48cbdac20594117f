"""--imatrix: what llama.cpp's quantizer reads, held against sums taken from transformers' own forward pass."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from quant.core.errors import InputError
from tests.helpers import config_for, open_session, perform


def test_sums_of_squared_inputs_are_those_of_the_original_model(model_dir, text, tmp_path):
    path, file = model_dir("llama gqa, tied"), tmp_path / "deep" / "importance.gguf"
    request = config_for(path, text, tmp_path, nsamples=5, solver="rtn", options={}, wbits=2, imatrix=file)
    perform(request)
    ids = open_session(request).calibration(request.run).ids
    lm, sums = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64), {}
    for name, module in lm.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, given, out, name=name: sums.update({name: given[0].square().flatten(0, 1).sum(0)})
            )
    with torch.no_grad():
        lm(ids)
    reader = GGUFReader(file)
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for block in range(3):
        for own, stored in names.items():
            found = held[f"blk.{block}.{stored}.weight.in_sum2"]
            assert found.shape == (1, len(sums[f"{block}.{own}"]))
            assert np.allclose(found[0], sums[f"{block}.{own}"].numpy(), rtol=1e-5)
            assert held[f"blk.{block}.{stored}.weight.counts"].item() == ids.numel()
    assert len(held) == 2 * 7 * 3
    facts = {name: reader.get_field(f"imatrix.{name}").contents() for name in ("datasets", "chunk_count", "chunk_size")}
    assert facts["chunk_count"] == len(ids) and facts["chunk_size"] == ids.shape[1]
    assert reader.get_field("general.type").contents() == "imatrix"
    assert str(tmp_path) not in str(facts["datasets"])
    before = file.read_bytes()
    perform(request)  # the same command again
    assert file.read_bytes() == before and [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_experts_have_a_row_each(model_dir, text, tmp_path):
    """Of the tokens that each was given, by transformers' own router."""
    path, file = model_dir("mixtral"), tmp_path / "importance.gguf"
    request = config_for(path, text, tmp_path, nsamples=3, solver="rtn", options={}, wbits=2, imatrix=file)
    perform(request)
    ids = open_session(request).calibration(request.run).ids
    lm, seen = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), []
    lm.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, given: seen.append(given))
    with torch.no_grad():
        lm(ids)
    ((x, chosen, _),) = seen
    held = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    for expert in range(4):
        tokens = x[(chosen == expert).any(1)]
        for stored in ("ffn_gate_exps", "ffn_up_exps"):
            sums, counts = (held[f"blk.1.{stored}.weight.{end}"] for end in ("in_sum2", "counts"))
            assert sums.shape == (4, 32) and counts.shape == (4, 1) and counts[expert] == len(tokens)
            assert np.allclose(sums[expert], tokens.square().sum(0).numpy(), rtol=1e-4)
        assert held["blk.1.ffn_down_exps.weight.counts"][expert] == len(tokens)


def test_no_other_file_is_replaced(model_dir, text, tmp_path):
    file = tmp_path / "notes.gguf"
    file.write_text("mine")
    request = config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}, wbits=2, imatrix=file)
    with pytest.raises(InputError, match=r"notes.gguf is no importance matrix .*: move it"):
        perform(request)
    assert file.read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no importance matrix"):
        perform(request.but(imatrix=tmp_path / "link"))


@pytest.mark.parametrize(
    ("name", "says"), [("opt", "no architecture for opt models"), ("qwen2_moe", "no architecture for qwen2_moe")]
)
def test_what_has_no_place_is_refused_before_work(name, says, model_dir, text, tmp_path):
    request = config_for(
        model_dir(name), text, tmp_path, solver="rtn", options={}, wbits=2, imatrix=tmp_path / "i.gguf"
    )
    with pytest.raises(InputError, match=says):
        perform(request)
    assert not (tmp_path / "i.gguf").exists() and not (tmp_path / "run").exists()
