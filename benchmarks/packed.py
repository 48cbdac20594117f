"""Products with packed weights against float ones, side by side in one run: one token (decoding) and small batches.

    python -m benchmarks.packed [--shapes 4096x4096 11008x4096] [--tokens 1 2 4 8 16] [--bits 2 3 4 8] [--groups -1 128] [--inputs 16 8]
        [--peers bfloat16 int8 int4] [--caches 128] [--budget 0.3] [--cpu-time] [--products-only] [--device cpu] [--out packed.md]

Every kernel cycles through copies of its weight that together exceed the caches, as the layers of a model do (--caches 0: one copy), the best of three rounds at least and of more within --budget seconds.
--cpu-time: seconds of this process alone, which other programs do not lengthen, for one thread. Which way packed products of several
tokens take is measured before them, where nothing forbids it (quant/kernels/matmul/choice.py). A8 rows
include the quantization of the inputs. GB/s: bytes of the weight over the seconds of one token; of copy: against what
copying a large buffer moves (reads and writes), measured in the same run; a product only reads. in cache: one token with
one copy of the weight again and again; where that is no faster, instructions are the limit, not memory. times: seconds
of the first row over those of this one, same tokens. int4 and int8: torch's own kernels for packed weights, where the device
has them (bfloat16 inputs, groups of 128; int8 a scale a row).
"""

from __future__ import annotations

import time
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
from quant.kernels.matmul.choice import is_fixed, up_to
from quant.kernels.matmul.cpu import BitPlanes
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.pack import layout_of, pack_weight

COPIED = 128 << 20  # bytes of the buffer that a copy is measured on
SHAPES = ("4096x4096", "11008x4096", "4096x11008")
BITS = (2, 3, 4, 8)
PEERS = ("bfloat16", "int8", "int4")


@dataclass(frozen=True)
class How:
    """What is measured on, with which clock; caches: bytes of weights that a row cycles through at least; budget: seconds of a
    number. peers: kernels of torch beside its plain product. bits, groups, acts: of the packed weights and their inputs."""

    device: torch.device
    caches: int
    budget: float
    clock: Callable[[], float]
    peers: Sequence[str]
    bits: Sequence[int]
    groups: Sequence[int]
    acts: Sequence[int]


@dataclass
class Row:
    """A kernel: what one call does with an input, for each copy of the weight, and the bytes of one copy."""

    name: str
    calls: Sequence[Callable[[Tensor], object]]
    nbytes: int
    dtype: torch.dtype = torch.float32


def seconds(row: Row, x: Tensor, how: How) -> float:
    """Of one call: the best round through all copies within the budget (on CUDA a sixth of it, of the device alone), three rounds
    at least; the first one compiles."""
    x = x.to(row.dtype)

    def round_through() -> None:
        for call in row.calls:
            call(x)

    budget = how.budget if how.device.type == "cpu" else how.budget / 6
    return kernel_seconds(round_through, how.device, budget, how.clock) / len(row.calls)


def copy_rate(how: How) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=how.device)
    target = torch.empty_like(source)
    row = Row("copy", [lambda _: target.copy_(source)], 2 * source.nbytes)
    return row.nbytes / seconds(row, torch.zeros(1), how)


