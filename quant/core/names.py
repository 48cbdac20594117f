"""Names and numbers that command lines offer, told before what they are of is imported."""

import os
from pathlib import Path
from typing import NamedTuple

DEQUANTIZED = "dequantized"
FORMATS = (DEQUANTIZED, "gptq", "gptq_v2", "compressed-tensors", "bitplane", "gguf", "mlx")
GGUF, MLX = FORMATS[-2:]  # of one file; of names and groups of their own
RUNTIMES = ("transformers", "gptqmodel", "vllm", "llama.cpp", "auto-gptq", "mlx-lm", "this toolkit")
FULL_BITS = 16  # of weights and activations that are not quantized
AUTO_GROUPS = 0  # a group size that the shapes of the model decide
DEFAULT_CACHE = Path(os.path.expanduser("~/.cache/llm-quantizer"))  # noqa: PTH111 (~ stays where nobody has a home)
GRIDS = ("integer", "real", "fractional")  # kinds of grids: of what a code of 0 stands for
SUPER_COLUMNS = 256  # of a super-block of GGUF


class SuperKind(NamedTuple):
    """bits of a code; part: columns with integers of their own, of which ``most`` is the largest; minima: whether there are
    any; size: bytes of a super-block."""

    bits: int
    part: int
    most: int
    minima: bool
    size: int


SUPER_GRIDS = {  # kinds of grids that are a type of GGUF's blocks, scales and all (quant/core/superblocks.py)
    "q2_k": SuperKind(2, 16, 15, True, 84),
    "q3_k": SuperKind(3, 16, 31, False, 110),
    "q4_k": SuperKind(4, 32, 63, True, 144),
    "q5_k": SuperKind(5, 32, 63, True, 176),
    "q6_k": SuperKind(6, 16, 127, False, 210),
}
NARROW_COLUMNS = 32  # of a block of the types below


class NarrowKind(NamedTuple):
    """The grid of a type of GGUF's blocks of 32 columns: bits of a code, whether it is symmetric, its kind."""

    bits: int
    symmetric: bool
    kind: str


NARROW_GRIDS = {  # what llama.cpp's quantizer gives linears whose rows are no whole super-blocks (iq4_nl, q5_0, q5_1, q8_0)
    "q2_k": NarrowKind(4, False, "iq4_nl"),
    "q3_k": NarrowKind(4, False, "iq4_nl"),
    "q4_k": NarrowKind(5, True, "integer"),
    "q5_k": NarrowKind(5, False, "real"),
    "q6_k": NarrowKind(8, True, "integer"),
}


class LevelKind(NamedTuple):
    """bits of a code; groups: numbers of columns that may share a scale (-1: all of a row), the usual one first; scale: what
    a scale is stored as; rows: how many rows share a scale of a group that is no whole row."""

    bits: int
    groups: tuple[int, ...]
    scale: str
    rows: int = 1


SCALE_BITS = {"e4m3": 8, "e8m0": 8, "half": 16, "float": 32}
LEVEL_GRIDS = {  # kinds of grids whose levels are not evenly spaced (quant/core/levels.py)
    "nvfp4": LevelKind(4, (16,), "e4m3"),
    "mxfp4": LevelKind(4, (32,), "e8m0"),
    "fp8": LevelKind(8, (-1, 128), "float", 128),
    "iq4_nl": LevelKind(4, (32,), "half"),
}
UNPACKED = ("fp8",)  # of these, what no packed product is of: its levels are too many even steps
ALL_GRIDS = (*GRIDS, *SUPER_GRIDS, *LEVEL_GRIDS)
ACT_GRIDS = ("nvfp4", "mxfp4", "fp8")  # of these, what inputs of linears may be rounded to
TUNING_SCOPES = ("block", "window", "model")  # what is tuned together after solving
AUTO_SCOPE = "auto"  # the one of them that the memory decides
ROTATIONS = ("residual", "vo", "qk", "down")  # what is rotated before anything is solved
ONLINE_ROTATIONS = ("qk", "down")  # of these, what no weight can hold
BLOCK_STAGES = ("forward", "gram", "learn", "solve", "measure")  # what seconds of a block are told of
STAGES = ("load", *BLOCK_STAGES, "evaluate", "tasks", "export")  # and of a run
LAST_LOSSES = ("mse", "kl", "lm")  # what the last block is tuned for
OPTIMIZERS = ("adam", "sign")  # of tuning
STATES = ("full", "half")  # what the moments of tuning are kept in: float32, or bfloat16
AUTOROUND = "autoround"
TUNED_METHODS = {AUTOROUND: "rtn"}  # methods that are a solver and how its answers are tuned
CORRECTING = ("gptaq", "qronos")  # methods that correct their target themselves
DTYPES = ("float32", "bfloat16", "float16")
LABELS = ("sampled", "data")  # what the model should have said, for gradients of its loss
SAMPLED_LABELS = LABELS[0]
