"""Products with packed weights against float ones, side by side in one run: one token (decoding) and small batches.

    python -m benchmarks.packed [--shapes 4096x4096 11008x4096] [--tokens 1 2 4 8 16] [--device cpu] [--out packed.md]

Every kernel cycles through copies of its weight that together exceed the caches, as the layers of a model do. A8 rows
include the quantization of the inputs. GB/s: bytes of the weight over the seconds of one token; of copy: against what
copying a large buffer moves (reads and writes), measured in the same run; a product only reads. in cache: one token with
one copy of the weight again and again; where that is no faster, instructions are the limit, not memory. times: seconds
of the first row over those of this one, same tokens. int4 and int8: torch's own kernels for packed weights, where the device
has them (bfloat16 inputs, groups of 128; int8 a scale a row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import about, best_seconds, flags, kernel_seconds, machine_line, report, show
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import packed_linear
from quant.core import env
from quant.core.grid import fit_grid
from quant.core.types import QuantizedWeight, QuantSpec
from quant.kernels.matmul.pack import pack_weight

CACHES = 128 << 20  # bytes of weights that a row cycles through at least
SHAPES = ("4096x4096", "11008x4096", "4096x11008")
BITS = (2, 3, 4, 8)


@dataclass
class Row:
    """A kernel: what one call does with an input, for each copy of the weight, and the bytes of one copy."""

    name: str
    calls: Sequence[Callable[[Tensor], object]]
    nbytes: int
    dtype: torch.dtype = torch.float32


def seconds(row: Row, x: Tensor, device: torch.device) -> float:
    """Of one call: the best round through all copies within 0.3 seconds (0.05 on CUDA, of the device alone), three rounds at
    least; the first one compiles."""
    x = x.to(row.dtype)

    def round_through() -> None:
        for call in row.calls:
            call(x)

    return kernel_seconds(round_through, device, budget=0.3 if device.type == "cpu" else 0.05) / len(row.calls)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(CACHES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    row = Row("copy", [lambda _: target.copy_(source)], 2 * source.nbytes)
    return row.nbytes / seconds(row, torch.zeros(1), device)


def copies(weight: Tensor, device: torch.device) -> list[Tensor]:
    """As many as exceed the caches."""
    return [weight.to(device, copy=True) for _ in range(max(1, -(-CACHES // weight.nbytes)))]


def dense(weight: Tensor, dtype: torch.dtype, device: torch.device) -> Row:
    """torch's own product."""
    held = copies(weight.to(dtype), device)
    calls = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in held]
    return Row(f"torch {str(dtype).removeprefix('torch.')}", calls, held[0].nbytes, dtype)


def torch_int4(weight: Tensor, device: torch.device) -> Row | None:
    """torch's 4-bit weight-only product, groups of 128."""
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    grid = torch.rand(weight.shape[1] // 128, weight.shape[0], 2, device=device).bfloat16()
    if device.type == "cpu":
        held = copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), device)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
        held = copies(torch.ops.aten._convert_weight_to_int4pack(bytes_, 8), device)
        product = torch.ops.aten._weight_int4pack_mm
    calls = [lambda x, w=w: product(x, w, 128, grid) for w in held]
    return Row("torch int4, g128", calls, held[0].nbytes + grid.nbytes, torch.bfloat16)


def torch_int8(weight: Tensor, device: torch.device) -> Row | None:
    """torch's 8-bit weight-only product, a scale a row; CPU only."""
    if device.type != "cpu":
        return None
    held = copies(torch.randint(-128, 128, weight.shape, dtype=torch.int8), device)
    scale = torch.rand(weight.shape[0]).bfloat16()
    calls = [lambda x, w=w: torch.ops.aten._weight_int8pack_mm(x, w, scale) for w in held]
    return Row("torch int8", calls, held[0].nbytes, torch.bfloat16)


