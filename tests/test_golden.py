"""Golden values: the demo models give what tests/golden.json says; `python -m scripts.golden` writes it.

GOLDEN=all replays every case instead of a part. In another environment than the one golden.json is from, hashes of
codes are left out and numbers have a tolerance (`scripts.golden` says which).
"""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import pytest
import torch

from scripts import golden

METHODS = (*golden.EVERYWHERE, "quantease, outliers", "gptq_quantease")
DRAW = random.Random(0)
PART = {
    *(f"{golden.FAMILIES[0]}: {method}" for method in METHODS),
    *(f"{family}: {DRAW.choice(golden.EVERYWHERE)}" for family in golden.FAMILIES[1:]),
}


@pytest.fixture(scope="module")
def replayed() -> dict[str, golden.Record]:
    """What the cases give now, by name."""
    chosen = golden.CASES if os.environ.get("GOLDEN") == "all" else PART
    return golden.replay(case for name, case in golden.CASES.items() if name in chosen)


def test_runs_give_what_they_gave(replayed):
    where, kept = golden.golden()
    kept = {name: record for name, record in kept.items() if name in replayed}
    moved = golden.differences(kept, replayed, where == golden.environment())
    assert not moved, "\n".join(["moved; if that is meant: python -m scripts.golden", *moved])


def test_the_file_has_the_cases_of_the_script_and_no_others():
    assert golden.golden()[1].keys() == golden.CASES.keys()


@pytest.mark.parametrize(
    ("name", "more", "moved"),
    [
        (
            "llama: quantease",
            "--num-iter 29",
            {"codes_sha256", "numbers.mean_relative_error", "checkpoints.gptq.content"},
        ),
        ("llama: omniquant", "--let_lr 0.006", {"codes_sha256", "checkpoints.bitplane.content"}),
        ("llama: gptq", "--percdamp 0.0101", {"codes_sha256", "checkpoints.gptq_v2.content"}),
    ],
)
def test_a_little_change_of_the_work_is_seen(replayed, name, more, moved):
    """Bits, and nothing that only a change of structure may move."""
    now = golden.replay([golden.CASES[name]], more)
    changed = entries_of(golden.differences({name: replayed[name]}, now, same_environment=True), name)
    assert moved <= changed
    assert not {entry for entry in changed if entry.startswith("keys") or entry.endswith(("layout", "config"))}


def test_a_large_change_is_seen_in_another_environment_too(replayed):
    name = "llama: rtn"
    now = golden.replay([golden.CASES[name]], "--wbits 3")
    moved = entries_of(golden.differences({name: replayed[name]}, now, same_environment=False), name)
    assert {"numbers.mean_relative_error", "numbers.bits_per_weight", "checkpoints.bitplane.layout"} <= moved
    assert not moved & {"codes_sha256", "checkpoints.bitplane.content"}, "not comparable"


# What a change of structure may break, as done to a record; and whether only the same environment can tell.
BREAKS: dict[str, Any] = {
    "codes": (lambda r: r.update(codes_sha256="0"), "codes_sha256", True),
    "a tensor": (lambda r: r["checkpoints"]["gptq"].update(content="0"), "checkpoints.gptq.content", True),
    "a number a little": (lambda r: scaled(r["numbers"], "perplexity", 1.0001), "numbers.perplexity", True),
    "a number": (lambda r: scaled(r["numbers"], "perplexity", 1.03), "numbers.perplexity", False),
    "an error a little": (
        lambda r: scaled(r["numbers"], "mean_relative_error", 0.97),
        "numbers.mean_relative_error",
        True,
    ),
    "an error": (lambda r: scaled(r["numbers"], "mean_relative_error", 0.94), "numbers.mean_relative_error", False),
    "a shape": (lambda r: r["checkpoints"]["gptq"].update(layout="0"), "checkpoints.gptq.layout", False),
    "a setting": (lambda r: r["checkpoints"]["gptq"].update(config="0"), "checkpoints.gptq.config", False),
    "a refusal": (lambda r: r["checkpoints"].update(gptq="refused"), "checkpoints.gptq", False),
    "no hash": (lambda r: r.pop("codes_sha256"), "codes_sha256", False),
    "a key less": (lambda r: r["keys"]["results.json"].remove("verdicts.ok"), "keys.results.json, verdicts.ok", False),
    "a key more": (lambda r: r["keys"]["journal.jsonl"].append("new"), "keys.journal.jsonl, new", False),
}


def scaled(numbers: dict[str, float], name: str, factor: float) -> None:
    numbers[name] *= factor


@pytest.mark.parametrize("what", BREAKS)
def test_whatever_moves_is_named(replayed, what):
    name = "llama: rtn"
    broken = {name: copy.deepcopy(replayed[name])}
    change, entry, bits = BREAKS[what]
    change(broken[name])
    for same_environment in (True, False):
        moved = entries_of(golden.differences({name: replayed[name]}, broken, same_environment), name)
        assert (entry in moved) == (same_environment or not bits)


def test_a_case_that_is_gone_is_named(replayed):
    some = {name: replayed[name] for name in ("llama: rtn", "llama: gptq")}
    fewer = {"llama: rtn": some["llama: rtn"]}
    assert "codes_sha256" in entries_of(golden.differences(some, fewer, same_environment=False), "llama: gptq")


def test_keys_survive_the_file(replayed):
    """Keys that all cases have are written once."""
    assert golden.unpacked(golden.packed(replayed)) == replayed


def test_the_hash_of_arithmetic_sees_another_path(monkeypatch):
    """As a BLAS of other instructions would: the last bit of one product."""
    before = golden.arithmetic()
    assert before == golden.arithmetic()
    monkeypatch.setattr(torch, "cholesky_inverse", lambda factor: torch.linalg.inv(factor @ factor.T))
    assert golden.arithmetic() != before


def entries_of(lines: list[str], name: str) -> set[str]:
    """The entries of a case that lines of `differences` name, without what became of them."""
    assert all(" -> " in line for line in lines)
    return {
        line.removeprefix(f"{name}.").rpartition(" -> ")[0].rpartition(": ")[0]
        for line in lines
        if line.startswith(f"{name}.")
    }
