"""Steps by compiled loops: every operation against torch in float64 on tensors that lie awkwardly, states, and what is left to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.core.gram import GramStats
from quant.core.recording import Call, recorded
from quant.core.types import QuantSpec
from quant.kernels.matmul.cpu_bytes import ByteTiles
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.matmul.weight import PackedLinear, PackedWeight, side_by_side
from quant.kernels.steps import operations
from quant.kernels.steps.program import Program
from quant.solvers.rtn import rtn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awkward() -> list[Tensor]:
    """Tensors that lie side by side, transposed, with holes, repeated, from the middle of something, of one number, of none."""
    base = random(6, 10, 8)
    return [base, base.transpose(0, 2), base[1:5:2, :, ::3], random(6, 1, 8).expand(6, 10, 8), base[3, 4:5, 2:3], base[0, 0, 0],
            random(2, 3, 2, 5, 4).transpose(1, 4), base[:0]]  # fmt: skip


def programmed(step: Callable[[Tensor], Tensor], given: Tensor) -> Program:
    """A step's program, of which every operation is compiled, its loops checked on another input."""
    program = Program.of(recorded(step, given.clone()))
    assert program is not None
    program.checked(given.flip(0) if given.dim() else given * 2)
    left = [str(operation.call.function) for operation in program.operations if operation.rows is None]
    assert not left, left
    return program


def compiled(program: Program) -> int:
    return sum(operation.rows is not None for operation in program.operations)