def packed_row(weight: Tensor, bits: int, group: int, act: int, device: torch.device) -> Row:
    """Ours; inputs are float, or quantized to ``act`` bits a token."""
    spec = QuantSpec(bits, group)
    grid = fit_grid(weight, spec)
    answer = QuantizedWeight(grid.quantize(weight), grid, spec)
    one = pack_weight(answer, device)
    n = max(1, -(-CACHES // one.nbytes()))
    held = [one, *(pack_weight(answer, device) for _ in range(n - 1))]
    calls = [packed_linear(w, spec=ActSpec(act)) for w in held]
    name = f"packed W{bits}A{act}" + (f", g{group}" if group > 0 else "")
    return Row(name, calls, one.nbytes(), torch.float32 if device.type == "cpu" else torch.float16)


def rows_of(weight: Tensor, device: torch.device) -> list[Callable[[], Row | None]]:
    """The kernels, made when their turn comes: their copies take memory."""
    first, second = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.float16, torch.bfloat16)
    makers: list[Callable[[], Row | None]] = [
        lambda: dense(weight, first, device), lambda: dense(weight, second, device),
        lambda: torch_int8(weight, device), lambda: torch_int4(weight, device),
    ]  # fmt: skip
    kinds = [(bits, group, act) for group in (-1, 128) for bits in BITS for act in (16, 8)]
    kinds += [(4, -1, 4)] * (device.type == "cuda")  # ABQ-LLM publishes W4A4
    return makers + [partial(packed_row, weight, *kind, device) for kind in kinds]


def records_of(n_out: int, n_in: int, tokens: list[int], device: torch.device, copy: float) -> Iterator[dict[str, str]]:
    """One shape."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.02
    inputs = {n: torch.randn(n, n_in, generator=torch.Generator().manual_seed(n)).to(device) for n in tokens}
    first: dict[int, float] = {}
    for make in rows_of(weight, device):
        row = make()
        if row is None:
            continue
        took = {n: seconds(row, x, device) for n, x in inputs.items()}
        first = first or took
        rate = row.nbytes / took[tokens[0]]
        cached = seconds(replace(row, calls=row.calls[:1]), inputs[tokens[0]], device)
        yield {
            "out x in: kernel": f"{n_out} x {n_in}: {row.name}", "MB": f"{row.nbytes / 1e6:.1f}", "GB/s": f"{rate / 1e9:.1f}",
            "of copy": f"{rate / copy:.0%}", "ms, in cache": f"{cached * 1e3:.3f}",
        } | {f"ms, {n} token{'s' * (n > 1)} (times)": f"{took[n] * 1e3:.3f} ({first[n] / took[n]:.1f})" for n in tokens}  # fmt: skip


def packing(device: torch.device) -> str:
    """Seconds of packing 4096 x 4096 codes at each width."""
    weight = torch.randn(4096, 4096)
    times = []
    for bits in BITS:
        grid = fit_grid(weight, QuantSpec(bits, 128))
        answer = QuantizedWeight(grid.quantize(weight), grid, QuantSpec(bits, 128))
        took = best_seconds(partial(pack_weight, answer, device), device, warm_up=True, budget=0.3)
        times.append(f"{took * 1e3:.0f} ms at {bits} bits")
    return "Packing 4096 x 4096 codes in groups of 128: " + ", ".join(times) + "."


def main() -> None:
    """Measure, print and write."""
    parser = flags(__doc__, device="cpu")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    device = env.pick_device(args.device)
    copy = copy_rate(device)
    said = f"Copy: {copy / 1e9:.1f} GB/s. {packing(device)}"
    show(said)
    head = ["# Products with packed weights", "", f"{machine_line(env.describe(device), env.versions())}.", "",
            about(__doc__), "", said, ""]  # fmt: skip
    shapes = [map(int, shape.split("x")) for shape in args.shapes]
    report(head, (record for shape in shapes for record in records_of(*shape, args.tokens, device, copy)), args.out)


if __name__ == "__main__":
    main()
