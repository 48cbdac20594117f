"""Column scales fold exactly, in every family, are what their formula says, and take planted scales away."""

import pytest
import torch

from models.load import load_model
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.learn.affine import Affine, apply_seam
from quant.learn.column_scales import KEY, column_scales, fold, mean_squares
from tests.conftest import CONFIGS, IN_FLOAT32, VOCABULARY
from tests.helpers import CPU


class Bench:
    """Block 1 of a model, its inputs, and what it answers."""

    def __init__(self, path, tmp_path, dtype=torch.float64, storage=torch.float64):
        self.model = load_model(str(path), dtype=dtype, cache_dir=tmp_path)
        self.model.storage = dict.fromkeys(self.model.storage, storage)
        ids = torch.randint(1, VOCABULARY, (2, 16))
        self.stream = BlockStream(self.model, ids, device=CPU, batch=2).capture(self.model.outside_weights(CPU))
        self.weights = BlockWeights.read(self.model, 1, CPU)
        self.inputs = mean_squares(self.stream, 1, self.weights)
        self.expected = self(self.weights)

    def __call__(self, weights):
        with instrument(self.model.blocks[1], weights) as own, torch.no_grad():
            return self.stream.call(1, own, slice(0, 2), self.stream.arguments[0])

    def difference(self, weights):
        return float((self(weights) - self.expected).norm() / self.expected.norm())

    def folded(self, weights=None, inputs=None):
        weights = self.weights if weights is None else weights
        return fold(self.model, 1, weights, column_scales(self.model, weights, inputs or self.inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_computes_the_same(name, model_dir, tmp_path):
    bench = Bench(model_dir(name), tmp_path)
    folded = bench.folded()
    assert bench.difference(folded.weights) < IN_FLOAT32.get(name, 1e-12)
    kinds = {seam.kind for seam in bench.model.family.seams(bench.model.config)} - {"qk"}
    assert {key.removeprefix(KEY).split(".")[0] for key in folded.parameters} == kinds
    assert all(float((scale.log()).abs().max()) > 0.05 for scale in folded.parameters.values()), "1 would test nothing"
    assert folded.tensors.parameters.keys() & bench.weights.parameters.keys() == folded.tensors.parameters.keys()
    for linear, target in folded.targets.items():
        torch.testing.assert_close(target, folded.weights.weight(linear).float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama gqa, tied", "opt", "bloom", "falcon 40b", "qwen3", "gemma2"])
def test_what_is_forgotten_shows(name, model_dir, tmp_path):
    """Negative control: any tensor that changed, left as it was, changes the function. Measured: 1e-3 and more."""
    bench = Bench(model_dir(name), tmp_path)
    folded = bench.folded().weights
    for key in folded.since(bench.weights).parameters:
        old = bench.weights.parameters[key]
        if not torch.equal(folded.parameters[key], old):
            assert bench.difference(folded.with_parameters({key: old})) > 1e-5, key


def slow_scales(seam, layout, weights, inputs):
    """The formula channel by channel, with lists of the columns that one channel feeds."""
    n_in = weights.weight(seam.consumers[0]).shape[1]
    if seam.kind == "vo":
        heads, dim = layout.v[1].shape
        feeds = [
            [(h * layout.repeats + r) * dim + i for r in range(layout.repeats)]
            for h in range(heads)
            for i in range(dim)
        ]
    else:
        feeds = [[i] for i in range(n_in)]
    scales = []
    for columns in feeds:
        x = sum(float(inputs[seam.consumers[0]][c]) for c in columns) / len(columns)
        entries = [float(v) for name in seam.consumers for c in columns for v in weights.weight(name)[:, c]]
        w = sum(v * v for v in entries) / len(entries)
        scales.append((x**0.5) ** 0.5 / (w**0.5) ** 0.5 if x > 0 and w > 0 else 1.0)
    return torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama gqa, tied", "opt", "falcon 7b"])
def test_scales_are_what_the_formula_says(name, model_dir, tmp_path):
    bench = Bench(model_dir(name), tmp_path)
    seams = {f"{KEY}{s.kind}.{s.producer}": s for s in bench.model.family.seams(bench.model.config) if s.kind != "qk"}
    norm = next(iter(seams.values()))
    assert norm.kind == "norm"
    first = norm.consumers
    bench.inputs = {k: v.clone() for k, v in bench.inputs.items()}
    bench.inputs[first[0]][3] = 0  # a channel that is never used, and one that nobody reads
    dead = {f"{c}.weight": bench.weights.weight(c).index_fill(1, torch.tensor([5]), 0) for c in first}
    weights = bench.weights.with_parameters(dead)
    scales = column_scales(bench.model, weights, bench.inputs)
    assert scales.keys() == seams.keys()
    layout = bench.model.family.heads(bench.model.config)
    for key in sorted(seams, key=lambda key: seams[key].kind == "norm"):  # the others scale rows of a norm's readers
        slow = slow_scales(seams[key], layout, weights, bench.inputs)
        torch.testing.assert_close(scales[key].flatten().double(), slow, rtol=1e-6, atol=0)
        weights = apply_seam(weights, seams[key], layout, Affine(slow.view_as(scales[key])))
    assert scales[f"{KEY}norm.{norm.producer}"][0, [3, 5]].tolist() == [1.0, 1.0]


def test_inputs_and_columns_are_alike_afterwards(model_dir, tmp_path):
    bench = Bench(model_dir("llama"), tmp_path)
    folded = bench.folded().weights
    after = mean_squares(bench.stream, 1, folded)
    for names in bench.model.groups:
        columns = torch.cat([folded.weight(name) for name in names]).square().mean(0)
        torch.testing.assert_close(after[names[0]], columns, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_planted_scales_are_gone(name, model_dir, tmp_path):
    """Channels of every seam times 64, undone by their readers: the folded linears are those without, to the last bits."""
    bench = Bench(model_dir(name), tmp_path)
    family, layout = bench.model.family, bench.model.family.heads(bench.model.config)
    planted = bench.weights
    for seam in family.seams(bench.model.config):
        if seam.kind != "qk":
            shape = layout.v[1].shape if seam.kind == "vo" else (1, planted.weight(seam.consumers[0]).shape[1])
            scale = torch.ones(shape, dtype=torch.float64)
            scale[0, [1, 4]] = 1 / 64
            planted = apply_seam(planted, seam, layout, Affine(scale), family.norm_offset)
    assert bench.difference(planted) < IN_FLOAT32.get(name, 1e-12)
    other = bench.folded(planted, mean_squares(bench.stream, 1, planted)).targets
    for linear, weight in bench.folded().targets.items():
        torch.testing.assert_close(other[linear], weight, rtol=2e-6, atol=1e-7, msg=lambda m, k=linear: f"{k}: {m}")
        assert float(bench.weights.weight(linear).abs().max()) > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_norms_are_folded_as_they_are_stored(name, model_dir, tmp_path):
    """Norms in float16: their factors times the columns are what they were, whatever the dtype made of them."""
    bench = Bench(model_dir(name), tmp_path, storage=torch.float16)
    folded, offset = bench.folded(), bench.model.family.norm_offset
    norms = [seam for seam in bench.model.family.seams(bench.model.config) if seam.kind == "norm"]
    assert all(t.dtype == torch.float16 for t in folded.tensors.parameters.values())
    for seam in norms:
        before = (bench.weights.parameters[f"{seam.producer}.weight"] + offset) * bench.weights.weight(
            seam.consumers[0]
        )
        stored = folded.tensors.parameters[f"{seam.producer}.weight"].double() + offset
        after = stored * folded.weights.weight(seam.consumers[0])
        rows = after.norm(dim=1, keepdim=True) / before.norm(dim=1, keepdim=True)  # another seam may scale the rows
        torch.testing.assert_close(after / rows, before, rtol=1e-9, atol=1e-12)


def test_a_norm_that_float16_cannot_divide_stays(model_dir, tmp_path):
    bench = Bench(model_dir("llama"), tmp_path, storage=torch.float16)
    name = "input_layernorm.weight"
    gains = bench.weights.parameters[name].clone()
    gains[:3] = torch.tensor([0.0, 1e-30, 6e4], dtype=torch.float64)
    weights = bench.weights.with_parameters({name: gains})
    inputs = dict(bench.inputs)
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        inputs[linear] = inputs[linear].clone()
        inputs[linear][2] = 1e-12  # so small a scale that its quotient would be infinite
    folded = bench.folded(weights, inputs)
    stored = folded.tensors.parameters[name]
    assert bool(stored.isfinite().all())
    assert stored[0] == 0 and stored[2] == gains[2].half()
    old, new = weights.weight("self_attn.q_proj"), folded.weights.weight("self_attn.q_proj")
    torch.testing.assert_close(new[:, :3], old[:, :3], rtol=0, atol=0)
