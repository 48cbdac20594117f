"""FlatQuant's ingredients: the same function in float64 alone and together, their start, what they cost, and that they help."""

import pytest
import torch

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import grid as grid_module
from quant.core.types import QuantSpec
from quant.learn import learner as learner_module
from quant.learn.config import Learning, TransformSpec
from quant.learn.flatquant import factors, orthogonal
from quant.learn.learner import Learner
from quant.learn.loop import LEAST_RATE, learn_block, optimizer_for, rate_shares, train_epoch
from quant.learn.losses import BlockLoss
from quant.learn.parametrization import InputRange
from tests.conftest import CONFIGS, IN_FLOAT32, VOCABULARY
from tests.helpers import CPU, asked, replace

FULL = ActSpec()
ALL = ("values", "heads", "kronecker")


class Bench:
    """Block 1 of a tiny model; what is learned of it at random parameters."""

    def __init__(self, path, tmp_path, dtype=torch.float64, biases=False):
        self.model = load_model(str(path), dtype=dtype, cache_dir=tmp_path, biases=biases)
        self.ids = torch.randint(1, VOCABULARY, (4, 12))
        self.outside = self.model.outside_weights(CPU)
        self.stream = BlockStream(self.model, self.ids, device=CPU, batch=4).capture(self.outside)
        self.weights = BlockWeights.read(self.model, 1, CPU)

    def __call__(self, weights):
        with instrument(self.model.blocks[1], weights) as own, torch.no_grad():
            return self.stream.call(1, own, slice(0, 4), self.stream.arguments[0])

    def difference(self, weights):
        expected = self(self.weights)
        return float((self(weights) - expected).norm() / expected.norm())

    def learner(self, learning, spec=None, act=FULL):
        ranges = {
            name: InputRange(torch.rand(n) + 0.5, torch.randn(n)) for name, (_, n) in self.model.linear_shapes().items()
        }
        learner = Learner(self.model, 1, self.weights, spec, act, learning, ranges)
        generator = torch.Generator().manual_seed(1)
        for parameter in learner.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            size = 0.3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2
            parameter.data.add_((size * noise).to(parameter.dtype))
        return learner

    def transformed(self, learning, spec=None):
        learner = self.learner(learning, spec)
        with torch.no_grad():
            return learner.transform(learner.effective(learner.parameters, 1.0))


def flat(kinds=("norm", "vo", "qk", "mul"), abits=4, **options):
    return asked("flatquant", 4, abits, kinds=kinds, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_computes_the_same(name, model_dir, tmp_path):
    """Each ingredient alone, all of them, and all with shifts and OmniQuant's scales; in float32 it is rounding that is left."""
    bench, limit = Bench(model_dir(name), tmp_path, biases=True), IN_FLOAT32.get(name, 1e-12)
    there = {seam.kind for seam in bench.model.family.seams(bench.model.config)}
    spec = TransformSpec(True, tuple(there), shift=True)
    cases = {one: Learning(extra_ingredients=(one,)) for one in ALL} | {
        "all": Learning(clip=True, extra_ingredients=ALL),
        "with shifts": Learning(spec, clip=True, extra_ingredients=("heads", "kronecker")),
        "recipe": flat(tuple(there)),
    }
    for case, learning in cases.items():
        new = bench.transformed(learning, QuantSpec(4))
        assert new.since(bench.learner(learning).weights).named(), case
        assert bench.difference(new) < limit, case
    whole = bench.transformed(cases["all"])
    for part in ("lefts", "rights", "head_matrices"):
        if part != "head_matrices":  # which the keys take back by themselves
            assert bench.difference(replace(whole, **{part: {}})) > 1e-3, part
    assert bench.difference(bench.weights.with_parameters(whole.parameters)) > 1e-3, "the pairs are needed"


def test_factors_are_the_cheapest_pair():
    for n in (1, 2, 7, 16, 24, 384, 4096, 11008):
        pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a]
        assert factors(n) == min(pairs, key=sum)


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_the_start_is_orthogonal_and_the_same_every_time(n):
    matrix = orthogonal(n, n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=1e-6)
    assert torch.equal(matrix, orthogonal(n, n)) and matrix.dtype == torch.float32
    torch.rand(1)
    assert torch.equal(matrix, orthogonal(n, n))


def test_the_row_of_the_paper():
    """Scales at norms and in front of down projections, matrices elsewhere; clips of activations where they are quantized."""
    plain = Learning(TransformSpec(let=True), clip=True, let_lr=0.02)
    row = flat((), 4, let_lr=0.02)
    assert row == replace(
        plain, transform=TransformSpec(True, ("norm", "mul")), decay=True,
        extra_ingredients=("values", "heads", "kronecker", "activation clips"),
    )  # fmt: skip
    assert flat((), 16).extra_ingredients == ("values", "kronecker")
    assert flat(("vo",), 4).transform == TransformSpec() and flat(("vo",), 4).extra_ingredients[0] == "values"
    assert flat((), 4, lwc=False).extra_ingredients == ("values", "heads", "kronecker")
    assert row.online and not Learning(TransformSpec(let=True), clip=True).online
    assert Learning(**row.to_json() | {"transform": row.transform}) == row
    assert "decay" not in plain.to_json()


