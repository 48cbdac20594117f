"""What stands beside the weights, tuned with the codes: it starts as it is, moves, and is deployed as it is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.blocks.weights import ONLINE_DTYPE, ONLINE_PARTS, BlockWeights
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.learn.affine import apply_online
from quant.solvers import get_solver
from quant.tune.block import SHIFT, TunedBlock
from quant.tune.chain import Chain
from quant.tune.config import Tuning
from tests.helpers import CPU

SPEC, ACT = QuantSpec(4), ActSpec(4, 4)


def with_everything(model, index):
    """A block of the model with matrices and clips wherever they can stand, as files hold them."""
    weights, attention = BlockWeights.read(model, index, CPU), "self_attn"
    generator = torch.Generator().manual_seed(index)
    near = {n: torch.eye(n) + 0.1 * torch.randn(n, n, generator=generator) for n in (4, 6, 8, 12, 16)}
    for group in model.groups:
        n_in = weights.weight(group[0]).shape[1]
        left = next(matrix for n, matrix in near.items() if n_in % n == 0)
        weights = apply_online(weights, tuple(group), left.half().float(), None)
    readers = list(weights.lefts)
    size = model.family.heads(model.config).q[1].shape[1]
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0].half()
    return replace(
        weights,
        input_clips={name: torch.tensor([0.9, 0.8]).half().float() for name in readers},
        head_matrices={attention: turn.float()},
        head_clips={attention: torch.full((3, 2), 0.9).half().float()},
    )


def tuned(model, index, weights, online=True):
    solve, solved = get_solver("rtn"), {}
    for name, (_, n_in) in model.linear_shapes().items():
        solved[name] = solve(weights.weight(name).float(), GramStats.from_gram(torch.eye(n_in)), SPEC)
    return TunedBlock(model, index, weights, solved, SPEC, Tuning("model", online=online))


@pytest.fixture
def opened(model_dir, tmp_path):
    return load_model(str(model_dir("llama")), dtype=torch.float32, cache_dir=tmp_path)


def test_the_start_is_what_is_there_and_every_part_gets_a_gradient(opened):
    weights = with_everything(opened, 1)
    block = tuned(opened, 1, weights)
    parameters = {name: t.requires_grad_() for name, t in block.initial().items()}
    beside = BlockWeights(**{part: getattr(weights, part) for part in ONLINE_PARTS}).named()
    assert {name for name in parameters if name.endswith(SHIFT)} == {name + SHIFT for name in beside}
    at = block.weights_at(parameters)
    for name, tensor in beside.items():
        assert torch.equal(at.named()[name], tensor), name
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(opened, ids, device=CPU, batch=2).capture(opened.outside_weights(CPU))
    chain = Chain(stream, {1: block}, ACT)
    chain({f"1.{name}": t for name, t in parameters.items()}, stream.hidden[slice(0, 2)], 0).square().sum().backward()
    for name in beside:
        gradient = parameters[name + SHIFT].grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name


def test_what_is_deployed_is_what_is_trained(opened):
    """In the dtype that files keep it in; without ``online`` nothing beside the weights moves."""
    block = tuned(opened, 0, with_everything(opened, 0))
    parameters = block.initial()
    for name, tensor in parameters.items():
        if name.endswith(SHIFT):
            tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    trained, changed = block.weights_at(parameters), block.changes_at(parameters).named()
    assert changed and all(tensor.dtype == ONLINE_DTYPE for tensor in changed.values())
    for name, tensor in changed.items():
        assert torch.equal(trained.named()[name], tensor.float()), name
        assert not torch.equal(block.moving[name], tensor.float()), name
    fixed = tuned(opened, 0, with_everything(opened, 0), online=False)
    assert not [name for name in fixed.initial() if name.endswith(SHIFT)]
    assert fixed.changes_at(fixed.initial()).named() == {}
