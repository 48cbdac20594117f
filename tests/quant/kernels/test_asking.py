"""What is one operation of a recorded step asks a GPU nothing: a CUDA graph could not hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import packed_linear
from quant.core.recording import _decides_by_values
from quant.core.types import Outliers, QuantizedWeight, QuantSpec
from quant.kernels.matmul import weight as packed
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.matmul.rows import PackedEmbedding, PackedRows
from quant.kernels.matmul.weight import Expanded, side_by_side
from tests.helpers import CPU, random_weight

SPARSE = Outliers(torch.tensor([0, 1, 31, 32, 700, 45 * 32 - 1]), torch.linspace(-2, 2, 6).half())
COLUMNS = Outliers((torch.arange(45)[:, None] * 32 + torch.tensor([3, 30])).flatten(), torch.ones(90).half(), True)


class _Asking(TorchDispatchMode):
    """Refuses operations whose results have a shape or a kind by values, reads, and copies of Python's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        assert not _decides_by_values(func, args, kwargs or {}), func
        assert func is not torch.ops.aten.lift_fresh.default, "a constant from the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def asks_nothing() -> Iterator[None]:
    with _Asking():
        yield


def weights() -> dict[str, QuantizedWeight]:
    plain = random_weight(45, 32, QuantSpec(4, 16))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    sorted_apart = replace(plain.grid, g_idx=plain.grid.g_idx[order])
    return {"plain": plain, "real": random_weight(45, 32, QuantSpec(2, 8, kind="real")), "sparse": replace(plain, outliers=SPARSE),
            "columns": replace(plain, outliers=COLUMNS), "order": replace(plain, grid=sorted_apart)}  # fmt: skip


def of_one_token(product: Any, x: Tensor) -> None:
    """Twice: what is kept from the first time is there in a graph, too."""
    with torch.inference_mode():
        first = product(x)
        with asks_nothing():
            again = product(x)
    assert torch.equal(first, again)


@pytest.mark.parametrize("library", [True, False])
def test_products(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the kernels themselves; sparse ones by the library, and by torch where algorithms have to be deterministic."""
    monkeypatch.setattr(packed, "_by_library", lambda x: library)
    for weight in weights().values():
        of_one_token(packed_linear(pack_weight(weight, CPU, Expanded()), torch.ones(45)).product, torch.randn(1, 1, 32))
    joined = side_by_side([pack_weight(weights()["plain"], CPU, Expanded())] * 2)
    assert joined[0].beside is not None
    of_one_token(joined[0].beside._multiply, torch.randn(1, 1, 32))


@pytest.mark.parametrize(
    "spec",
    [ActSpec(8), ActSpec(4, symmetric=True), ActSpec(8, method="per_tensor"), ActSpec(8, method="static"),
     *(ActSpec.on(kind) for kind in ("fp8", "mxfp4", "nvfp4"))],
    ids=str,
)  # fmt: skip
def test_quantized_inputs(spec: ActSpec) -> None:
    span = torch.tensor([-1.0, 1.0]) if spec.method == "static" else None
    linear = packed_linear(pack_weight(weights()["plain"], CPU, Expanded()), None, spec, span)
    of_one_token(linear.product, torch.randn(1, 1, 32))


@pytest.mark.parametrize("name", ["plain", "real", "sparse", "columns"])
def test_embeddings(name: str) -> None:
    embedding = PackedEmbedding(nn.Embedding(45, 32, device="meta"), PackedRows.of(weights()[name], CPU), torch.float32)
    for token in (0, 21, 44):
        of_one_token(embedding.lookup, torch.tensor([[token]]))


def test_what_asks_is_seen() -> None:
    """Also below composite operators, and as constants."""
    for asking in (torch.unique, lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0])):
        with pytest.raises(AssertionError):
            of_one_token(asking, torch.ones(1, 2))
