"""Every Triton kernel compiled for real GPUs, on a machine that has none: registers, stack, shared memory and instructions of each.

    python -m benchmarks.compiled_kernels [--targets 80 90] [--quick] [--max-stack 1536] [--out benchmarks/results/kernels.md]

The launchers themselves run, on CPU tensors, under a driver that only names a target, so that every kernel is specialized as on
such a GPU (dtypes, alignment, arguments that are 1); nothing is launched. What a kernel takes is read from its binary by NVIDIA's
cuobjdump, which Triton carries. Exit code 1 where something does not compile, takes more shared memory than 99 KB (what the
smaller of today's GPUs give a program), or a larger stack than --max-stack bytes (registers that were spilled). loops: instructions of
a thread in each innermost loop, from the binary's disassembly. per code: of one-token products, those instructions over the codes that a
thread takes in an iteration, added up over the fields of a code. No speed is measured here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.measuring import about, flags, report, version_line
from quant.core import env
from quant.core.levels import TABLES
from quant.core.rounding import NumberFormat
from quant.core.types import QuantSpec
from quant.kernels.columns import ColumnBlock
from quant.kernels.columns.cuda import TritonKernels
from quant.kernels.matmul.cuda import Fields
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.matmul.weight import WORD, PackedWeight
from quant.solvers.rtn import rtn

MOST_SHARED, MOST_STACK, THREADS = 99 << 10, 1536, 32
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
Case = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. stack, shared: in bytes; loops: instructions of innermost loops; per_code: of a one-token
    product, else 0; error: why it does not compile."""

    name: str
    case: str
    target: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    loops: tuple[int, ...] = ()
    per_code: float = 0.0
    error: str = ""

    def fault(self, most_stack: int) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.shared > MOST_SHARED:
            return f"{self.shared} bytes of shared memory, {MOST_SHARED} are there"
        return f"a stack of {self.stack} bytes, at most {most_stack} are asked for" if self.stack > most_stack else ""


class Target:
    """A driver that knows which GPU is meant, and has none."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_current_target(self) -> GPUTarget:
        """Compute capability without its point, and threads of a warp."""
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        """Compiled kernels are kept by device: each target is one."""
        return self.number

    def get_current_stream(self, device: int) -> int:
        """None is used."""
        return 0


class Compiler:
    """Takes the place of a launch: keeps what was compiled, of each kernel once."""

    def __init__(self, number: int) -> None:
        self.number, self.case, self.compiled = number, "", list[Compiled]()
        self._known: set[str] = set()
        self._run = JITFunction.run

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        name = function.fn.__name__
        try:
            kernel = self._run(function, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # noqa: BLE001  (whatever a compiler raises is what is looked for)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.compiled.append(Compiled(name, self.case, self.number, error=first))
            return None
        if kernel.hash not in self._known:
            self._known.add(kernel.hash)
            binary = kernel.asm["cubin"]
            registers, stack = usage(binary)
            loops = innermost(said_by(binary, "-sass"))
            self.compiled.append(Compiled(name, self.case, self.number, registers, stack, kernel.metadata.shared,
                                          loops, per_code(name, loops, options)))  # fmt: skip
        return kernel


def said_by(binary: bytes, what: str) -> str:
    """What cuobjdump says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=False)
    return done.stdout or done.stderr