def test_rates_fall_by_a_cosine(model_dir, tmp_path):
    """At every step; the optimizer's own rates stay for the next epoch."""
    bench = Bench(model_dir("llama"), tmp_path, torch.float32)
    learning = flat(epochs=3, batch=2)
    seen = []

    class Seen(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])

    learner = bench.learner(learning, QuantSpec(4), ActSpec(4, 4))
    loss = BlockLoss(learner, bench.weights, [torch.zeros_like(bench.stream.hidden.data)])
    optimizer = Seen(list(learner.parameters.values()), lr=0.5)
    for epoch in range(3):
        train_epoch(
            learner,
            loss,
            bench.stream.in_batches_of(2, bench.outside),
            optimizer,
            1.0,
            rate_shares(learning, epoch, 2),
        )
    expected = [
        0.5 * (LEAST_RATE + (1 - LEAST_RATE) * (1 + torch.cos(torch.tensor(torch.pi * i / 6)).item()) / 2)
        for i in range(6)
    ]
    assert seen == pytest.approx(expected, rel=1e-5) and optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer_for(learner, 1.0).param_groups and rate_shares(asked(), 0, 2) is None


@pytest.mark.parametrize("name", ["opt", "llama gqa, tied"])
def test_it_helps_where_channels_are_loud(name, model_dir, tmp_path):
    """A few channels of what norms write are 20 times as large: the start alone is better than rounding, training better."""
    bench = Bench(model_dir(name), tmp_path, torch.float32)
    parameters = dict(bench.weights.parameters)
    for seam in bench.model.family.seams(bench.model.config):
        if seam.kind == "norm":
            for key in (f"{seam.producer}.weight", f"{seam.producer}.bias"):
                if key in parameters:
                    parameters[key] = parameters[key].clone()
                    parameters[key][:2] *= 20
    bench.weights = BlockWeights(parameters)
    losses = {}
    for case, learning in {
        "rtn": asked(let=False, epochs=0),
        "flat": flat(epochs=15, let_lr=0.02, lwc_lr=0.05),
    }.items():
        training = bench.stream.in_batches_of(2, bench.outside)
        learned = learn_block(
            bench.stream.fork(), bench.stream, training, 1, bench.weights, QuantSpec(4), ActSpec(4, 4), learning
        )
        losses[case] = learned.log["loss_start"], learned.log["loss_end"]
    assert losses["flat"][1] < 0.9 * losses["flat"][0] and losses["flat"][1] < 0.5 * losses["rtn"][1], losses


@pytest.mark.parametrize("act", [ActSpec(4, 4), ActSpec(16, 16)])
def test_gradients_against_finite_differences(act, model_dir, tmp_path, monkeypatch):
    """Through inverses, products and clips, with rounding taken out; symmetric ranges have no zero point to be rounded."""
    monkeypatch.setattr(torch, "round", lambda x: x.clone())
    monkeypatch.setattr(torch.Tensor, "round_", lambda x: x)
    monkeypatch.setattr(grid_module, "round_scale", lambda scale: scale)
    monkeypatch.setattr(learner_module, "ONLINE_DTYPE", torch.float64)
    act = replace(act, symmetric=True, kv_bits=16)
    bench = Bench(model_dir("opt"), tmp_path)
    bench.model.storage, bench.model.storage_dtype = {}, torch.float64
    learner = bench.learner(flat(), QuantSpec(4, symmetric=True), act)
    target = torch.randn(bench.stream.hidden.data.shape, dtype=torch.float64)
    loss = BlockLoss(learner, bench.weights, [target])
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def value():
        weights = learner.materialize(learner.effective(learner.parameters, 1.0))
        return loss(bench.stream, weights, slice(0, 4), bench.stream.arguments[0])

    value().backward()
    generator, checked = torch.Generator().manual_seed(0), 0
    for key, parameter in learner.parameters.items():
        if parameter.grad is None:
            assert key.startswith(("input_clips", "head_clips")) and act.bits == 16 or "head_clips" in key, key
            continue
        for i in torch.randint(parameter.numel(), (3,), generator=generator).tolist():
            data, step, ends = parameter.data.view(-1), 1e-6, []
            for sign in (1, -1):
                data[i] += sign * step
                ends.append(float(value().detach()))
                data[i] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[i]) == pytest.approx(slope, rel=1e-4, abs=1e-7), (key, i)
            checked += abs(slope) > 1e-6
    assert checked > 20
