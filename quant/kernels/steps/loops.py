"""Compiled loops over memory by its address: small float32 operations in a row, one call for all of them.

An operation is a row of WIDTH whole numbers: which one, sizes, addresses, strides in elements. Numbers that are no whole ones are
in memory, too. All are unsigned: an index that could be below 0 is looked at before every load. Sums are in any order. (Products with packed weights: `quant.kernels.matmul.one_token`.)
"""

# mypy: disable-error-code="call-arg, arg-type"
from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

DIMS = 5  # that a tensor may have
WIDTH = 40  # numbers of an operation
OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz"},
    "nogil": True,
}
UNARY = COPY, NEG, RSQRT, SQRT, EXP, TANH, SIGMOID, SILU, RELU, GELU, GELU_TANH = tuple(range(11))
BINARY = ADD, SUB, MUL, DIV = tuple(range(11, 15))
INT_ADD, PLACED, MEAN, LAYER_NORM, ATTENTION, CALL = tuple(range(15, 21))
NO_MASK, BOOL_MASK, FLOAT_MASK = range(3)
SHAPE, OUT, X, Y = (
    1,
    1 + DIMS,
    2 + 2 * DIMS,
    3 + 3 * DIMS,
)  # where sizes are; where an address is, with its strides behind it
MORE = Y + 1 + DIMS
Q, K, V, ANSWER, SCALE, MASK = 9, 13, 17, 21, 25, 26  # likewise of an attention, behind its kind and eight sizes
ROOT_HALF, ROOT_2_PI, CUBIC = math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715  # of GELU
HUGE = 1 << 40  # elements: arrays of addresses end where they are told to, and are told nothing


@intrinsic
def at(typing: Any, address: Any) -> Any:
    """A pointer to the memory at an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), emit


@intrinsic
def call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call the function at an address with the address of its arguments."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(function, arguments), emit


@njit(**OPTIONS)
def _unary(kind, n, out, o, o1, x, i, i1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """n elements of a row, at o + j·o1 and i + j·i1."""
    one, half = np.float32(1), np.float32(0.5)
    if kind in (COPY, PLACED):
        for j in range(n):
            out[o + j * o1] = x[i + j * i1]
    elif kind == NEG:
        for j in range(n):
            out[o + j * o1] = -x[i + j * i1]
    elif kind == SILU:
        for j in range(n):
            out[o + j * o1] = x[i + j * i1] / (one + math.exp(-x[i + j * i1]))
    else:
        for j in range(n):
            v = x[i + j * i1]
            if kind == RSQRT:
                v = one / math.sqrt(v)
            elif kind == SQRT:
                v = math.sqrt(v)
            elif kind == EXP:
                v = math.exp(v)
            elif kind == TANH:
                v = math.tanh(v)
            elif kind == SIGMOID:
                v = one / (one + math.exp(-v))
            elif kind == RELU:
                v = max(v, np.float32(0))
            elif kind == GELU:
                v = half * v * (one + math.erf(v * np.float32(ROOT_HALF)))
            else:
                v = half * v * (one + math.tanh(np.float32(ROOT_2_PI) * (v + np.float32(CUBIC) * v * v * v)))
            out[o + j * o1] = v


@njit(**OPTIONS)
def _binary(kind, n, out, o, o1, x, i, i1, y, k, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Likewise of two."""
    if kind == ADD:
        for j in range(n):
            out[o + j * o1] = x[i + j * i1] + y[k + j * k1]
    elif kind == SUB:
        for j in range(n):
            out[o + j * o1] = x[i + j * i1] - y[k + j * k1]
    elif kind == MUL:
        for j in range(n):
            out[o + j * o1] = x[i + j * i1] * y[k + j * k1]
    else:
        for j in range(n):
            out[o + j * o1] = x[i + j * i1] / y[k + j * k1]


@njit(**OPTIONS)
def _everywhere(a, out, x, y, shift):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """An operation on every element; out begins ``shift`` (unsigned, as all indices) elements behind its address."""
    kind, n = a[0], a[SHAPE + DIMS - 1]
    o1, i1, k1 = a[OUT + DIMS], a[X + DIMS], a[Y + DIMS]
    for p in range(a[SHAPE]):
        for q in range(a[SHAPE + 1]):
            for r in range(a[SHAPE + 2]):
                for s in range(a[SHAPE + 3]):
                    o = shift + p * a[OUT + 1] + q * a[OUT + 2] + r * a[OUT + 3] + s * a[OUT + 4]
                    i = p * a[X + 1] + q * a[X + 2] + r * a[X + 3] + s * a[X + 4]
                    k = p * a[Y + 1] + q * a[Y + 2] + r * a[Y + 3] + s * a[Y + 4]
                    if kind == INT_ADD or kind >= ADD and kind <= DIV:
                        _binary(ADD if kind == INT_ADD else kind, n, out, o, o1, x, i, i1, y, k, k1)
                    else:
                        _unary(kind, n, out, o, o1, x, i, i1)


@njit(**OPTIONS)
def _mean(a):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Means over the last dimension: sizes are those of x, out's strides those of the dimensions before."""
    out, x = carray(at(a[OUT]), HUGE, np.float32), carray(at(a[X]), HUGE, np.float32)
    n, i1 = a[SHAPE + DIMS - 1], a[X + DIMS]
    for p in range(a[SHAPE]):
        for q in range(a[SHAPE + 1]):
            for r in range(a[SHAPE + 2]):
                for s in range(a[SHAPE + 3]):
                    i = p * a[X + 1] + q * a[X + 2] + r * a[X + 3] + s * a[X + 4]
                    total = np.float32(0)
                    for j in range(n):
                        total += x[i + j * i1]
                    out[p * a[OUT + 1] + q * a[OUT + 2] + r * a[OUT + 3] + s * a[OUT + 4]] = total / np.float32(n)


