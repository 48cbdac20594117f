"""What is minimized, against its definition; and the model as a function of its weights, against the block stream."""

from __future__ import annotations

import pytest
import torch

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats
from quant.core.rounding import RoundTo
from quant.core.types import QuantSpec
from quant.solvers import get_solver
from quant.tune import objectives
from quant.tune.block import TunedBlock
from quant.tune.chain import Chain
from quant.tune.config import Tuning
from quant.tune.objectives import (
    Divergence,
    Teacher,
    block_objective,
    divergence,
    model_objective,
    trimmed_squared_error,
)
from tests.helpers import CPU, whole_model_logits

SPEC = QuantSpec(3, group_size=8)
MODEL = Tuning("model")


def opened(path, dtype=torch.float32):
    return load_model(str(path), dtype=dtype, cache_dir=path)


def rounded_block(model, index, spec=SPEC, tuning=MODEL):
    """A block with every linear rounded to nearest."""
    weights = BlockWeights.read(model, index, CPU)
    solve = get_solver("rtn")
    solved = {}
    for name, (_, n_in) in model.linear_shapes().items():
        stats = GramStats.from_gram(torch.eye(n_in))
        solved[name] = solve(weights.weight(name).float(), stats, spec)
    return TunedBlock(model, index, weights, solved, spec, tuning)


def tokens(n=16, length=12):
    return torch.randint(4, 260, (n, length), generator=torch.Generator().manual_seed(0))


def test_the_largest_errors_do_not_count():
    out, target = torch.randn(10, 30), torch.randn(10, 30)
    errors = (out.double() - target.double()).square().flatten().sort().values
    for drop in (0.0, 0.01, 0.2):
        kept = errors[: len(errors) - int(300 * drop)]
        assert float(trimmed_squared_error(out, target, drop)) == pytest.approx(float(kept.mean()), rel=1e-5)


def test_divergence_is_its_definition():
    p, q = (torch.softmax(torch.randn(2, 5, 7).double(), -1) for _ in range(2))
    reference = sum(
        float((p[i, t] * (p[i, t] / q[i, t]).log()).sum()) for i in range(2) for t in range(5)
    ) / 10  # fmt: skip
    assert float(divergence(q.log(), p.log())) == pytest.approx(reference, rel=1e-10)
    assert float(divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "size"), [(1, 3), (6, 40)])
def test_the_loss_that_is_trained_on_is_the_divergence_with_its_gradient(n, size):
    z = (3 * torch.randn(n, size)).requires_grad_()
    log_p = torch.log_softmax(torch.randn(n, size), -1)
    p = log_p.exp()
    value = Divergence.apply(z, p, (p * log_p).sum() / n)
    value.backward()
    exact = z.detach().double().requires_grad_()
    reference = (p.double() * (log_p.double() - torch.log_softmax(exact, -1))).sum() / n
    reference.backward()
    assert value.item() == pytest.approx(reference.item(), rel=1e-4)
    assert torch.allclose(z.grad.double(), exact.grad, atol=1e-7)


def advanced(model, stream):
    """Full precision behind the last block, from a stream in front of the first."""
    full = stream.fork()
    for index in range(len(model.blocks)):
        full.run(index, BlockWeights.read(model, index, CPU), advance=True)
    return full


def within(parameters, index):
    return {f"{index}.{name}": tensor for name, tensor in parameters.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "falcon 40b", "gemma2", "qwen3"])