def usage(binary: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack. Raises RuntimeError where cuobjdump does not say them."""
    text = said_by(binary, "-res-usage")
    said = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not said:
        raise RuntimeError(f"cuobjdump says nothing of a kernel: {text}")
    return max(int(registers) for registers, _ in said), max(int(stack) for _, stack in said)


def innermost(disassembly: str) -> tuple[int, ...]:
    """Instructions of every loop that has no loop within, in their order: what lies between a branch back and where it goes.

    A branch to itself fills up the end of a kernel.
    """
    lines = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", disassembly, re.MULTILINE)]
    branches = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/.*\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", disassembly, re.MULTILINE)
    back = sorted((int(to, 16), int(place, 16)) for place, to in branches if int(to, 16) < int(place, 16))
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    return tuple(sum(a <= place <= b for place in lines) for a, b in inner)


def per_code(name: str, loops: tuple[int, ...], options: dict[str, Any]) -> float:
    """Instructions of a thread for a code of a one-token product; 0 for other kernels, and where loops are not one a field."""
    widths = [options[width] for width in ("w0", "w1", "w2") if options.get(width)]
    if name != "_one_token" or len(loops) != len(widths):
        return 0.0
    taken = [options["rows"] * options["words"] * (WORD // width) / THREADS for width in widths]
    return sum(count / codes for count, codes in zip(loops, taken, strict=True))


def compile_all(target: int, quick: bool) -> list[Compiled]:
    """Every case for one target."""
    compiler = Compiler(target)
    before = JITFunction.run
    driver.set_active(Target(target))
    JITFunction.run = lambda function, *args, **options: compiler(function, *args, **options)
    try:
        for name, work in (*column_cases(quick), *product_cases(quick)):
            compiler.case = name
            work()
    finally:
        JITFunction.run = before
    return compiler.compiled


def column_cases(quick: bool) -> Iterator[Case]:
    """The solvers' loops over a block of columns."""
    kernels = TritonKernels()
    for columns in (128,) if quick else (32, 100, 128, 256):
        for groups in (1, 4):
            block = column_block(32, columns, groups)
            outliers = block._replace(outlier_above=torch.ones(columns))
            free = block._replace(free=torch.zeros(32, columns, dtype=torch.bool))
            where = f"{columns} columns, {groups} groups"
            yield f"{where}, relaxed", lambda b=block: kernels.coordinate_descent_(b._replace(rounding=False))
            yield f"{where}, rounding", lambda b=block: kernels.coordinate_descent_(b)
            yield f"{where}, free entries", lambda b=free: kernels.coordinate_descent_(b)
            yield where, lambda b=block: kernels.gptq_(b)
            yield f"{where}, outliers", lambda b=outliers: kernels.gptq_(b)
            for kind in ("nvfp4", "fp8"):
                leveled = block._replace(numbers=NumberFormat(len(TABLES[kind]), TABLES[kind]))
                yield f"{where}, levels of {kind}", lambda b=leveled: kernels.coordinate_descent_(b)
                yield f"{where}, levels of {kind}", lambda b=leveled: kernels.gptq_(b)


def column_block(rows: int, columns: int, groups: int) -> ColumnBlock:
    """A block whose numbers do not matter."""
    wide = torch.zeros(rows, columns)
    grid = torch.ones(rows, groups)
    group = torch.arange(columns) * groups // columns
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return ColumnBlock(
        wide, wide.clone(), wide.clone(), torch.eye(columns), grid, grid.clone(), group, NumberFormat(8), codes
    )


def product_cases(quick: bool) -> Iterator[Case]:
    """Products with packed weights."""
    widths = (3, 4) if quick else range(1, 9)
    for bits in widths:
        for group in (128,) if quick else (-1, 32, 128):
            weight = packed(bits, group)
            for dtype in (torch.float16, torch.float32) if quick else (torch.float16, torch.bfloat16, torch.float32):
                for tokens in (1, 16, 64):
                    x = torch.zeros(tokens, 256, dtype=dtype)
                    name = f"{bits} bits, groups of {group}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
                    yield name, lambda x=x, weight=weight: Fields().matmul(x, weight)
    few, narrow = torch.zeros(3, 256, dtype=torch.float16), packed(3, 8)
    yield "3 bits, groups of 8, 3 tokens, float16", lambda: Fields().matmul(few, narrow)


def packed(bits: int, group: int) -> PackedWeight:
    """A small weight in the layout of GPUs."""
    weight = torch.linspace(-1, 1, 64 * 256).view(64, 256)
    own = pack_weight(rtn(weight, None, QuantSpec(bits, group)))  # in that of a CPU
    codes = own.layout.unpack(own.stored, own.bits)
    return replace(own, layout=Fields(), stored=Fields().pack(codes, own.bits))


def main() -> None:
    """Compile, show, judge."""
    parser = flags(__doc__)
    parser.add_argument(
        "--targets", nargs="+", type=int, default=[80, 90], help="compute capabilities without the point"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and widths")
    parser.add_argument("--max-stack", type=int, default=MOST_STACK, help=f"bytes (default: {MOST_STACK})")
    args = parser.parse_args()
    everything = [one for target in args.targets for one in compile_all(target, args.quick)]
    software = version_line({"triton": triton.__version__, "torch": env.versions()["torch"]})
    head = ["# Triton kernels, compiled", "", about(__doc__), "", f"{software}.", ""]
    report(head, ({
        "kernel": one.name, "case": one.case, "target": f"sm_{one.target}", "registers": str(one.registers),
        "stack": str(one.stack), "shared": str(one.shared), "loops": ", ".join(map(str, one.loops)),
        "per code": f"{one.per_code:.1f}" if one.per_code else "",
    } for one in everything), args.out)  # fmt: skip
    faults = [
        f"{one.name}, {one.case}, sm_{one.target}: {said}" for one in everything if (said := one.fault(args.max_stack))
    ]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
