"""Bias correction leaves no error in the mean, is kept and resumed, and is refused where there is no bias."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from models.load import load_model
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.run.bias import corrected_biases
from quant.run.directory import RunDirectory
from quant.run.quantize import quantize_block
from quant.run.session import open_session
from quant.run.solving import Recipe
from quant.solvers.rtn import rtn
from quant.tune.config import Tuning
from tests.conftest import VOCABULARY
from tests.helpers import CPU, config_for, perform


def mean_errors(model, stream, before, after):
    """Of every linear of block 1, in float64: the mean of W x + b - (Ŵ x̂ + b') over tokens, x̂ the inputs of the deployed
    block, and x = x̂; over the mean magnitude of the outputs."""
    inputs = {}
    names = list(model.linear_shapes())

    def see(name):
        return lambda x: inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double())

    stream.run(1, after, observe={name: see(name) for name in names})
    errors = {}
    for name in names:
        x = torch.cat(inputs[name])
        outs = [x @ w.weight(name).double().T + w.parameters[f"{name}.bias"].double() for w in (before, after)]
        errors[name] = float((outs[0] - outs[1]).mean(0).norm() / outs[0].abs().mean(0).norm())
    return errors


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["opt", "bloom", "falcon rw"])
def test_no_error_is_left_in_the_mean(name, sequential, model_dir, tmp_path):
    """Measured: 3e-8 to 2e-7 with it in float32, and 1e-2 and more without."""
    model = load_model(str(model_dir(name)), dtype=torch.float32, cache_dir=tmp_path)
    ids = torch.randint(1, VOCABULARY, (6, 32))
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(model.outside_weights(CPU))
    before = BlockWeights.read(model, 1, CPU)
    recipe = Recipe("rtn", rtn, QuantSpec(2), true_sequential=sequential)
    errors = {}
    for corrects in (False, True):
        block = quantize_block(stream, 1, before, replace(recipe, bias_correction=corrects))
        errors[corrects] = mean_errors(model, stream, before, block.weights)
        assert len(block.changed.parameters) == (len(model.linear_shapes()) if corrects else 0)
    seen = errors[True] if sequential else {model.groups[0][0]: errors[True][model.groups[0][0]]}
    assert max(seen.values()) < 1e-6, errors  # without stages, later inputs are those of the block in full precision
    assert min(errors[False].values()) > 1e-3, errors


def test_means_of_both_models_are_used_where_they_are_known():
    generator = torch.Generator().manual_seed(0)
    full, seen = torch.randn(2, 5000, 7, generator=generator) + 1
    weight, rounded, bias = (torch.randn(shape, generator=generator) for shape in ((3, 7), (3, 7), (3,)))

    class Model:
        def storage_of(self, name, index):
            return torch.float32

    for given in (None, full):
        stats = GramStats(7)
        for i in range(0, 5000, 1700):
            stats.update(seen[i : i + 1700], None if given is None else given[i : i + 1700])
        deployed = BlockWeights({"a.weight": rounded, "a.bias": bias, "b.weight": rounded})
        originals = {"a": weight, "b": weight}
        new = corrected_biases(Model(), 0, originals, deployed, {"a": stats, "b": stats}).parameters
        assert new.keys() == {"a.bias"}
        x, x_hat = ((seen if given is None else given).double(), seen.double())
        error = x @ weight.double().T + bias - (x_hat @ rounded.double().T + new["a.bias"].double())
        assert float(error.mean(0).abs().max()) < 1e-5


def test_it_is_kept_resumed_saved_and_tuned_on(model_dir, text, tmp_path, monkeypatch):
    config = config_for(model_dir("opt"), text, tmp_path, bias_correction=True, true_sequential=True, wbits=2,
                        column_scales=True, tuning=Tuning("model", 2), nsamples=16, save=tmp_path / "saved")  # fmt: skip
    results = perform(config)
    blocks = [load_file(file) for file in sorted((tmp_path / "run" / "blocks").iterdir())]
    assert {"changed/fc1.bias", "changed/self_attn.out_proj.bias"} <= blocks[2].keys()
    other = config.but(run_dir=tmp_path / "killed", save=None)
    usual = RunDirectory.write_block

    def write(self, index, *given, **more):
        if index == 1:
            raise KeyboardInterrupt
        return usual(self, index, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "write_block", write)
        open_session(other).quantize(other.run, other.output)
    assert perform(other)["codes_sha256"] == results["codes_sha256"]
    plain = config.but(bias_correction=False, run_dir=tmp_path / "plain", save=None)
    assert perform(plain)["codes_sha256"] != results["codes_sha256"]
    again = config.but(model=str(tmp_path / "saved"), wbits=16, tuning=None, column_scales=False, bias_correction=False,
                       save=None, run_dir=tmp_path / "again")  # fmt: skip
    measured = perform(again)["perplexity"]["words"]["fp"]
    assert measured == pytest.approx(results["perplexity"]["words"]["quantized"], rel=1e-6)


def test_models_without_biases_are_refused_before_work(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, bias_correction=True)
    with pytest.raises(InputError, match="no linear of this llama model has a bias"):
        perform(config)
    assert not (tmp_path / "run").exists()
    results = perform(config.but(model=str(model_dir("qwen2"))))  # queries, keys and values have some
    assert results["perplexity"]
