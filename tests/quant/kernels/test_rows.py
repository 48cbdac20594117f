"""Embeddings with packed rows: the rows of the written-out matrix, for every kind of answer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quant.core.gram import GramStats
from quant.core.types import Outliers, QuantSpec
from quant.kernels.matmul.rows import PackedEmbedding, PackedRows
from quant.solvers.gptq import gptq
from quant.solvers.spqr import spqr
from tests.helpers import CPU, random_weight


def answer(kind):
    if kind in ("act-order", "two-level scales"):
        weight, inputs = torch.randn(45, 32), torch.randn(200, 32) * torch.linspace(0.1, 3, 32)
        stats = GramStats(32)
        stats.update(inputs)
        if kind == "act-order":
            return gptq(weight, stats, QuantSpec(3, 8), act_order=True)
        return spqr(weight, stats, QuantSpec(3, 16), outlier=0.2)
    specs = {"rows": QuantSpec(4), "symmetric": QuantSpec(5, 8, True), "real": QuantSpec(2, 8, kind="real"),
             "nvfp4": QuantSpec(4, 16, kind="nvfp4"), "fp8": QuantSpec(8, kind="fp8"), "iq4_nl": QuantSpec(4, 32, kind="iq4_nl")}  # fmt: skip
    plain = random_weight(45, 32, specs.get(kind, QuantSpec(int(kind[0]) if kind[0].isdigit() else 4, 16)))
    if kind == "outliers":
        places = torch.tensor([0, 1, 31, 32, 700, 45 * 32 - 1])
        return replace(plain, outliers=Outliers(places, torch.linspace(-2, 2, 6).half()))
    if kind == "columns":
        places = (torch.arange(45)[:, None] * 32 + torch.tensor([3, 30])).flatten()
        return replace(plain, outliers=Outliers(places, torch.randn(90).half(), whole_columns=True))
    return plain


KINDS = [
    *(f"{n} bits" for n in range(1, 9)),
    "rows",
    "symmetric",
    "real",
    "nvfp4",
    "fp8",
    "iq4_nl",
    "act-order",
    "two-level scales",
    "outliers",
    "columns",
]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_matrix(kind):
    weight = answer(kind)
    codes, grid = weight.codes.double(), weight.grid
    scale = grid.scale.double()[:, grid.g_idx]
    base = grid.zero if grid.minimum is None else grid.minimum
    base = base.double()[:, grid.g_idx]
    slow = (codes - base) * scale if grid.minimum is None else codes * scale + base
    if grid.table is not None:
        slow = torch.tensor(grid.table, dtype=torch.float64)[weight.codes.long()] * scale
    if weight.outliers is not None:
        slow.view(-1)[weight.outliers.index] += weight.outliers.value.double()
    packed = PackedRows.of(weight, CPU)
    for numbers in (
        torch.arange(45),
        torch.tensor([0, 7, 21, 44]),
        torch.tensor([44]),
        torch.tensor([], dtype=torch.long),
    ):
        rows = packed.rows(numbers)
        assert rows.shape == (len(numbers), 32)
        torch.testing.assert_close(rows.double(), slow[numbers], rtol=1e-6, atol=1e-6)


def test_memory_is_that_of_packed_codes():
    packed = PackedRows.of(random_weight(64, 32, QuantSpec(4, 16)), CPU)
    codes, scales, zeros, groups = 64 * 32 // 2, 64 * 2 * 2, 64 * 2, 32 * 8
    assert packed.nbytes() == codes + scales + zeros + groups


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.register_buffer("factor", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.factor


def test_an_embedding_of_packed_rows_does_what_its_class_does():
    weight = random_weight(45, 32, QuantSpec(4, 16))
    plain = Scaled(45, 32, padding_idx=44)
    with torch.no_grad():
        plain.weight.copy_(weight.dequantize())
    on_meta = Scaled(45, 32, padding_idx=44, device="meta")
    on_meta.factor = torch.tensor(3.0)
    packed = PackedEmbedding(on_meta, PackedRows.of(weight, CPU), torch.float32)
    ids = torch.tensor([[44, 0, 0, 7], [1, 44, 2, 7]])
    assert torch.equal(packed(ids), plain(ids))
    assert on_meta.padding_idx == 44 and not list(packed.parameters())


def test_an_outlier_that_is_no_number_stays_in_its_row():
    """One row takes as many places behind its own as the fullest has."""
    places = torch.tensor([0, 32, 33, 34])
    plain = random_weight(45, 32, QuantSpec(4, 16))
    given = replace(plain, outliers=Outliers(places, torch.tensor([1.0, float("inf"), 2.0, 3.0]).half()))
    packed = PackedRows.of(given, CPU)
    alone, together = packed.rows(torch.tensor([0])), packed.rows(torch.tensor([0, 1]))
    assert packed.most == 3 and torch.equal(alone[0], together[0]) and bool(alone.isfinite().all())
    assert torch.equal(packed.rows(torch.tensor([1]))[0], together[1]) and bool(together[1, 0].isinf())