@pytest.mark.parametrize("act", [ActSpec(), ActSpec(8, kv_bits=8)], ids=["", "A8KV8"])
def test_a_chain_of_all_blocks_is_the_librarys_model(family, act, model_dir):
    model = opened(model_dir(family))
    blocks = [rounded_block(model, i, QuantSpec(3)) for i in range(len(model.blocks))]
    parameters, weights = {}, BlockWeights()
    for block in blocks:
        parameters |= within(block.initial(), block.index)
        weights |= block.weights_at(block.initial()).within(block.index)
    outside, ids = model.outside_weights(CPU), tokens(2)
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    with torch.no_grad():
        hidden = Chain(stream, dict(enumerate(blocks)), act)(parameters, stream.hidden[slice(0, 2)], 0)
        logits = stream.head(hidden, slice(0, 2), outside)
        reference = whole_model_logits(model, weights, ids, act)
    assert torch.allclose(logits, reference, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("cached", [True, False])
def test_the_loss_of_the_model_is_the_divergence_from_full_precision(cached, model_dir, monkeypatch):
    monkeypatch.setattr(objectives.env, "free_bytes", lambda device: 10**12 if cached else 0)
    model = opened(model_dir("llama"))
    outside, ids = model.outside_weights(CPU), tokens()
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    whole = [BlockWeights.read(model, i, CPU) for i in range(3)]
    block = rounded_block(model, 1)  # the others stay
    chain = Chain(stream, {0: whole[0], 1: block, 2: whole[2]}, ActSpec())
    objective = model_objective(chain, advanced(model, stream), outside)
    first = whole[0].within(0) | whole[1].within(1) | whole[2].within(2)
    with torch.no_grad():
        weights = first | block.weights_at(block.initial()).within(1)
        p = torch.log_softmax(whole_model_logits(model, first, ids[4:6]).double(), -1)
        q = torch.log_softmax(whole_model_logits(model, weights, ids[4:6]).double(), -1)
    reference = float((p.exp() * (p - q)).sum(-1).mean())
    assert reference > 1e-4
    for _ in range(2):
        assert float(objective.loss(within(block.initial(), 1), 2)) == pytest.approx(reference, rel=1e-3)


def test_what_full_precision_says_is_the_same_from_the_cache(model_dir):
    model = opened(model_dir("llama"))
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, tokens(), device=CPU, batch=2).capture(outside)
    teacher = Teacher(advanced(model, stream), outside, model.config.vocab_size)
    assert teacher.keeps
    first = teacher.probabilities(1)
    assert teacher.probabilities(1)[0] is first[0]
    teacher.kept, teacher.keeps = {}, False
    again = teacher.probabilities(1)
    assert teacher.kept == {}
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_model_reach_every_parameter(recompute, model_dir):
    model = opened(model_dir("opt"))
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, tokens(), device=CPU, batch=2).capture(outside)
    blocks = [rounded_block(model, i, tuning=Tuning("model", norms=True)) for i in range(3)]
    parameters = {k: t for b in blocks for k, t in within(b.initial(), b.index).items()}
    gradients = []
    for again in (recompute, False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        chain = Chain(stream, dict(enumerate(blocks)), ActSpec(), again)
        model_objective(chain, advanced(model, stream), outside).loss(leaves, 0).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    without = {name for name, g in gradients[0].items() if g is None or not bool(g.abs().sum() > 0)}
    assert not without - {f"{i}.self_attn.k_proj.bias.shift" for i in range(3)}  # softmax is blind to it
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items() if g is not None)


def test_a_block_is_trained_as_it_is_deployed(model_dir):
    model = opened(model_dir("llama"))
    block = rounded_block(model, 0, tuning=Tuning("block", norms=True))
    parameters = {k: t + 0.3 * torch.randn_like(t) for k, t in block.initial().items()}
    trained, changed = block.weights_at(parameters).parameters, block.changes_at(parameters).named()
    answers = block.answers(parameters)
    for name, answer in answers.items():
        assert torch.equal(trained[f"{name}.weight"], answer.dequantize().to(model.storage_dtype).to(model.dtype))
    assert set(changed) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for name, tensor in changed.items():
        assert torch.equal(trained[name], RoundTo.apply(tensor, model.storage_dtype).to(model.dtype))
        assert not torch.equal(trained[name], block.weights.parameters[name])


def test_the_loss_of_a_block_is_that_of_its_outputs(model_dir):
    model = opened(model_dir("llama"))
    outside = model.outside_weights(CPU)
    quantized = BlockStream(model, tokens(), device=CPU, batch=4).capture(outside)
    full = quantized.fork()
    full.run(0, BlockWeights.read(model, 0, CPU), advance=True)
    block = rounded_block(model, 0, tuning=Tuning("block", drop=0.0))
    training = quantized.in_batches_of(2, outside)
    objective = block_objective(Chain(training, {0: block}, ActSpec()), full.hidden, block.tuning)
    with torch.no_grad():
        behind = quantized.fork()
        behind.run(0, block.weights_at(block.initial()), advance=True)
        reference = (behind.hidden.data[6:8] - full.hidden.data[6:8]).square().mean()
    parameters = within(block.initial(), 0)
    assert float(objective.loss(parameters, 3)) == pytest.approx(float(reference), rel=1e-4)
    assert objective.batches == [0, 1, 2, 3, 4, 5, 6]
    assert objective.held_out(parameters) == pytest.approx(float(objective.loss(parameters, 7)), rel=1e-6)
