"""The compiled block loops against the plain torch ones: same codes, same state, on awkward blocks too."""

import pytest
import torch

from quant.kernels.blocks import coordinate_descent_torch_, gptq_torch_
from quant.kernels.cpu import coordinate_descent_cpu_, gptq_cpu_
from tests.references import inputs, make_stats

SHAPES = [(1, 1), (1, 100), (7, 64), (33, 65), (128, 200)]  # columns x rows: tiles of 64 rows have ragged ends


def block(n_columns: int, n_rows: int, n_groups: int = 1, dead: bool = False):
    generator = torch.Generator().manual_seed(n_columns + n_rows)
    x = inputs(n_columns, 4 * n_columns + 8, seed=n_rows)
    if dead:
        x[:, 0] = 0
    gram = make_stats(x).gram
    weight, residual = (torch.randn(n_columns, n_rows, generator=generator) for _ in range(2))
    scale = torch.rand(n_groups, n_rows, generator=generator) + 0.1
    zero = torch.randint(0, 8, (n_groups, n_rows), generator=generator).float()
    group = torch.arange(n_columns) * n_groups // n_columns
    return gram, weight, 0.1 * residual, scale, zero, group


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coordinate_descent(shape, dead, groups, rounding):
    gram, weight, residual, scale, zero, group = block(*shape, groups, dead)
    answers = []
    for implementation in (coordinate_descent_torch_, coordinate_descent_cpu_):
        state, codes = residual.clone(), torch.zeros(shape, dtype=torch.uint8)
        implementation(state, gram @ residual, weight, gram, scale, zero, group, 7, codes if rounding else None)
        answers.append((state, codes))
    assert torch.equal(answers[0][1], answers[1][1])
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(answers[1][0], residual)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gptq(shape, groups):
    gram, weight, _, scale, zero, group = block(*shape, groups)
    gram.diagonal().add_(gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    upper = upper / upper.diagonal().mean()
    answers = []
    for implementation in (gptq_torch_, gptq_cpu_):
        work, codes, errors = weight.clone(), torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape)
        implementation(work, upper, scale, zero, group, 7, codes, errors)
        answers.append((work, codes, errors))
    assert torch.equal(answers[0][1], answers[1][1])
    for ours, reference in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
