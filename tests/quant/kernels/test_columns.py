"""Every implementation of the block loops against the plain torch one: same codes, same state, awkward blocks too."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from quant.core.levels import TABLES, levels_of
from quant.core.linalg import upper_factor
from quant.core.rounding import NumberFormat
from quant.kernels import columns as blocks
from quant.kernels.columns import ColumnBlock, TorchKernels
from quant.kernels.columns.cpu import NumbaKernels
from tests.helpers import ROOT, long
from tests.references import inputs, make_stats

CUDA = torch.cuda.is_available()
SMALL = [(1, 1), (40, 1), (16, 7), (35, 33)]  # rows x columns: tiles of rows have ragged ends
CASES = [("numba", shape) for shape in (*SMALL, (64, 20), (65, 33), (200, 128))] + [
    ("triton", shape) for shape in SMALL
]


def backend(name: str):
    """The kernels and the device they run on; Triton is interpreted where there is no GPU."""
    if name == "numba":
        return NumbaKernels(), "cpu"
    pytest.importorskip("triton", reason="requirements-dev.txt brings it")
    if not CUDA:
        assert os.environ["TRITON_INTERPRET"] == "1"
    from quant.kernels.columns.cuda import TritonKernels

    return TritonKernels(), "cuda" if CUDA else "cpu"


def block(n_rows: int, n_columns: int, n_groups: int = 1, dead: bool = False, device: str = "cpu"):
    """A block of coordinate descent: slices of larger matrices, as the solvers pass them."""
    generator = torch.Generator().manual_seed(n_columns + n_rows)
    x = inputs(n_columns, 4 * n_columns + 8, seed=n_rows)
    if dead:
        x[:, 0] = 0
    gram = make_stats(x).gram
    weight, residual = (torch.randn(n_rows, n_columns + 3, generator=generator)[:, 3:] for _ in range(2))
    residual = 0.1 * residual
    scale = torch.rand(n_rows, n_groups, generator=generator) + 0.1
    zero = torch.randint(0, 8, (n_rows, n_groups), generator=generator).float()
    group = torch.arange(n_columns) * n_groups // n_columns
    tensors = (weight, residual, residual @ gram, gram, scale, zero, group)
    codes = torch.zeros(n_rows, n_columns, dtype=torch.uint8, device=device)
    return ColumnBlock(*(t.to(device) for t in tensors), NumberFormat(8), codes)


def values_of(block: ColumnBlock, codes: torch.Tensor) -> torch.Tensor:
    return (codes.float() - block.zero[:, block.group]) * block.scale[:, block.group]


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", *long("iq4_nl")])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_levels_that_are_not_evenly_spaced(shape, kind, name):
    kernels, device = backend(name)
    numbers = NumberFormat(len(TABLES[kind]), TABLES[kind])
    given = block(*shape, 2 if shape[1] > 1 else 1, False, device)._replace(numbers=numbers)
    given = given._replace(scale=given.scale / max(TABLES[kind]))
    feedback = (given.matrix / given.matrix.diagonal()[:, None]).triu()
    answers = []
    for implementation in (TorchKernels(), kernels):
        descended, rounded = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
        residual, errors = given.residual.clone(), torch.empty_like(given.residual)
        implementation.coordinate_descent_(given._replace(residual=residual, codes=descended))
        incoming = given.target.clone(memory_format=torch.contiguous_format)
        implementation.gptq_(given._replace(residual=errors, incoming=incoming, matrix=feedback, codes=rounded))
        answers.append((descended, rounded, residual, errors))
    for own, expected in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    scale = given.scale[:, given.group]
    values = levels_of(answers[1][0], TABLES[kind]) * scale
    torch.testing.assert_close(given.target - answers[1][2], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["rounding", "relaxed", "free"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_coordinate_descent(shape, dead, groups, mode, name):
    kernels, device = backend(name)
    given = block(*shape, groups, dead, device)
    free = torch.rand(shape, generator=torch.Generator().manual_seed(5)).to(device) < 0.1 if mode == "free" else None
    answers = []
    for implementation in (TorchKernels(), kernels):
        state, codes = given.residual.clone(), torch.zeros(shape, dtype=torch.uint8, device=device)
        kept = given.incoming.clone()
        change = implementation.coordinate_descent_(
            given._replace(residual=state, codes=codes, rounding=mode != "relaxed", free=free)
        )
        assert torch.equal(given.incoming, kept), "the correlation is read only"
        torch.testing.assert_close(change, state - given.residual, rtol=1e-4, atol=1e-5)  # measured 0
        answers.append((state, codes))
    assert torch.equal(answers[0][1], answers[1][1])
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-4, atol=1e-5)  # measured 5e-7 (absolute)
    assert not torch.equal(answers[1][0], given.residual)
    if free is not None and shape[0] > 1:
        on_grid = given.target - answers[1][0] == values_of(given, answers[1][1])
        assert float(on_grid[free].float().mean()) < 0.1, "free entries are not rounded"  # measured 0


@pytest.mark.parametrize("loop", ["coordinate_descent_", "gptq_"])
@pytest.mark.parametrize("layers", [1, 2])
def test_triton_visits_wide_blocks_in_parts(layers, loop, monkeypatch):
    """As torch visits the whole block; parts are slices of a matrix, and the last one is narrower."""
    kernels, device = backend("triton")
    from quant.kernels.columns import cuda

    monkeypatch.setattr(cuda, "MOST_COLUMNS", 10)
    monkeypatch.setattr(cuda, "PART_COLUMNS", 8)
    given = block(20, 20, 4, True, device)
    if loop == "gptq_":
        given = given._replace(matrix=(given.matrix / given.matrix.diagonal().clamp(min=1)[:, None]).triu(1) / 4)
        given.matrix.diagonal().fill_(1)
    if layers == 2:
        given = given._replace(matrix=torch.stack([given.matrix, given.matrix * 0.5]))
    answers = []
    for implementation in (TorchKernels(), kernels):
        own = given._replace(**{
            name: getattr(given, name).clone(memory_format=torch.contiguous_format) for name in ("residual", "incoming", "codes")
        })  # fmt: skip
        change = getattr(implementation, loop)(own)
        answers.append((own.codes, own.residual, *([] if change is None else [change]), own.incoming))
    for expected, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(answers[0][1], given.residual)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["numba", "triton"])
def test_a_known_inverse_and_a_part_of_a_matrix_change_nothing(name, layers):
    """Bit for bit: the part of a layer's matrix as it lies in the layer's, and its diagonal's inverse known of all columns."""
    kernels, device = backend(name)
    given, columns = block(20, 24, 2, True, device), slice(8, 20)
    if layers == 2:
        given = given._replace(matrix=torch.stack([given.matrix, given.matrix * 3]))
    answers = []
    for known in (False, True):
        whole = given._replace(residual=given.residual.clone(), codes=given.codes.clone())
        part = (whole._replace(inverse=blocks.inverse_diagonal(whole.matrix)) if known else whole).part(columns)
        if not known:
            part = part._replace(matrix=part.matrix.contiguous())
        answers.append((kernels.coordinate_descent_(part), whole.residual, whole.codes))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


