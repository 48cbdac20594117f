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
from quant.tune.block import TunedBlock
from quant.tune.config import Tuning
from quant.tune.objectives import (
    block_objective,
    divergence,
    logits_of,
    model_objective,
    trimmed_squared_error,
    weights_of,
)
from tests.helpers import CPU

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


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "falcon 40b", "gemma2", "qwen3"])
@pytest.mark.parametrize("act", [ActSpec(), ActSpec(8, kv_bits=8)], ids=["", "A8KV8"])
def test_the_model_of_tuned_blocks_is_that_of_the_stream(family, act, model_dir):
    model = opened(model_dir(family))
    blocks = [rounded_block(model, i, QuantSpec(3)) for i in range(len(model.blocks))]
    parameters = {f"{b.index}.{k}": t for b in blocks for k, t in b.initial().items()}
    outside, ids = model.outside_weights(CPU), tokens(2)
    stream = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    for block in blocks:
        stream.run(block.index, block.weights_at(block.initial()), advance=True, act=act)
    reference = stream.logits(slice(0, 2), outside)
    with torch.no_grad():
        logits = logits_of(model, weights_of(blocks, parameters), outside, ids, act)
    assert torch.allclose(logits, reference, atol=1e-4 * float(reference.abs().max()))


def test_the_loss_of_the_model_is_the_divergence_from_full_precision(model_dir):
    model = opened(model_dir("llama"))
    outside, ids = model.outside_weights(CPU), tokens()
    full = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    one, two, three = (BlockWeights.read(model, i, CPU).within(i) for i in range(3))
    first, rest = one | two | three, one | three
    blocks = [rounded_block(model, 1)]  # the others stay
    for index in range(3):
        full.run(index, BlockWeights.read(model, index, CPU), advance=True)
    objective = model_objective(model, blocks, rest, outside, full, ActSpec())
    parameters = {f"1.{k}": t for k, t in blocks[0].initial().items()}
    with torch.no_grad():
        weights = first | weights_of(blocks, parameters)
        p = torch.log_softmax(logits_of(model, first, outside, ids[4:6], None).double(), -1)
        q = torch.log_softmax(logits_of(model, weights, outside, ids[4:6], None).double(), -1)
    reference = float((p.exp() * (p - q)).sum(-1).mean())
    assert reference > 1e-4
    assert float(objective.loss(parameters, 2)) == pytest.approx(reference, rel=1e-3)


def test_gradients_of_the_model_reach_every_parameter(model_dir):
    model = opened(model_dir("opt"))
    outside, ids = model.outside_weights(CPU), tokens()
    full = BlockStream(model, ids, device=CPU, batch=2).capture(outside)
    for index in range(3):
        full.run(index, BlockWeights.read(model, index, CPU), advance=True)
    blocks = [rounded_block(model, i, tuning=Tuning("model", norms=True)) for i in range(3)]
    parameters = {f"{b.index}.{k}": t.requires_grad_() for b in blocks for k, t in b.initial().items()}
    model_objective(model, blocks, BlockWeights(), outside, full, ActSpec()).loss(parameters, 0).backward()
    without = {name for name, p in parameters.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)}
    assert not without - {f"{i}.self_attn.k_proj.bias.shift" for i in range(3)}  # softmax is blind to it


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
    objective = block_objective(block, training, full.hidden, ActSpec(), block.tuning)
    with torch.no_grad():
        behind = quantized.fork()
        behind.run(0, block.weights_at(block.initial()), advance=True)
        reference = (behind.hidden.data[6:8] - full.hidden.data[6:8]).square().mean()
    parameters = block.initial()
    assert float(objective.loss(parameters, 3)) == pytest.approx(float(reference), rel=1e-4)
    assert objective.batches == [0, 1, 2, 3, 4, 5, 6]
    assert objective.held_out(parameters) == pytest.approx(float(objective.loss(parameters, 7)), rel=1e-6)
