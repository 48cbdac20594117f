"""What tuning fits where: bytes of --tune by the formulas of quant/tune/limits.py, for models of 1 to 70 billion weights.

    python -m benchmarks.tuning_memory [--seqlen 2048] [--batch 8] [--out FILE]

Sizes are those of published LLaMA models, the arithmetic is bfloat16, hidden states of the windows wait in host memory.
Nothing is run: the formulas are estimates, and what is free on a device is less than what it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.measuring import about, flags, report
from quant.tune.config import Tuning
from quant.tune.limits import SHARE, Sizes, memory

DEVICES = (24, 80, 141)  # GB
# hidden size, intermediate size, width of keys and values, blocks, vocabulary
MODELS = {
    "1B (LLaMA 3.2)": (2048, 8192, 512, 16, 128256),
    "3B (LLaMA 3.2)": (3072, 8192, 1024, 28, 128256),
    "8B (LLaMA 3.1)": (4096, 14336, 1024, 32, 128256),
    "13B (LLaMA 2)": (5120, 13824, 5120, 40, 32000),
    "32B (Qwen 2.5)": (5120, 27648, 1024, 64, 152064),
    "70B (LLaMA 3.1)": (8192, 28672, 1024, 80, 128256),
}
WAYS: dict[str, dict[str, Any]] = {
    "block": {"scope": "block"},
    "autoround": {"scope": "block", "form": "offset", "optimizer": "sign"},
    "window:2": {"scope": "window", "window": 2},
    "window:4, recomputed": {"scope": "window", "window": 4, "recompute": True},
    "window:4, recomputed, half": {"scope": "window", "window": 4, "recompute": True, "state": "half"},
    "model": {"scope": "model"},
    "model, recomputed": {"scope": "model", "recompute": True},
    "model, recomputed, half": {"scope": "model", "recompute": True, "state": "half"},
    "model, recomputed, sign": {"scope": "model", "recompute": True, "optimizer": "sign"},
}


def sizes_of(hidden: int, wide: int, narrow: int, blocks: int, vocabulary: int) -> Sizes:
    """Those of a LLaMA: four linears of attention, three of the MLP, two norms; embedding, head and last norm outside."""
    linears = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide
    return Sizes(
        linears, linears + 2 * hidden, blocks, blocks, (2 * vocabulary + 1) * hidden, hidden, vocabulary, hidden * wide
    )


def rows(tokens: int) -> Iterator[dict[str, str]]:
    """A row for a model and a way to tune: bytes, and the devices that have them to spare."""
    for name, shape in MODELS.items():
        for way, fields in WAYS.items():
            need = memory(sizes_of(*shape), Tuning(**fields), 2, tokens) / 1e9
            fits = {f"{device} GB": "yes" if need <= SHARE * device else "no" for device in DEVICES}
            yield {"model": name, "--tune": way, "GB": f"{need:.1f}", **fits}


def main() -> None:
    """Print the table."""
    parser = flags(__doc__)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    args = parser.parse_args()
    said = f"{args.batch} windows of {args.seqlen} tokens in a step; yes: at most {SHARE:.0%} of the device."
    report(["# What tuning fits where", "", about(__doc__), "", said, ""], rows(args.batch * args.seqlen), args.out)


if __name__ == "__main__":
    main()
