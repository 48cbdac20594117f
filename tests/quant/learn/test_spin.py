"""Learned rotations: orthogonal whatever is learned, the same function in float64, gradients against differences, and the start."""

import pytest
import torch

from models.load import load_model
from quant.blocks.weights import BlockWeights
from quant.core.rounding import NumberFormat
from quant.core.types import QuantSpec
from quant.learn.config import Rotation
from quant.learn.rotation import Rewriting, random_matrices, rotated, untied
from quant.learn.spin import Spin, TurnedLink, cayley, nearest
from tests.helpers import CPU, streamed_logits

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 250


def logits(model):
    """Logits of the model as every run reads it."""
    return streamed_logits(model, IDS)


def random(shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5, 5), (40, 40)])
def test_every_matrix_is_orthogonal(shape, size):
    """Also far from the start, where the skew matrix is large; what stands on and below the diagonal does nothing."""
    raw = random(shape, size=size)
    turn, eye = cayley(raw), torch.eye(shape[-1], dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.mT, eye.expand(shape), rtol=0, atol=1e-12)
    assert torch.equal(turn, cayley(raw.triu(1)))
    skew = raw.triu(1) - raw.triu(1).mT
    torch.testing.assert_close(turn, torch.linalg.inv(eye + skew) @ (eye - skew), rtol=0, atol=1e-12)
    assert bool((torch.linalg.det(turn) > 0).all())
    if size == 0:
        assert torch.equal(turn, eye.expand(shape))


def test_gradients_are_those_of_small_differences():
    raw = random((4, 4)).requires_grad_()
    assert torch.autograd.gradcheck(cayley, raw, atol=1e-7)


def learned(model, kinds, seed=0):
    """Matrices of a rotation after steps in random directions, every block's values another."""
    spin = Spin(random_matrices(model, Rotation(kinds)))
    raw = {name: random(m.shape, seed + i, 0.3) for i, (name, m) in enumerate(spin.start.items())}
    return spin.learned(raw)


@pytest.mark.parametrize("kinds", [("residual",), ("vo",), ("residual", "vo", "qk", "down")])
@pytest.mark.parametrize("name", ["llama", "qwen3", "llama gqa, tied"])
def test_a_model_with_learned_rotations_gives_the_same_logits(name, kinds, exact):
    model = exact(name)
    right, matrices = logits(model), learned(model, kinds)
    turned = rotated(model, Rotation(kinds), CPU, matrices=matrices)
    assert float((logits(turned) - right).norm() / right.norm()) < 1e-13
    other = rotated(model, Rotation(kinds), CPU)
    for index in range(len(model.blocks)):
        one, two = turned.block_weights(index, CPU), other.block_weights(index, CPU)
        assert not torch.equal(one["self_attn.v_proj.weight"], two["self_attn.v_proj.weight"])


@pytest.mark.parametrize("kind", ["residual", "vo"])
def test_matrices_that_are_not_orthogonal_fail(kind, exact):
    """Negative control: one entry off."""
    model = exact("llama")
    matrices = {name: m.clone() for name, m in learned(model, (kind,)).items()}
    name = "residual" if kind == "residual" else "1.vo"
    matrices[name].flatten()[0] += 0.1
    right = logits(model)
    turned = rotated(model, Rotation((kind,)), CPU, matrices=matrices)
    assert float((logits(turned) - right).norm() / right.norm()) > 1e-4


def test_values_of_blocks_may_not_be_exchanged(exact):
    """Each block reads its own matrices: the value projection of one and the output projection of another do not fit."""
    model = exact("llama")
    matrices = dict(learned(model, ("vo",)))
    turned = rotated(model, Rotation(("vo",)), CPU, matrices=matrices)
    layout = model.family.heads(model.config)
    rows = layout.v[1]
    for index in range(len(model.blocks)):
        before, after = model.block_weights(index, CPU), turned.block_weights(index, CPU)
        for head, own in enumerate(rows):
            expected = matrices[f"{index}.vo"][head].T @ before["self_attn.v_proj.weight"][own]
            torch.testing.assert_close(after["self_attn.v_proj.weight"][own], expected, rtol=0, atol=1e-12)


