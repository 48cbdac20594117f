"""Which of torch's operations are rows of a program of compiled loops, and the rows that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.core.recording import Call
from quant.kernels.matmul.one_token import one_token
from quant.kernels.matmul.weight import Beside, PackedLinear, PackedWeight
from quant.kernels.steps import loops
from quant.kernels.steps.loops import DIMS, WIDTH

UNARY = {
    "neg": loops.NEG, "rsqrt": loops.RSQRT, "sqrt": loops.SQRT, "exp": loops.EXP, "tanh": loops.TANH,
    "sigmoid": loops.SIGMOID, "silu": loops.SILU, "relu": loops.RELU,
}  # fmt: skip
BINARY = {"add": loops.ADD, "sub": loops.SUB, "mul": loops.MUL, "div": loops.DIV}
COPIES = {"clone", "contiguous", "reshape", "to", "_to_copy", "expand"}  # where they are no views
Row = list[int]


class UnknownError(Exception):
    """An operation, or a form of one, that there are no loops for."""


class Rows:
    """The rows of one operation. kept: what their addresses are of, beside the tensors of the operation itself."""

    def __init__(self, call: Call) -> None:
        """Raises UnknownError."""
        self.rows: list[Row] = []
        self.kept: list[Any] = []
        owner = getattr(call.function, "__self__", None)
        if isinstance(owner, Beside):
            self._product(call, owner.whole, None)
        elif isinstance(owner, PackedLinear) and owner.floats is None and owner.integers is None:
            self._product(call, owner.packed, owner.bias)
        elif isinstance(call.function, torch._ops.OpOverload):
            given = dict(zip((a.name for a in call.function._schema.arguments), call.args, strict=False)) | call.kwargs
            self._operation(call.function._schema.name.partition("::")[2], given, call.result)
        else:
            raise UnknownError

    def _operation(self, name: str, given: dict[str, Any], result: Tensor) -> None:
        if name in UNARY:
            self._element(UNARY[name], result, given["self"])
        elif name in BINARY and given.get("alpha", 1) == 1 and given.get("rounding_mode") is None:
            self._pair(BINARY[name], result, given["self"], given["other"])
        elif name == "add_" and given.get("alpha", 1) == 1:
            self._pair(loops.ADD, given["self"], given["self"], given["other"])
        elif name == "pow" and isinstance(given["exponent"], int | float) and given["exponent"] == 2:
            self._pair(loops.MUL, result, given["self"], given["self"])
        elif name == "gelu":
            self._element(loops.GELU_TANH if given.get("approximate") == "tanh" else loops.GELU, result, given["self"])
        elif name in COPIES:
            self._copy(result, given["self"])
        elif name == "cat":
            self._cat(result, given["tensors"], given.get("dim", 0))
        elif name == "mean":
            self._mean(result, given)
        elif name == "layer_norm":
            self._layer_norm(result, given)
        elif name == "index_copy_":
            self._placed(given)
        elif name == "scaled_dot_product_attention":
            self._attention(result, given)
        else:
            raise UnknownError

    def _number(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.tensor(value, dtype=dtype)
        self.kept.append(tensor)
        return tensor

    def _add(self, kind: int, shape: Sequence[int], operands: Sequence[Tensor], more: Sequence[int] = ()) -> None:
        """A row of a kind that works on every element: out first, then what is read, as it lies when made of that shape."""
        _check(len(shape) <= DIMS)
        row = [kind, *(1,) * (DIMS - len(shape)), *shape]
        for operand in operands:
            own = operand.expand(shape)
            row += [own.data_ptr(), *(0,) * (DIMS - len(shape)), *own.stride()]
        row += [0] * (loops.MORE - len(row)) + list(more)
        self.rows.append(row + [0] * (WIDTH - len(row)))

    def _element(self, kind: int, out: Tensor, x: Tensor) -> None:
        _floats(out, x)
        self._add(kind, out.shape, (out, x))

    def _pair(self, kind: int, out: Tensor, x: Any, y: Any) -> None:
        x, y = (t if isinstance(t, Tensor) else self._number(t, out.dtype) for t in (x, y))
        if out.dtype == torch.int64:
            _check(kind == loops.ADD, *(t.dtype == torch.int64 and t.device.type == "cpu" for t in (out, x, y)))
            kind = loops.INT_ADD
        else:
            _floats(out, x, y)
        self._add(kind, out.shape, (out, x, y))

    def _copy(self, out: Tensor, x: Tensor) -> None:
        _floats(out, x)
        if out.shape != x.shape and x.numel() == out.numel():  # the same numbers in order, in other rows
            _check(out.is_contiguous())
            out = out.view(x.shape)
        self._add(loops.COPY, out.shape, (out, x))

    def _cat(self, out: Tensor, parts: Sequence[Tensor], dim: int) -> None:
        start = 0
        for part in parts:
            _check(part.dim() == out.dim())
            self._element(loops.COPY, out.narrow(dim, start, part.shape[dim]), part)
            start += part.shape[dim]

    def _mean(self, out: Tensor, given: dict[str, Any]) -> None:
        x, dims = given["self"], given.get("dim")
        _floats(out, x)
        _check(
            x.dim() > 0 and dims is not None and [d % x.dim() for d in dims] == [x.dim() - 1],
            given.get("dtype") is None,
        )
        kept = out if given.get("keepdim") else out.unsqueeze(-1)
        self._add(loops.MEAN, x.shape, (kept, x))

    def _layer_norm(self, out: Tensor, given: dict[str, Any]) -> None:
        x, n = given["input"], given["normalized_shape"]
        weight, bias = given.get("weight"), given.get("bias")
        weight = torch.ones(n) if weight is None else weight
        bias = torch.zeros(n) if bias is None else bias
        eps = self._number(given.get("eps", 1e-5))
        _floats(out, x, weight, bias)
        _check(len(n) == 1, *(t.is_contiguous() for t in (out, x, weight, bias)))
        self.kept += [weight, bias]
        row = [0] * WIDTH
        row[0], row[loops.SHAPE], row[loops.SHAPE + 1] = loops.LAYER_NORM, x.numel() // n[0], n[0]
        row[loops.OUT], row[loops.X] = out.data_ptr(), x.data_ptr()
        row[loops.Y : loops.Y + 3] = weight.data_ptr(), bias.data_ptr(), eps.data_ptr()
        self.rows.append(row)

    def _placed(self, given: dict[str, Any]) -> None:
        into, dim, index, source = (given[name] for name in ("self", "dim", "index", "source"))
        _floats(into, source)
        _check(index.numel() == 1, index.dtype == torch.int64, source.dim() == into.dim() > 0)
        place = into.narrow(dim, 0, 1)
        self._add(loops.PLACED, place.shape, (place, source), (index.data_ptr(), into.stride(dim), into.shape[dim]))

    def _attention(self, out: Tensor, given: dict[str, Any]) -> None:
        q, k, v = (given[name] for name in ("query", "key", "value"))
        _floats(out, q, k, v)
        _check(
            all(t.dim() == 4 and t.stride(3) == 1 for t in (out, q, k, v)),
            not given.get("dropout_p") and not given.get("is_causal"),
            k.shape[:3] == v.shape[:3]
            and k.shape[0] == q.shape[0]
            and q.shape[1] % k.shape[1] == 0,  # all that is read is there
            out.shape == (*q.shape[:3], v.shape[3]) and k.shape[3] == q.shape[3],
        )
        (batches, heads, queries, width), length = q.shape, k.shape[2]
        row = [loops.ATTENTION, batches, heads, queries, length, width, v.shape[3], heads // k.shape[1], loops.NO_MASK]
        for t in (q, k, v, out):
            row += [t.data_ptr(), *t.stride()[:3]]
        scale = given.get("scale")
        row += [self._number(width**-0.5 if scale is None else scale).data_ptr()]
        mask = given.get("attn_mask")
        if mask is not None:
            _check(mask.dtype in (torch.bool, torch.float32))
            row[8] = loops.BOOL_MASK if mask.dtype == torch.bool else loops.FLOAT_MASK
            row += [mask.data_ptr(), *mask.expand(batches, heads, queries, length).stride()]
        self.rows.append(row + [0] * (WIDTH - len(row)))

    def _product(self, call: Call, weight: PackedWeight, bias: Tensor | None) -> None:
        (x,), out = call.args, call.result
        _floats(out, x)
        _check(x.numel() == weight.n_in, x.is_contiguous(), out.is_contiguous())
        y = torch.empty(weight.grid.scale.shape[1])
        found = one_token(weight, x, y)
        if found is None:
            raise UnknownError
        address, arguments, kept = found
        self.kept += [kept, y]
        self.rows.append([loops.CALL, address, *arguments, *[0] * (WIDTH - 2 - len(arguments))])
        own = y[: weight.n_out].view(out.shape)
        if bias is None:
            self._element(loops.COPY, out, own)
        else:
            self._pair(loops.ADD, out, own, bias)


def _check(*holds: bool) -> None:
    if not all(holds):
        raise UnknownError


def _floats(*tensors: Tensor) -> None:
    _check(*(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors))


def rows_of(call: Call) -> Rows | None:
    """The rows of an operation; None where there are no loops for it, or for arguments in a form that nobody thought of."""
    try:
        return Rows(call)
    except (UnknownError, TypeError, KeyError, AttributeError, RuntimeError):
        return None