STACKS = [("numba", (35, 33)), ("numba", (130, 40)), ("triton", (19, 16))]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("name", "shape"), STACKS, ids=str)
def test_a_stack_of_layers_is_each_of_them(shape, groups, name):
    """Bit for bit, also where tiles of rows do not fit the rows of a layer; both loops, and what propagates changes."""
    kernels, device = backend(name)
    given = [block(*shape, groups, dead, device) for dead in (False, True)]
    given[1] = given[1]._replace(matrix=given[1].matrix * 3)
    for loop in ("coordinate_descent_", "gptq_"):
        blocks_ = given
        if loop == "gptq_":
            uppers = [upper_factor(one.matrix, 1.0)[0] for one in given]
            blocks_ = [
                one._replace(matrix=upper / upper.diagonal(), incoming=one.target + one.residual)
                for one, upper in zip(given, uppers, strict=True)
            ]
        of_rows = ("target", "residual", "incoming", "scale", "zero", "codes")
        whole = blocks_[0]._replace(
            matrix=torch.stack([one.matrix for one in blocks_]),
            **{field: torch.cat([getattr(one, field) for one in blocks_]) for field in of_rows},
        )
        changes = getattr(kernels, loop)(whole)
        alone = [
            one._replace(**{f: getattr(one, f).clone() for f in ("residual", "incoming", "codes")}) for one in blocks_
        ]
        expected = [getattr(kernels, loop)(one) for one in alone]
        if changes is not None:
            assert torch.equal(changes, torch.cat(expected))
        for field in ("residual", "incoming", "codes"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(one, field) for one in alone])), field
    for share in (1.0, 0.05):  # dense, and mostly zeros
        change = torch.randn(2 * shape[0], shape[1], device=device) * (
            torch.rand(2 * shape[0], shape[1], device=device) < share
        )
        total = torch.zeros(2 * shape[0], shape[1], device=device)
        matrices = torch.stack([one.matrix for one in given])
        kernels.propagate_(total, change, matrices)
        right = torch.cat([c @ m for c, m in zip(change.double().chunk(2), matrices.double(), strict=True)])
        torch.testing.assert_close(total.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("outlier_above", [None, 0.05])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_gptq(shape, groups, outlier_above, name):
    kernels, device = backend(name)
    given = block(*shape, groups, device=device)
    upper, ok = upper_factor(given.matrix, 1.0)
    assert ok
    given = given._replace(matrix=upper / upper.diagonal())
    limit = None if outlier_above is None else torch.full((shape[1],), outlier_above, device=device)
    answers = []
    for implementation in (TorchKernels(), kernels):
        work, codes = given.target + given.residual, torch.zeros(shape, dtype=torch.uint8, device=device)
        errors = torch.full(shape, torch.nan, device=device)
        implementation.gptq_(given._replace(residual=errors, incoming=work, codes=codes, outlier_above=limit))
        answers.append((work, codes, errors))
    assert torch.equal(answers[0][1], answers[1][1])
    for ours, reference in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)  # measured 7e-7 (absolute)
    if limit is not None:
        work, codes, errors = answers[1]
        off = work - values_of(given, codes)
        kept = errors == given.target - work
        assert torch.equal(kept | (off == 0), (off.square() > outlier_above) | (off == 0))