@njit(**OPTIONS)
def _layer_norm(a):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Rows of n side by side: (x - mean) / sqrt(variance + eps) · weight + bias, the variance in a second pass."""
    rows, n = a[SHAPE], a[SHAPE + 1]
    x, out = carray(at(a[X]), (rows, n), np.float32), carray(at(a[OUT]), (rows, n), np.float32)
    weight, bias = carray(at(a[Y]), n, np.float32), carray(at(a[Y + 1]), n, np.float32)
    eps = carray(at(a[Y + 2]), 1, np.float32)[0]
    for row in range(rows):
        total, squares = 0.0, 0.0
        for j in range(n):
            total += x[row, j]
        mean = total / n
        for j in range(n):
            squares += (x[row, j] - mean) * (x[row, j] - mean)
        factor = 1.0 / math.sqrt(squares / n + eps)
        for j in range(n):
            out[row, j] = (x[row, j] - mean) * factor * weight[j] + bias[j]


@njit(**OPTIONS)
def _dot(x, i, y, k, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Of n elements from x[i] and y[k] on."""
    total = np.float32(0)
    for j in range(n):
        total += x[i + j] * y[k + j]
    return total


@njit(**OPTIONS)
def _add_times(answer, p, v, i):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """answer += p · v from v[i] on."""
    for j in range(answer.shape[0]):
        answer[j] += p * v[i + j]


@njit(**OPTIONS)
def _attention(a):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """softmax(scale q kᵀ + mask) v of batches, heads and queries, one query after the other. Keys and values that the mask leaves
    out are not read. Columns of q, k, v and out are side by side; head h reads the keys of head h // repeat."""
    batches, heads, queries, length, width = a[1], a[2], a[3], a[4], a[5]
    deep, repeat, kind = a[6], a[7], a[8]
    q, k, v = (
        carray(at(a[Q]), HUGE, np.float32),
        carray(at(a[K]), HUGE, np.float32),
        carray(at(a[V]), HUGE, np.float32),
    )
    out, scale = carray(at(a[ANSWER]), HUGE, np.float32), carray(at(a[SCALE]), 1, np.float32)[0]
    flags, added = carray(at(a[MASK]), HUGE, np.uint8), carray(at(a[MASK]), HUGE, np.float32)
    scores, answer = np.empty(length, np.float32), np.empty(deep, np.float32)
    for b in range(batches):
        for h in range(heads):
            for t in range(queries):
                iq = b * a[Q + 1] + h * a[Q + 2] + t * a[Q + 3]
                ik, iv = b * a[K + 1] + h // repeat * a[K + 2], b * a[V + 1] + h // repeat * a[V + 2]
                im = b * a[MASK + 1] + h * a[MASK + 2] + t * a[MASK + 3]
                largest = np.float32(-np.inf)
                for i in range(length):
                    scores[i] = -np.inf
                    if kind == BOOL_MASK and flags[im + i * a[MASK + 4]] == 0:
                        continue
                    total = scale * _dot(q, iq, k, ik + i * a[K + 3], width)
                    if kind == FLOAT_MASK:
                        total += added[im + i * a[MASK + 4]]
                    scores[i] = total
                    largest = max(largest, total)
                whole, answer[:] = np.float32(0), 0
                for i in range(length):
                    if scores[i] != -np.inf:
                        p = math.exp(scores[i] - largest)
                        whole += p
                        _add_times(answer, p, v, iv + i * a[V + 3])
                io = b * a[ANSWER + 1] + h * a[ANSWER + 2] + t * a[ANSWER + 3]
                for j in range(deep):
                    out[io + j] = answer[j] / whole if largest > -np.inf else np.float32(0)  # where all is masked


@njit(**OPTIONS)
def run(program):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Every operation of a program uint64 [n, WIDTH], in order: -1, or the number of one that would write behind the end of what it
    writes to, with which it ends."""
    for number in range(program.shape[0]):
        a = program[number]
        kind = a[0]
        if kind == CALL:
            call(a[1], a[2:].ctypes.data)
        elif kind == INT_ADD:
            out, x, y = (
                carray(at(a[OUT]), HUGE, np.int64),
                carray(at(a[X]), HUGE, np.int64),
                carray(at(a[Y]), HUGE, np.int64),
            )
            _everywhere(a, out, x, y, np.uint64(0))
        elif kind == MEAN:
            _mean(a)
        elif kind == LAYER_NORM:
            _layer_norm(a)
        elif kind == ATTENTION:
            _attention(a)
        else:
            out, x = carray(at(a[OUT]), HUGE, np.float32), carray(at(a[X]), HUGE, np.float32)
            shift = np.uint64(0)
            if kind == PLACED:  # at the place that a tensor names, in steps of so many elements
                place = carray(at(a[MORE]), 1, np.uint64)[0]
                if place >= a[MORE + 2]:
                    return number
                shift = place * a[MORE + 1]
            _everywhere(a, out, x, carray(at(a[Y]), HUGE, np.float32), shift)
    return -1
