"""Learning a block: gradients, what is deployed, every term of the loss, rollback, and rows of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import grid as grid_module
from quant.core.errors import InputError
from quant.core.types import QuantSpec
from quant.learn import abq, attention_term, ingredient, loss_term, recipe, recipes
from quant.learn import learner as learner_module
from quant.learn.affinequant import dominance
from quant.learn.config import Learning, TransformSpec
from quant.learn.fake_quant import fake_quantize, grid_of, group_range
from quant.learn.learner import Learner
from quant.learn.loop import learn_block, optimizer_for, train_epoch
from quant.learn.losses import BlockLoss
from quant.learn.omniquant import WeightClip
from quant.learn.parametrization import Block, InputRange, Parametrization
from quant.run.directory import RunDirectory
from quant.run.quantize import deploy, quantize_block
from quant.run.session import open_session
from quant.run.solving import Recipe
from quant.solvers import get_solver
from tests.conftest import VOCABULARY
from tests.helpers import CPU, asked, learned_config, perform, replace

FULL = ActSpec()


class Bench:
    """Streams in front of block 0 of a tiny model; the quantized prefix's inputs differ a little."""

    def __init__(self, path, tmp_path, dtype=torch.float32, batch=2, biases=False):
        self.model = load_model(str(path), dtype=dtype, cache_dir=tmp_path, biases=biases)
        torch.manual_seed(3)
        ids = torch.randint(1, VOCABULARY, (6, 16))
        outside = self.model.outside_weights(CPU)
        self.full = BlockStream(self.model, ids, device=CPU, batch=6).capture(outside)
        self.quantized = self.full.fork()
        self.quantized.hidden.data.add_(0.02 * torch.randn_like(self.quantized.hidden.data))
        self.training = self.quantized.in_batches_of(batch, outside)
        self.weights = BlockWeights.read(self.model, 0, CPU)

    def learn(self, learning, spec=None, act=FULL, **options):
        return learn_block(
            self.full.fork(), self.quantized, self.training, 0, self.weights, spec, act, learning, **options
        )

    def learner(self, learning, spec=None, act=FULL, start=None):
        ranges = {
            name: InputRange(torch.ones(n), torch.zeros(n)) for name, (_, n) in self.model.linear_shapes().items()
        }
        return Learner(self.model, 0, self.weights, spec, act, learning, ranges, start)


FORMS = {
    "lwc": lambda abits: asked(abits=abits, let=False),
    "lwc and let": lambda abits: asked(abits=abits),
    "norm matrices": lambda abits: asked("affinequant", abits=abits, norm_matrix=True, stability=0.3),
    "head matrices": lambda abits: asked("affinequant", abits=abits, matrix=True, stability=0.3),
    "abq": lambda abits: asked("abq", abits=abits),
    "flatquant": lambda abits: asked("flatquant", abits=abits),
}