def test_the_start_is_the_rotation_that_is_not_learned(exact):
    model = exact("llama")
    spin = Spin(random_matrices(model, Rotation()))
    start = spin.matrices(spin.initial(CPU), torch.float64)
    assert set(start) == {"residual", *(f"{i}.vo" for i in range(len(model.blocks)))}
    one, two = rotated(model, Rotation(), CPU, matrices=start), rotated(model, Rotation(), CPU)
    for name, tensor in one.block_weights(1, CPU).items():
        assert torch.equal(tensor, two.block_weights(1, CPU)[name]), name


def test_a_block_that_is_trained_is_the_block_that_is_read(model_dir, tmp_path):
    """Its weights at some matrices are those of the rotated checkpoint, rounded to nearest; gradients reach every matrix."""
    model = load_model(str(model_dir("llama")), dtype=torch.float32, cache_dir=tmp_path)
    rotation, spec = Rotation(), QuantSpec(4, 8)
    rewriting = Rewriting.of(model, untied(model.config), rotation, CPU)
    spin = Spin(random_matrices(model, rotation))
    raw = {name: random(m.shape, 3, 0.2).float().requires_grad_() for name, m in spin.start.items()}
    matrices = spin.matrices(raw)
    turned = rotated(model, rotation, CPU, matrices={name: m.detach() for name, m in matrices.items()})
    for index in range(len(model.blocks)):
        read = model.block_weights(index, CPU, torch.float32)
        link = TurnedLink(model, index, read, rewriting, spec)
        own = link.weights_at(link.own(matrices))
        exact = TurnedLink(model, index, read, rewriting, None).weights_at(link.own(matrices)).named()
        expected = BlockWeights.read(turned, index, CPU)
        linears = {f"{name}.weight" for group in model.groups for name in group}
        for name, tensor in expected.named().items():
            torch.testing.assert_close(exact[name].detach(), tensor, rtol=1e-5, atol=1e-6)
            if name in linears:
                assert_rounded(own.named()[name].detach(), by_hand(exact[name].detach(), 4, 8), 8)
            else:
                assert torch.equal(own.named()[name], exact[name])
        assert own.named().keys() == expected.named().keys()
        own.weight("self_attn.o_proj").square().sum().backward(retain_graph=True)
        own.weight("self_attn.q_proj").mul(torch.arange(own.weight("self_attn.q_proj").shape[1])).sum().backward(
            retain_graph=True
        )
        assert float(raw["residual"].grad.abs().sum()) > 0
        assert float(raw[f"{index}.vo"].grad.abs().sum()) > 0


def assert_rounded(own, wanted, size):
    """The same values; of one group in a hundred the scale may be the next float16 number: its quotient lay between two."""
    apart = ~torch.isclose(own, wanted, rtol=1e-5, atol=1e-6)
    assert float(apart.view(len(own), -1, size).any(-1).float().mean()) <= 0.01
    torch.testing.assert_close(own, wanted, rtol=2.0**-10, atol=1e-6)


def by_hand(weight, bits, size):
    """Rounding to nearest over the range of groups of neighbours, zero included, number by number in float64."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = [float(x) for x in weight[row, start : start + size]]
            low, high = min(0.0, *group), max(0.0, *group)
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = round(-low / scale)
            if zero < 1:  # which stands at 1 at least, and the range then ends where it did
                scale, zero = float(torch.tensor(high / (2**bits - 2)).half()), 1
            codes = [min(max(round(x / scale) + zero, 0), 2**bits - 1) for x in group]
            out[row, start : start + size] = torch.tensor([scale * (code - zero) for code in codes])
    return out


def test_rounding_to_nearest_lets_gradients_pass():
    weight = random((3, 8)).float().requires_grad_()
    value = nearest(weight, QuantSpec(3))
    assert len(value[0].detach().unique()) <= NumberFormat(8).qmax + 1
    value.sum().backward()
    assert float(weight.grad.abs().min()) > 0