def copies(weight: Tensor, how: How) -> list[Tensor]:
    """As many as exceed the caches."""
    return [weight.to(how.device, copy=True) for _ in range(max(1, -(-how.caches // weight.nbytes)))]


def dense(weight: Tensor, dtype: torch.dtype, how: How) -> Row:
    """torch's own product."""
    held = copies(weight.to(dtype), how)
    calls = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in held]
    return Row(f"torch {str(dtype).removeprefix('torch.')}", calls, held[0].nbytes, dtype)


def torch_int4(weight: Tensor, how: How) -> Row | None:
    """torch's 4-bit weight-only product, groups of 128."""
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    grid = torch.rand(weight.shape[1] // 128, weight.shape[0], 2, device=how.device).bfloat16()
    if how.device.type == "cpu":
        held = copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), how)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(how.device)
        held = copies(torch.ops.aten._convert_weight_to_int4pack(bytes_, 8), how)
        product = torch.ops.aten._weight_int4pack_mm
    calls = [lambda x, w=w: product(x, w, 128, grid) for w in held]
    return Row("torch int4, g128", calls, held[0].nbytes + grid.nbytes, torch.bfloat16)


def torch_int8(weight: Tensor, how: How) -> Row | None:
    """torch's 8-bit weight-only product, a scale a row; CPU only."""
    if how.device.type != "cpu":
        return None
    held = copies(torch.randint(-128, 128, weight.shape, dtype=torch.int8), how)
    scale = torch.rand(weight.shape[0]).bfloat16()
    calls = [lambda x, w=w: torch.ops.aten._weight_int8pack_mm(x, w, scale) for w in held]
    return Row("torch int8", calls, held[0].nbytes, torch.bfloat16)


def packed_row(weight: Tensor, bits: int, group: int, act: int, how: How) -> Row:
    """Ours; inputs are float, or quantized to ``act`` bits a token."""
    spec = QuantSpec(bits, group)
    grid = fit_grid(weight, spec)
    answer = QuantizedWeight(grid.quantize(weight), grid, spec)
    one = pack_weight(answer, how.device)
    n = max(1, -(-how.caches // one.nbytes()))
    held = [one, *(pack_weight(answer, how.device) for _ in range(n - 1))]
    calls = [packed_linear(w, spec=ActSpec(act)) for w in held]
    name = f"packed W{bits}A{act}" + (f", g{group}" if group > 0 else "")
    return Row(name, calls, one.nbytes(), torch.float32 if how.device.type == "cpu" else torch.float16)


def rows_of(weight: Tensor, how: How) -> list[Callable[[], Row | None]]:
    """The kernels, made when their turn comes: their copies take memory."""
    on_cpu = how.device.type == "cpu"
    first, second = (torch.float32, torch.bfloat16) if on_cpu else (torch.float16, torch.bfloat16)
    peers: dict[str, Callable[[], Row | None]] = {
        "bfloat16": lambda: dense(weight, second, how),
        "int8": lambda: torch_int8(weight, how),
        "int4": lambda: torch_int4(weight, how),
    }
    makers: list[Callable[[], Row | None]] = [lambda: dense(weight, first, how), *(peers[name] for name in how.peers)]
    kinds = [(bits, group, act) for group in how.groups for bits in how.bits for act in how.acts]
    kinds += [(4, -1, 4)] * (how.device.type == "cuda")  # ABQ-LLM publishes W4A4
    return makers + [partial(packed_row, weight, *kind, how) for kind in kinds]


def records_of(n_out: int, n_in: int, tokens: list[int], how: How, copy: float) -> Iterator[dict[str, str]]:
    """One shape."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0)) * 0.02
    inputs = {n: torch.randn(n, n_in, generator=torch.Generator().manual_seed(n)).to(how.device) for n in tokens}
    first: dict[int, float] = {}
    for make in rows_of(weight, how):
        row = make()
        if row is None:
            continue
        took = {n: seconds(row, x, how) for n, x in inputs.items()}
        first = first or took
        rate = row.nbytes / took[tokens[0]]
        cached = seconds(replace(row, calls=row.calls[:1]), inputs[tokens[0]], how)
        yield {
            "out x in: kernel": f"{n_out} x {n_in}: {row.name}", "MB": f"{row.nbytes / 1e6:.1f}", "GB/s": f"{rate / 1e9:.1f}",
            "of copy": f"{rate / copy:.0%}", "ms, in cache": f"{cached * 1e3:.3f}",
        } | {f"ms, {n} token{'s' * (n > 1)} (times)": f"{took[n] * 1e3:.3f} ({first[n] / took[n]:.1f})" for n in tokens}  # fmt: skip


def choices(how: How) -> str:
    """Up to how many tokens codes of each width are multiplied as they lie; empty where there is no choice."""
    layout = layout_of(how.device)
    if not isinstance(layout, BitPlanes | FieldTiles):
        return ""
    most = ", ".join(f"{up_to(layout, bits)} at {bits} bits" for bits in how.bits)
    return f" Codes are multiplied as they lie for up to so many tokens ({'constants' if is_fixed() else 'measured'}): {most}."


def packing(how: How) -> str:
    """Seconds of packing 4096 x 4096 codes at each width."""
    weight = torch.randn(4096, 4096)
    times = []
    for bits in how.bits:
        grid = fit_grid(weight, QuantSpec(bits, 128))
        answer = QuantizedWeight(grid.quantize(weight), grid, QuantSpec(bits, 128))
        took = best_seconds(
            partial(pack_weight, answer, how.device), how.device, warm_up=True, budget=0.3, clock=how.clock
        )
        times.append(f"{took * 1e3:.0f} ms at {bits} bits")
    return " Packing 4096 x 4096 codes in groups of 128: " + ", ".join(times) + "."


def main() -> None:
    """Measure, print and write."""
    parser = flags(__doc__, device="cpu")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), help="of packed weights")
    parser.add_argument("--groups", nargs="+", type=int, default=[-1, 128], help="columns of a scale; -1: all of a row")
    parser.add_argument("--inputs", nargs="+", type=int, default=[16, 8], help="bits of inputs; 16: as they are")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="kernels of torch to measure")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of a number at least")
    parser.add_argument("--products-only", action="store_true", help="without the seconds of packing")
    parser.add_argument("--caches", type=int, default=128, help="MiB of weights that a row cycles through at least")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process alone, for one thread")
    args = parser.parse_args()
    device = env.pick_device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    how = How(
        device, args.caches << 20, args.budget, clock, args.peers, args.bits, args.groups, args.inputs
    )  # fmt: skip
    copy = copy_rate(how)
    said = f"Copy: {copy / 1e9:.1f} GB/s.{'' if args.products_only else packing(how)}{choices(how)}"
    show(said)
    head = ["# Products with packed weights", "", f"{machine_line(env.describe(device), env.versions())}.", "",
            about(__doc__), "", said, ""]  # fmt: skip
    shapes = [map(int, shape.split("x")) for shape in args.shapes]
    report(head, (record for shape in shapes for record in records_of(*shape, args.tokens, how, copy)), args.out)


if __name__ == "__main__":
    main()