@pytest.mark.parametrize(
    "spec", [QuantSpec(3), QuantSpec(2, 16), QuantSpec(4, -1, True), QuantSpec(2, 8, levels=5), QuantSpec(1)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_clipped_weights_equal_a_slow_reference(spec, scale):
    """Every group on its own, in Python floats of float32 values; the solver's grid is the trained one."""
    weight = torch.randn(5, 32) * scale
    weight[0], weight[1] = 0.0, weight[1].abs()
    clip = WeightClip("linear", spec, rate=0.01)
    lower, upper = clip.initial(BlockWeights({"linear.weight": weight}), {}).values()
    lower, upper = lower + torch.randn_like(lower), upper - 3 + torch.randn_like(upper)
    clipped = clip.clip("linear", *group_range(weight, spec), {"lower": lower, "upper": upper})
    scale, zero = grid_module.range_to_grid(*clipped, spec)
    values = fake_quantize(weight, scale, zero, spec.qmax)
    for g, part in enumerate(weight.view(5, scale.shape[1], -1).unbind(1)):
        low = part.amin(1).clamp(max=0) * torch.sigmoid(lower[:, g])
        high = part.amax(1).clamp(min=0) * torch.sigmoid(upper[:, g])
        s, z = grid_module.range_to_grid(low, high, spec)
        torch.testing.assert_close(scale[:, g], s, rtol=0, atol=0)
        codes = [
            [min(max(round(float(v / s[i])) + int(z[i]), 0), spec.qmax) for v in row] for i, row in enumerate(part)
        ]
        expected = (torch.tensor(codes) - z[:, None]) * s[:, None]
        torch.testing.assert_close(values.view(5, scale.shape[1], -1)[:, g], expected.float(), rtol=0, atol=0)
    fitted = grid_of(scale, zero, weight.shape[1], spec.qmax)
    assert torch.equal(fitted.dequantize(fitted.quantize(weight)), values)


def in_float64(self, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", ["lwc and let", "head matrices", "norm matrices", "abq"])
@pytest.mark.parametrize("name", ["opt", "falcon rw", "llama gqa, tied", "falcon 40b"])
def test_gradients_against_finite_differences(name, form, grid, model_dir, tmp_path, monkeypatch):
    """With rounding replaced by the identity the loss is differentiable, and its gradient must be autograd's.

    Zero points are integers without a gradient, in both: the asymmetric grid of weights cuts off what lies below them.
    Inputs are then quantized too, on their symmetric range, whose zero point is fixed.
    """
    monkeypatch.setattr(torch, "round", lambda x: x.clone())
    monkeypatch.setattr(torch.Tensor, "round_", lambda x: x)
    monkeypatch.setattr(grid_module, "round_scale", lambda scale: scale)
    monkeypatch.setattr(learner_module, "ONLINE_DTYPE", torch.float64)
    monkeypatch.setattr(LlamaRMSNorm, "forward", in_float64)  # the library's computes in float32
    bench = Bench(model_dir(name), tmp_path, torch.float64, biases=True)
    bench.model.storage, bench.model.storage_dtype = {}, torch.float64
    act = ActSpec(16, 16) if grid == "symmetric" else ActSpec(4, 16, symmetric=True)
    learning = replace(FORMS[form](4), attention=form == "abq")
    learner = bench.learner(learning, QuantSpec(3, 16, symmetric=grid == "symmetric"), act)
    generator = torch.Generator().manual_seed(0)
    for parameter in learner.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.mul_(1 + 0.05 * noise).add_(0.01 * noise)
    target = torch.randn(bench.full.hidden.data.shape, generator=generator, dtype=torch.float64)
    loss = BlockLoss(learner, bench.weights, [target], bench.full if learning.attention else None)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loss is taken in float32 otherwise

    def value() -> torch.Tensor:
        weights = learner.materialize(learner.effective(learner.parameters, 1.0))
        return loss(bench.training, weights, slice(0, 2), bench.training.arguments[0])

    value().backward()
    checked = 0
    for key, parameter in learner.parameters.items():
        assert parameter.grad is not None, key
        for i in torch.randint(parameter.numel(), (3,), generator=generator).tolist():
            flat, step = parameter.data.view(-1), 1e-6
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                ends.append(float(value().detach()))
                flat[i] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[i]) == pytest.approx(slope, rel=1e-4, abs=1e-7), (key, i)
            checked += abs(slope) > 1e-6
    assert checked > 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["opt", "bloom", "falcon rw", "llama gqa, tied"])
def test_what_is_deployed_is_what_was_trained(name, form, model_dir, tmp_path):
    """Bit for bit: codes on the learned grid, transformed norms and biases, through the block file and back."""
    bench = Bench(model_dir(name), tmp_path, biases=True)
    bench.model.storage, bench.model.storage_dtype = {}, torch.bfloat16
    stored = {k: t.bfloat16().float() for k, t in bench.weights.parameters.items()}
    bench.weights = BlockWeights(stored)  # as read from such a checkpoint
    spec, act = QuantSpec(3, 16), ActSpec(4, 4)
    learning = replace(FORMS[form](4), epochs=2, lwc_lr=0.1, let_lr=0.02)
    learned = bench.learn(learning, spec, act)
    assert learned.log["loss_end"] < learned.log["loss_start"] or form == "abq"  # which needs more than six steps
    trained = bench.learner(learning, spec, act, start=learned.parameters)
    with torch.no_grad():
        expected = trained.materialize(trained.effective(trained.parameters, 0.0))
    recipe = Recipe("x", get_solver("rtn"), spec, learning=learning, act=act)
    block = quantize_block(bench.quantized, 0, bench.weights, recipe, learned)
    run = RunDirectory(tmp_path / "run")
    run.blocks.mkdir(parents=True)
    run.write_block(0, block.solved, block.records, {}, changed=block.changed, learned=learned.parameters)
    back = deploy(bench.weights, run.read_weights(0), bench.model, 0, run.read_changed(0))
    for deployed in (block.weights.named(), back.named()):
        assert deployed.keys() == expected.named().keys()
        for key, tensor in expected.named().items():
            assert torch.equal(deployed[key], tensor), key
    if form != "norm matrices":
        norms = {k: t for k, t in stored.items() if "norm" in k}
        assert any(not torch.equal(expected.parameters[k], t) for k, t in norms.items()) == (form != "lwc")
    assert all(torch.equal(learned.parameters[k], v) for k, v in run.read_learned(0).items())
    behind_norms, in_front = run.read_changed(0).online, run.read_changed(0).lefts
    assert (form == "flatquant") == bool(in_front)
    assert (form == "norm matrices") == bool(behind_norms)
    assert all(matrix.dtype == torch.float16 for matrix in behind_norms.values())
    # The loss that was reported is that of the deployed block.
    target = bench.full.fork()
    target.run(0, bench.weights, advance=True)
    out = bench.quantized.fork()
    out.run(0, back, advance=True, act=act)
    if form != "abq":
        mse = float((out.hidden.data - target.hidden.data).square().mean())
        assert mse == pytest.approx(learned.log["loss_end"], rel=1e-5)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("term", ["squares", "distribution", "attention"])
def test_every_term_of_the_loss_by_hand(term, augmented, model_dir, tmp_path):
    """The targets are the original block's answers on the full-precision inputs and, with ``augmented``, on those of the
    quantized prefix as well; the teacher of attention sees full precision always."""
    bench, spec, act = Bench(model_dir("llama"), tmp_path), QuantSpec(2, 16), ActSpec(4, 4)
    learning = replace(
        asked(abits=4, epochs=0),
        augmented=augmented,
        distribution=term == "distribution",
        attention=term == "attention",
    )
    learned = bench.learn(learning, spec, act)

    def passed(stream, weights, act=None):
        """Outputs and attention probabilities of the block, float64, for all samples at once."""
        logits: list[torch.Tensor] = []
        with instrument(bench.model.blocks[0], weights, act, logits.append) as own, torch.no_grad():
            out = stream.call(0, own, slice(0, 6), stream.arguments[0])
        return out.double(), logits[0].double().softmax(-1)

    out, q = passed(bench.quantized, learned.weights.with_parameters(rounded(learned, spec)), act)
    full, p = passed(bench.full, bench.weights)
    on_quantized, p_quantized = passed(bench.quantized, bench.weights)
    targets = [full, on_quantized] if augmented else [full]
    expected = sum(float((out - target).square().mean()) for target in targets)
    if term == "distribution":
        for target in targets:
            cosines = (out * target).sum(-1) / (out.norm(dim=-1) * target.norm(dim=-1))
            expected -= math.log(abs(float(cosines.mean())))
    if term == "attention":
        expected += both_divergences(p, q)
        assert both_divergences(p, q) != pytest.approx(both_divergences(p_quantized, q), rel=1e-3), "which is seen"
    assert learned.log["loss_start"] == pytest.approx(expected, rel=1e-5)
    # Measured 0.008 to 0.11 of it
    assert float((full - on_quantized).square().mean()) > 1e-3 * expected, "targets differ"


def both_divergences(p, q):
    """KL(p, q) + KL(q, p) over the keys that a query sees, mean over samples, heads and queries."""
    divergences = []
    for t in range(p.shape[-1]):
        a, b = p[..., t, : t + 1], q[..., t, : t + 1]
        divergences.append((a * (a / b).log()).sum(-1) + (b * (b / a).log()).sum(-1))
    return float(torch.stack(divergences).mean())


def rounded(learned, spec):
    """Weights of the linears on their learned grids, every one rounded to nearest."""
    return {
        f"{name}.weight": grid.dequantize(grid.quantize(learned.targets[name])) for name, grid in learned.grids.items()
    }


ABQ = dict.fromkeys(("compensation", "augmented", "distribution", "attention"), True)
ROWS = {
    ("omniquant", 16): ({"kinds": ("norm", "vo")}, {}),
    ("omniquant", 4): ({"kinds": ("norm", "vo", "qk"), "shift": True}, {}),
    ("affinequant", 16): ({"kinds": ("norm", "vo")}, {}),
    ("affinequant", 4): ({"kinds": ("norm", "vo", "qk"), "shift": True}, {}),
    ("abq", 16): ({"kinds": ("norm", "vo", "mul")}, ABQ),
    ("abq", 4): ({"kinds": ("norm", "vo", "qk", "mul"), "shift": True}, ABQ),
}


@pytest.mark.parametrize(("method", "abits"), ROWS)
def test_rows_of_the_papers(method, abits):
    """What a recipe adds to what was asked for: seams, shifts, terms of the loss; rates stay as given, or the defaults."""
    transform, others = ROWS[method, abits]
    plain = Learning(TransformSpec(let=True, matrix=True, stability=0.1), clip=True, let_lr=0.02, epochs=3)
    expected = replace(plain, transform=replace(plain.transform, **transform), **others)
    assert recipes()[method](plain, 3, abits) == expected
    assert (Learning().let_lr, Learning().lwc_lr, abq.COMPENSATION_LR) == (5e-3, 1e-2, 1e-2)
    named = replace(plain, transform=replace(plain.transform, kinds=("vo",)))
    shifted = replace(named.transform, shift=transform.get("shift", False))
    assert recipes()[method](named, 3, abits) == replace(named, transform=shifted, **others), (
        "seams that were named stay"
    )
    clips = replace(plain, transform=TransformSpec())
    assert recipes()[method](clips, 3, abits) == replace(clips, **others), "no seams without let"


@pytest.mark.parametrize("lwc_lr", [0.03, 0.007])
def test_rates_and_decay_of_the_optimizer(lwc_lr, model_dir, tmp_path):
    """By kind of parameter, also where two kinds share a rate; halved after a roll-back."""
    bench = Bench(model_dir("opt"), tmp_path)
    learning = replace(asked("abq", abits=4), let_lr=0.007, lwc_lr=lwc_lr, weight_decay=0.013)
    learner = bench.learner(learning, QuantSpec(3), ActSpec(4, 4))
    rates = {"clip": lwc_lr, "rank1": 0.01, "norm": 0.007, "vo": 0.007, "qk": 0.007, "mul": 0.007}
    for factor in (1.0, 0.5):
        groups = optimizer_for(learner, factor).param_groups
        group_of = {id(p): group for group in groups for p in group["params"]}
        assert len(group_of) == sum(len(group["params"]) for group in groups) == len(learner.parameters)
        for name, parameter in learner.parameters.items():
            group = group_of[id(parameter)]
            assert group["lr"] == pytest.approx(factor * rates[name.split(".")[0]]), name
            assert group["weight_decay"] == 0.013
    assert {name.split(".")[0] for name in learner.parameters} == set(rates)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is forgotten after it."""
    for registry in (ingredient, loss_term, attention_term, recipe):
        monkeypatch.setattr(registry, "_entries", dict(registry.entries()))


def test_a_loss_term_of_ones_own_in_one_file(registries, model_dir, text, tmp_path):
    """A function and a recipe that names it; the rest of the house does not know."""

    @loss_term("largest")
    def largest_error(out, target):
        return 0.1 * (out - target).abs().amax(-1).mean()

    @attention_term("logits")
    def logit_error(logits, reference):
        return 1e-3 * (logits - reference).square().tril().mean()

    @recipe("mine")
    def mine(learning, wbits, abits):
        return replace(learning, extra_terms=("largest", "logits"))

    bench, spec = Bench(model_dir("llama"), tmp_path), QuantSpec(3)
    plain, more = (asked(method, let=False, epochs=12, lwc_lr=0.3) for method in ("omniquant", "mine"))
    learned, other = bench.learn(more, spec), bench.learn(plain, spec)
    assert learned.log["loss_start"] > 1.05 * other.log["loss_start"], "it counts"  # measured 2.9 times
    assert learned.log["loss_end"] < 0.95 * learned.log["loss_start"], "it is trained"  # measured 0.79
    assert any(not torch.equal(learned.parameters[k], p) for k, p in other.parameters.items()), "its gradient arrives"
    config = learned_config(model_dir("llama"), text, tmp_path, learning=replace(more, epochs=1), learner="mine")
    configuration = open_session(config).configuration(config.run)["learning"]
    assert configuration["extra_terms"] == ["largest", "logits"]
    assert Learning(**configuration | {"transform": more.transform}) == replace(more, epochs=1)
    with pytest.raises(InputError, match="nothing to learn is called 'smallest'; known: .*largest"):
        bench.learn(replace(plain, extra_terms=("smallest",)), spec)


def test_a_parameter_of_every_weight_of_ones_own_in_one_file(registries, model_dir, text, tmp_path):
    """A class, what makes it for a block, and a recipe that names it: trained, deployed, resumed, refused."""

    class Nudge(Parametrization):
        rate = 0.003

        def __init__(self, linear):
            self.name, self.weight = f"nudge.{linear}", f"{linear}.weight"

        def initial(self, weights, ranges):
            return {"by": torch.zeros_like(weights.parameters[self.weight])}

        def apply(self, weights, parameters):
            return weights.with_parameters({self.weight: weights.parameters[self.weight] + parameters["by"]})

        def after_step(self, parameters, before, progress):
            parameters["by"].clamp_(-0.01, 0.01)

    @ingredient("nudge")
    def nudges(block):
        return [Nudge(linear) for linear in block.linears]

    @recipe("mine")
    def mine(learning, wbits, abits):
        return replace(learning, extra_ingredients=("nudge",))

    bench, spec = Bench(model_dir("llama"), tmp_path), QuantSpec(3)
    learning = asked("mine", let=False, epochs=5)
    learner = bench.learner(learning, spec)
    rates = {group["lr"]: len(group["params"]) for group in optimizer_for(learner, 1.0).param_groups}
    assert rates == {learning.lwc_lr: 14, 0.003: 7}
    learned = bench.learn(learning, spec)
    # Measured 0.47
    assert learned.log["loss_end"] < 0.9 * bench.learn(replace(learning, extra_ingredients=()), spec).log["loss_end"]
    for name in learner.linears:
        by = learned.parameters[f"nudge.{name}.by"]
        assert 0 < float(by.abs().max()) <= float(torch.tensor(0.01))
        torch.testing.assert_close(learned.targets[name], bench.weights.weight(name) + by, rtol=0, atol=0)
    config = learned_config(model_dir("llama"), text, tmp_path, learning=replace(learning, epochs=1), learner="mine")
    trained = perform(config)
    again = replace(config, learning=learning, resume=config.output.run_dir, run_dir=tmp_path / "again")
    again = replace(again, learning=replace(learning, epochs=0))
    assert perform(again)["codes_sha256"] == trained["codes_sha256"]
    other = replace(again, learning=asked(let=False, epochs=0), run_dir=tmp_path / "other")
    with pytest.raises(InputError, match="learned for another configuration .extra_ingredients"):
        perform(other)


def test_what_configurations_hold_of_learning():
    """Run directories are found by the hash of it: neither names nor values move where nothing is added."""
    assert Learning().to_json() == {
        "transform": {
            "let": False, "kinds": (), "matrix": False, "norm_matrix": False, "shift": False, "alpha": 0.5,
            "tied": True, "stability": 1.0, "precise": False,
        },
        "clip": False, "compensation": False, "epochs": 10, "let_lr": 5e-3, "lwc_lr": 1e-2, "weight_decay": 0.0,
        "batch": 1, "augmented": False, "distribution": False, "attention": False, "patience": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "shifts"), [("opt", 3), ("bloom", 3), ("llama", 0)])
def test_the_log_says_which_seams_are_shifted(name, shifts, model_dir, tmp_path):
    """Where norms and linears have biases of their own, and only if activations are quantized."""
    bench = Bench(model_dir(name), tmp_path)
    for abits, expected in ((4, shifts), (16, 0)):
        learned = bench.learn(asked(abits=abits, epochs=0), QuantSpec(3), ActSpec(abits, abits))
        assert len(learned.log["shifted"]) == expected
        assert {f"{seam}.shift" for seam in learned.log["shifted"]} == {
            key for key in learned.parameters if key.endswith(".shift")
        }


def test_nothing_is_transformed_without_let(model_dir, tmp_path):
    """Seams that are named do not make a transform; clips alone are learned, and no ranges are measured."""
    bench = Bench(model_dir("opt"), tmp_path)
    learning = Learning(TransformSpec(kinds=("norm", "vo"), shift=True), clip=True, epochs=1)
    learned = bench.learn(learning, QuantSpec(3))
    assert not learning.ranges and {key.split(".")[0] for key in learned.parameters} == {"clip"}
    assert learned.tensors == BlockWeights() and learned.log["shifted"] == []


def test_one_epoch_and_a_mask_that_opens(model_dir, tmp_path):
    """The released code divides by epochs - 1; rows that lose dominance are taken back."""
    bench = Bench(model_dir("llama"), tmp_path, batch=1)
    learning = asked("affinequant", abits=4, matrix=True, norm_matrix=True, epochs=1, let_lr=0.05)
    learned = bench.learn(learning, QuantSpec(2), ActSpec(4, 4))
    assert learned.log["epochs"] == 1 and learned.log["smallest_dominance"] > 0
    for key, matrix in learned.parameters.items():
        if key.endswith("matrix"):
            assert float(dominance(matrix).min()) > 0
            assert float((matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))).abs().max()) > 0
    wild, calm = (
        bench.learn(replace(learning, let_lr=rate, epochs=3), QuantSpec(2), ActSpec(4, 4)) for rate in (0.5, 1e-5)
    )
    assert wild.log["smallest_dominance"] > 0
    assert wild.log["rejected_rows"] > learned.log["rejected_rows"] and calm.log["rejected_rows"] == 0
    real, imaginary = (learned.parameters[f"qk.self_attn.q_proj.{part}"] for part in ("real", "imaginary"))
    smallest = float(torch.hypot(real, imaginary).min())
    assert learned.log["smallest_factor"] == pytest.approx(smallest) and 0.01 < smallest < 1  # measured 0.77


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["device", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_no_step_waits_for_the_device(form, store, model_dir, tmp_path):
    """An epoch on CUDA in which every synchronization is an error."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device = torch.device("cuda")
    model = load_model(str(model_dir("llama")), dtype=torch.float32, cache_dir=tmp_path)
    stream = BlockStream(model, torch.randint(1, VOCABULARY, (6, 16)), device=device, batch=2, store=store)
    stream.capture(model.outside_weights(device))
    weights = BlockWeights.read(model, 0, device)
    learning, act = FORMS[form](4), ActSpec(4, 4)
    ranges = {name: InputRange(torch.ones(n), torch.zeros(n)) for name, (_, n) in model.linear_shapes().items()}
    learner = Learner(model, 0, weights, QuantSpec(3), act, learning, ranges)
    loss = BlockLoss(learner, weights, [stream.fork().hidden], stream if learning.attention else None)
    optimizer = optimizer_for(learner, 1.0)
    train_epoch(learner, loss, stream, optimizer, 0.5)  # sets up what is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_epoch(learner, loss, stream, optimizer, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(p.isfinite().all()) for p in learner.parameters.values())


def test_a_loss_that_is_not_finite_is_undone(model_dir, tmp_path, monkeypatch):
    bench = Bench(model_dir("opt"), tmp_path)
    learning = replace(asked(), epochs=3)
    over_all, calls = BlockLoss.over_all, []

    def once_broken(self, stream, effective):
        calls.append({k: p.clone() for k, p in effective.items()})
        return math.nan if len(calls) == 3 else over_all(self, stream, effective)

    monkeypatch.setattr(BlockLoss, "over_all", once_broken)
    learned = bench.learn(learning, QuantSpec(2))
    (event,) = learned.log["events"]
    assert "epoch 2: loss not finite, rolled back, rates x 0.5" in event
    assert math.isfinite(learned.log["loss_end"]) and learned.log["loss_end"] < learned.log["loss_start"]
    # The third epoch starts at the iterate of the first: with half the rate it moves about half as far from it.
    first, third = calls[1], calls[3]
    moved = sum(float((third[k] - first[k]).norm()) for k in first)
    assert 0 < moved < sum(float((first[k] - calls[0][k]).norm()) for k in first)


def test_a_block_that_is_broken_at_the_start_is_named(model_dir, tmp_path):
    bench = Bench(model_dir("opt"), tmp_path)
    bench.weights.parameters["fc2.bias"].fill_(3e38)
    bench.full.run = lambda *a, **k: None
    with pytest.raises(InputError, match="block 0: the loss is not finite before training"):
        bench.learn(replace(asked(let=False), epochs=1), QuantSpec(2))


def test_patience_ends_a_block_early(model_dir, tmp_path):
    bench = Bench(model_dir("llama"), tmp_path)
    learned = bench.learn(replace(asked(let=False), epochs=30, lwc_lr=0.5, patience=2), QuantSpec(3))
    assert learned.log["epochs"] < 30 and "no better loss for 2 epochs" in learned.log["events"][-1]
    losses = learned.log["losses"]
    assert learned.log["loss_end"] == min(losses) == losses[-3] < 0.9 * learned.log["loss_start"]  # measured 0.70


def test_compensation_is_on_first_and_last_blocks_and_merged(model_dir, tmp_path):
    bench = Bench(model_dir("llama"), tmp_path)
    learning = replace(asked("abq"), epochs=2, lwc_lr=0.05)
    learned = bench.learn(learning, QuantSpec(3))
    left, right = (learned.parameters[f"rank1.mlp.down_proj.{side}"] for side in ("left", "right"))
    assert float(left.abs().max()) > 0 and left.shape == (32, 1) and right.shape == (1, 64)
    where = [abq.is_compensated(index, 12) for index in range(12)]
    assert where == [True] * 3 + [False] * 5 + [True] * 4, "the middle ones have none"
    bench.model.module.model.layers.extend([bench.model.blocks[0]] * 9)
    assert len(abq.compensation(Block(bench.model, 2, bench.weights, None, learning))) == 1
    assert abq.compensation(Block(bench.model, 3, bench.weights, None, learning)) == []