ELEMENTS = {
    "neg": torch.neg, "rsqrt": lambda x: torch.rsqrt(x.square() + 1), "sqrt": lambda x: torch.sqrt(x * x), "exp": torch.exp,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "relu": F.relu, "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "pow": lambda x: x.pow(2), "half": lambda x: x / 2 - 0.25,
    "two": lambda x: x * x.flip(0).mul(1.5) + x if x.dim() else x * x, "from": lambda x: 1.0 * x - x * 3,
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements(name: str) -> None:
    function = ELEMENTS[name]
    for x in awkward():
        with torch.inference_mode():
            recording = recorded(function, x.clone(memory_format=torch.preserve_format) * 3)
            program = Program.of(recording)
            if not x.numel():
                continue
            assert program is not None
            program.checked(x)
            left = {operation.call.function for operation in program.operations if operation.rows is None}
            assert left <= {torch.ops.aten.flip.default, torch.ops.aten.square.default}, left
            expected = function(x.double())
            assert torch.allclose(program(x).double(), expected, rtol=2e-6, atol=1e-6), x.shape


def test_what_moves_numbers() -> None:
    def step(x: Tensor) -> Tensor:
        parts = x.transpose(0, 1)[:, :, None], x.transpose(0, 1)[:, :, None].neg()
        joined = torch.cat(parts, -1)
        return joined.transpose(1, 2).reshape(-1, 4).transpose(0, 1).contiguous().clone() + joined.mean()

    x = random(4, 6)
    with torch.inference_mode():
        program = Program.of(recorded(step, random(4, 6, seed=1)))
        assert program is not None
        program.checked(random(4, 6, seed=2))
        assert torch.allclose(program(x), step(x), atol=1e-6)
        assert {str(o.call.function) for o in program.operations if o.rows is None} == {"aten.mean.default"}


@pytest.mark.parametrize("keepdim", [True, False])
def test_means_and_norms(keepdim: bool) -> None:
    weight, bias = random(8, seed=5), random(8, seed=6)
    for x in (random(3, 5, 8), random(8, 3, 5).permute(1, 2, 0), random(1, 1, 8) * 1e4 + 3, random(3, 5, 8) + 50):
        with torch.inference_mode():
            program = programmed(lambda x: x.mean(-1, keepdim=keepdim), x)
            assert torch.allclose(program(x).double(), x.double().mean(-1, keepdim=keepdim), rtol=1e-6, atol=1e-6)
            x = x.contiguous()
            for given in ((weight, bias), (weight, None), (None, None)):
                program = programmed(lambda x, given=given: F.layer_norm(x, (8,), *given, eps=1e-3), x)
                exact = F.layer_norm(x.double(), (8,), *(t if t is None else t.double() for t in given), eps=1e-3)
                assert torch.allclose(program(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_attention(mask: str, repeat: int) -> None:
    k, v = random(2, 2, 7, 4, seed=1), random(2, 2, 7, 6, seed=2).transpose(1, 2).contiguous().transpose(1, 2)
    seen = torch.arange(7) < 5
    own = {"none": None, "bool": seen.expand(2, 1, 3, 7), "float": torch.where(seen, 0.5, -torch.inf)[None, None, None],
           "causal": None}[mask]  # fmt: skip
    q = random(2, 3, 2 * repeat, 4).transpose(1, 2)

    def step(q: Tensor, k: Tensor = k, v: Tensor = v, own: Tensor | None = own) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=own, is_causal=mask == "causal", scale=0.7, enable_gqa=True
        )

    with torch.inference_mode():
        program = Program.of(recorded(step, q.clone()))
        if mask == "causal":
            assert program is None
            return
        assert program is not None
        program.checked(q * 2)
        assert all(operation.rows for operation in program.operations)
        exact = step(q.double(), k.double(), v.double(), own.double() if mask == "float" else own)
        assert torch.allclose(program(q).double(), exact, rtol=1e-5, atol=1e-6)


class Memory:
    """A step with state in tensors: what it reads goes to the next place, and it answers with the mean of all places."""

    def __init__(self, length: int) -> None:
        self.kept, self.place = torch.zeros(2, length, 3), torch.zeros(1, dtype=torch.long)

    def __call__(self, x: Tensor) -> Tensor:
        self.kept.index_copy_(1, self.place + 0, torch.stack([x, x * 2])[:, None])
        self.place.add_(1)
        return self.kept.transpose(1, 2).mean(-1)


def test_state_is_kept_and_its_end_is_seen() -> None:
    own, other = Memory(6), Memory(6)
    with torch.inference_mode():
        recording = recorded(own, random(3))
        assert torch.equal(recording.result, other(random(3)))
        program = Program.of(recording)
        assert program is not None
        for number in range(1, 6):
            x = random(3, seed=number)
            y = program.checked(x) if number == 1 else program(x)
            assert torch.allclose(y, other(x), atol=1e-6) and torch.equal(own.kept, other.kept)
        assert int(own.place) == 6
        assert {str(o.call.function) for o in program.operations if o.rows is None} <= {"aten.stack.default"}
        before, behind = own.kept.clone(), own.kept.untyped_storage().nbytes()
        with pytest.raises(IndexError, match="does not have"):
            program(random(3))
        assert torch.equal(own.kept, before) and own.kept.untyped_storage().nbytes() == behind


def test_the_input_and_earlier_answers_stay_what_they_are() -> None:
    with torch.inference_mode():
        program = programmed(lambda x: x.neg(), random(4))
        given = random(4, seed=3)
        first = program(given)
        second = program(random(4, seed=4))
        assert torch.equal(given, random(4, seed=3)) and torch.equal(first, -given) and not torch.equal(first, second)


def test_loops_that_give_something_else_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations.UNARY, "silu", operations.UNARY["sigmoid"])
    x = random(5)
    with torch.inference_mode():
        program = Program.of(recorded(lambda x: F.silu(x.neg()), random(5, seed=1)))
        assert program is not None and compiled(program) == 2
        assert torch.equal(program.checked(x), F.silu(-x)) and compiled(program) == 1
        assert torch.equal(program(x * 2), F.silu(-x * 2))
        assert torch.isnan(program(x * torch.nan)).all()


@pytest.mark.parametrize("step", [lambda x: x.cumsum(0), lambda x: x.cos(), lambda x: x[:2] + x[:, :2].sum()])
def test_what_has_no_loops_is_torch_s(step: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode():
        program = Program.of(recorded(lambda x: step(x) * 2, random(2, 4)))
        assert program is not None
        x = random(2, 4, seed=1)
        assert torch.allclose(program.checked(x), step(x) * 2)
        assert torch.allclose(program(x * 3), step(x * 3) * 2)
        assert 0 < compiled(program) < len(program.operations)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_have_no_program(dtype: torch.dtype) -> None:
    assert Program.of(recorded(lambda x: x.neg(), random(4).to(dtype))) is None


def packed(layout: Any, bits: int, symmetric: bool, n_out: int, group: int = 32, seed: int = 0) -> PackedWeight:
    weight = random(n_out, 96, seed=seed)
    return pack_weight(rtn(weight, GramStats(96), QuantSpec(bits, group, symmetric)), layout=layout)


@pytest.mark.parametrize("layout", [FieldTiles(), ByteTiles()])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_their_layout(layout: Any, bits: int, symmetric: bool, biased: bool) -> None:
    if isinstance(layout, ByteTiles) and not layout.runs_here():
        pytest.skip("this CPU has no products of bytes")
    weight = packed(layout, bits, symmetric, 40)
    linear = PackedLinear(weight, random(40, seed=7) if biased else None)
    x = random(1, 1, 96)
    with torch.inference_mode():
        program = programmed(linear, random(1, 1, 96, seed=1))
        y = program(x)
        assert torch.equal(y, linear(x))
        if not isinstance(layout, ByteTiles):
            exact = x.double() @ weight.dequantize().double().T + (linear.bias.double() if biased else 0)
            assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-4)


def test_products_side_by_side_are_one() -> None:
    weights = side_by_side([packed(FieldTiles(), 4, False, n_out, seed=n_out) for n_out in (32, 64)])
    linears = [PackedLinear(weight) for weight in weights]
    x = random(1, 96)
    with torch.inference_mode():

        def step(x: Tensor) -> Tensor:
            x = x * 1
            return torch.cat([linear(x) for linear in linears], -1)

        program = programmed(step, random(1, 96, seed=1))
        assert torch.equal(program(x), step(x))
        assert sum(row[0] == operations.loops.CALL for o in program.operations if o.rows for row in o.rows.rows) == 1


def test_products_that_are_more_than_codes_are_left() -> None:
    real = rtn(random(40, 96), GramStats(96), QuantSpec(4, 32, kind="real"))
    filled = rtn(random(40, 90), GramStats(90), QuantSpec(4, 45))
    for answer, n_in in ((real, 96), (filled, 90)):
        linear = PackedLinear(pack_weight(answer, layout=FieldTiles()))
        with torch.inference_mode():
            recording = recorded(linear, random(1, n_in))
            assert [operations.rows_of(call) for call in recording.calls if isinstance(call, Call)] == [None]
            two = PackedLinear(packed(FieldTiles(), 4, False, 40))
            assert Program.of(recorded(two, random(2, 96))) is None  # of two tokens


@pytest.mark.parametrize(
    "step",
    [
        lambda x: (
            torch.pow(x.abs() + 0.5, x.amax(-1, keepdim=True)[0, 0]) * 2
        ),  # an exponent that another input changes
        lambda x: torch.pow(3.0, x.amax(-1, keepdim=True)) * 2,
        lambda x: torch.pow(x.abs(), x) * 2,
        lambda x: torch.cat([x, x[..., :0] * 2.0], -1) * 1.0,
        lambda x: x.sum().mean(-1) + x,
    ],
)
def test_forms_that_are_not_known_are_torch_s(step: Callable[[Tensor], Tensor]) -> None:
    first, then = torch.full((2, 3), 2.0), random(2, 3) + 3
    with torch.inference_mode():
        program = Program.of(recorded(step, first.clone()))
        assert program is not None
        assert torch.equal(program.checked(first), step(first))
        assert torch.allclose(program(then), step(then), rtol=1e-5)


def test_attention_to_nothing_is_zero() -> None:
    k, v, q = random(1, 1, 4, 8, seed=1), random(1, 1, 4, 8, seed=2), random(1, 1, 1, 8)

    def step(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=x > 0)

    with torch.inference_mode():
        program = Program.of(recorded(step, torch.ones(1, 1, 1, 4)))
        assert program is not None
        program.checked(torch.ones(1, 1, 1, 4))
        assert compiled(program) == 1
        nothing = torch.zeros(1, 1, 1, 4)
        assert torch.equal(program(nothing), step(nothing)) and not program(nothing).any()