@pytest.mark.parametrize("name", ["numba", "triton"])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_propagation_of_few_and_of_many_changes(share, name):
    kernels, device = backend(name)
    generator = torch.Generator().manual_seed(1)
    change, gram = torch.randn(50, 16, generator=generator), torch.randn(16, 90, generator=generator)
    change *= torch.rand(50, 16, generator=generator) < share
    start = torch.randn(50, 90, generator=generator)
    own = start.clone().to(device)
    kernels.propagate_(own, change.to(device), gram.to(device))
    expected = (start.double() + change.double() @ gram.double()).float()
    torch.testing.assert_close(own.cpu(), expected, rtol=1e-5, atol=1e-5)  # measured 2e-6 (absolute)


def test_huge_values_saturate_alike():
    for name in ("numba", "triton"):
        kernels, device = backend(name)
        weight = torch.tensor([[1e9], [-1e9], [1.5e-3]], device=device)
        codes = torch.zeros(3, 1, dtype=torch.uint8, device=device)
        scale, zero = torch.full_like(weight, 1e-3), torch.full_like(weight, 4.0)
        zeros, one = torch.zeros_like(weight), torch.ones(1, 1, device=device)
        group = torch.zeros(1, dtype=torch.int64, device=device)
        kernels.coordinate_descent_(
            ColumnBlock(weight, zeros.clone(), zeros, one, scale, zero, group, NumberFormat(8), codes)
        )
        assert codes.flatten().tolist() == [7, 0, 6]


def test_the_check_of_triton_runs_both_kernels_and_finds_one_that_is_wrong(monkeypatch):
    kernels, device = backend("triton")
    monkeypatch.setattr(sys.modules[type(kernels).__module__], "TRIAL_COLUMNS", 32)  # the interpreter is slow
    assert kernels.check(torch.device(device)) is kernels
    for name in ("coordinate_descent_", "gptq_"):
        with monkeypatch.context() as patch:
            right = getattr(kernels, name)

            def wrong(block, right=right):
                answer = right(block)
                block.codes[:, -8:] = 0
                return answer

            patch.setattr(kernels, name, wrong)
            with pytest.raises(RuntimeError, match="disagrees with torch"):
                kernels.check(torch.device(device))


def test_a_triton_that_does_not_work_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(blocks, "_chosen", {})
    if CUDA:
        pytest.skip("Triton works here")
    with caplog.at_level(logging.WARNING):
        chosen = [blocks.kernels(torch.device("cuda")) for _ in range(2)]
    assert [c.name for c in chosen] == ["torch", "torch"]
    assert len(caplog.records) == 1 and "using torch" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, ValueError, KeyError, None], ids=str)
def test_why_triton_is_not_used_is_said(error, monkeypatch):
    missing = error is None
    if not missing:
        cuda = pytest.importorskip("quant.kernels.columns.cuda")

        def failing(self, device):
            raise error("the kernel does not compile: no ptxas")

        monkeypatch.setattr(cuda.TritonKernels, "check", failing)
    else:
        monkeypatch.setitem(sys.modules, "quant.kernels.columns.cuda", None)
    monkeypatch.setattr(blocks, "_chosen", {})
    said = blocks.describe(torch.device("cuda"))
    assert said.startswith("torch: Triton kernels are not usable")
    assert ("ModuleNotFoundError" in said) if missing else ("no ptxas" in said)
    assert blocks.describe(torch.device("cpu")) == "numba"


def test_compiled_loops_leave_torch_its_threads():
    """In a process of its own: numba starts its threads once."""
    script = """
import torch
torch.set_num_threads(1)
from quant.solvers.quantease import quantease
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
stats = GramStats(8)
stats.update(torch.randn(32, 8))
quantease(torch.randn(70, 8), stats, QuantSpec(3), num_iter=3)
from quant.kernels.matmul.pack import pack_weight
import numba
pack_weight(quantease(torch.randn(70, 8), stats, QuantSpec(3), num_iter=3)).matmul(torch.randn(1, 8))
print(torch.get_num_threads(), numba.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["1", "1"]
