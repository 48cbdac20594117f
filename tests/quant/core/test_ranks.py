"""What processes of one job tell each other, held against the plain sum and the plain list."""

from __future__ import annotations

import pytest
import torch

from quant.core import ranks
from quant.core.gram import GramStats
from tests.crew import together


def shares(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(shape, generator=generator) * 10.0**k).to(dtype) for k in range(size)]


def summed(shape, dtype, transposed):
    tensor = shares(ranks.size(), shape, dtype)[ranks.rank()]
    tensor = tensor.T if transposed else tensor
    assert ranks.all_sum_(tensor) is tensor
    return tensor.double().tolist(), dict(ranks.sent())


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_added_in_float64_in_order_and_rounded_once(size, tmp_path):
    """Also where entries do not divide, and of a view that is not contiguous."""
    for shape, dtype, transposed in (
        ((5, 7), torch.float32, False),
        ((4, 3), torch.float64, True),
        ((1,), torch.float32, False),
    ):
        expected = torch.zeros(shape, dtype=torch.float64)
        for own in shares(size, shape, dtype):
            expected += own
        expected = expected.to(dtype).double()
        expected = expected.T if transposed else expected
        n = expected.numel()
        for values, sent in together(size, summed, shape, dtype, transposed, directory=tmp_path):
            assert values == expected.tolist()
            assert sent == {"sums": 2 * (size - 1) * -(-n // size) * dtype.itemsize}


def gathered():
    rank = ranks.rank()
    rows = torch.arange(3.0 * rank, dtype=torch.float64).view(rank, 3) + 100 * rank  # none of the first one
    told = ranks.all_told({"rank": rank, "not a number": float("nan")})
    first = ranks.from_first(lambda: [rank, "only here"])
    bits = ranks.all_bytes(bytes(range(rank)), "codes")
    assert ranks.all_rows(torch.empty(0, dtype=torch.int64)).shape == (0,)  # of none at all
    return ranks.all_rows(rows).tolist(), [one["rank"] for one in told], first, [list(own) for own in bits]


def test_uneven_rows_words_and_bytes(tmp_path):
    rows = [[100.0, 101, 102], [200, 201, 202], [203, 204, 205]]
    for own in together(3, gathered, directory=tmp_path):
        assert own == [rows, [0, 1, 2], [0, "only here"], [[], [0], [0, 1]]]


def gram_of(x: torch.Tensor, paired: bool) -> GramStats:
    stats = GramStats(x.shape[1])
    if len(x):
        stats.update(x, x.flip(1) if paired else None, x[:, :2] if paired else None)
    return stats


def gram_of_share(ends):
    x = integers()[ends[ranks.rank()] : ends[ranks.rank() + 1]]
    stats = gram_of(x, paired=True)
    if stats.residual is None:
        stats.residual = torch.zeros(2, x.shape[1])
    stats.add_up(paired=True)
    parts = (stats.gram, stats.cross, stats.residual, stats.total, stats.full_total)
    return [part.tolist() for part in parts], stats.n_tokens, stats.rank


def integers() -> torch.Tensor:
    return torch.randint(-20, 21, (61, 700), generator=torch.Generator().manual_seed(0)).float()


def test_gram_matrices_of_uneven_shares_are_those_of_all_inputs(tmp_path):
    """Inputs are whole numbers, whose sums float32 holds exactly; more columns than a block has; a process without any."""
    whole = gram_of(integers(), paired=True)
    parts = [part.tolist() for part in (whole.gram, whole.cross, whole.residual, whole.total, whole.full_total)]
    exact = integers().double()
    assert torch.equal(whole.gram.double(), exact.T @ exact)
    for own in together(3, gram_of_share, [0, 17, 17, 61], directory=tmp_path):
        assert own == [parts, 61, whole.rank]


def test_one_process_sends_nothing():
    tensor = torch.ones(2)
    assert ranks.size() == 1 and ranks.all_sum_(tensor) is tensor and ranks.all_rows(tensor) is tensor
    assert ranks.all_told("a") == ["a"] and ranks.from_first(lambda: "b") == "b" and not ranks.sent()
