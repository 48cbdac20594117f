"""What can be asked for together: the parts of a run, their words, and few runs that hold every pair of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

PARTS: dict[str, dict[str, str | None]] = {
    "target": {"--target-correction": "0.5", "--true-sequential": None},
    "residual": {"--target-correction": "1", "--residual-correction": None, "--true-sequential": None},
    "real": {"--grid": "real"},
    "saliency": {"--saliency": "2"},
    "column scales": {"--column-scales": None},
    "bias": {"--bias-correction": None},
    "average": {"--avg-bits": "7"},
    "residual stream": {"--rotate": "residual"},
    "values": {"--rotate": "vo"},
    "keys": {"--rotate": "qk"},
    "down": {"--rotate": "down"},
    "block": {"--tune": "block"},
    "window": {"--tune": "window:2"},
    "model": {"--tune": "model"},
    "self": {"--dataset": "self:8"},
    "order": {"--act-order": None, "--quantization-method": "gptq"},
    "outliers": {"--outlier": "0.05", "--quantization-method": "quantease"},
    "spqr": {"--outlier": "0.2", "--quantization-method": "spqr"},
    "groups": {"--group-size": "16"},
    "sequential": {"--true-sequential": None},
    "autoround": {"--quantization-method": "autoround"},
}
REFUSED = {  # pairs, and what a message says of both
    ("real", "spqr"): ("--grid real", "spqr"),
    ("saliency", "spqr"): ("--saliency", "spqr"),
    ("column scales", "down"): ("--column-scales", "--rotate down"),
    **{(scope, "spqr"): ("--tune", "spqr") for scope in ("block", "window", "model")},
    **{(part, "autoround"): ("--target-correction", "autoround") for part in ("target", "residual")},
    ("real", "autoround"): ("--grid real", "autoround"),
}
APART = ({"saliency", "order", "groups"},)  # refused in three: groups are formed in an order of every part's own


def words(parts: Iterable[str]) -> list[str] | None:
    """The flags of parts together; None where two of them are alternatives."""
    flags: dict[str, str | None] = {}
    for part in parts:
        for flag, value in PARTS[part].items():
            if flag == "--rotate" and flag in flags:
                value = f"{flags[flag]},{value}"
            elif flags.get(flag, value) != value:
                return None
            flags[flag] = value
    if "--avg-bits" not in flags:
        flags["--wbits"] = "3"
    if "--tune" in flags or flags.get("--quantization-method") == "autoround":
        flags["--tune-iterations"] = "2"
    if flags.get("--quantization-method", "quantease") == "quantease":
        flags["--num-iter"] = "2"
    return [word for flag, value in flags.items() for word in (flag, value) if word is not None]


def fit(parts: Iterable[str]) -> bool:
    """Whether all of them can be one run."""
    chosen = set(parts)
    refused = any(chosen.issuperset(pair) for pair in (*REFUSED, *APART))
    return not refused and words([part for part in PARTS if part in chosen]) is not None


def pairs() -> list[tuple[str, str]]:
    """All that fit."""
    return [pair for pair in combinations(PARTS, 2) if fit(pair)]


def runs() -> list[tuple[str, ...]]:
    """Sets of parts that hold every pair, found greedily: each takes what adds most pairs that no other holds yet."""
    left, chosen = set(pairs()), []
    while left:
        one = set(min(left, key=lambda pair: (list(PARTS).index(pair[0]), list(PARTS).index(pair[1]))))
        while more := [part for part in PARTS if part not in one and fit({*one, part})]:
            gains = {part: sum({a, b} <= {*one, part} for a, b in left) for part in more}
            one.add(max(more, key=lambda part: gains[part]))
        chosen.append(tuple(part for part in PARTS if part in one))
        left = {pair for pair in left if not one.issuperset(pair)}
    return chosen
