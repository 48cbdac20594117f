"""Runs of several processes held against the same run of one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

import model_quantizer
from quant.blocks.fake_quant import ActSpec
from quant.cli.errors import BAD_INPUT, FAILED, exit_code_of
from quant.core import gram, ranks
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.run import experts, observe, outside
from quant.run.directory import RunDirectory
from quant.run.sharing import check_sharing
from tests.crew import Crew, together
from tests.helpers import asked, config_for, perform, replace, same_codes


class InFloat64(GramStats):
    """Sums over tokens kept in float64 until they are whole: float32 forgets in which order they were added."""

    def __init__(self, n_in, device="cpu"):
        super().__init__(n_in, device)
        self._sum, self.total = self._sum.double(), self.total.double()

    def update(self, x, full=None, lacking=None, weights=None):
        if lacking is not None and self.residual is None:
            self.residual = torch.zeros(lacking.shape[-1], x.shape[-1], dtype=torch.float64)
        super().update(x, full, lacking, weights)

    @classmethod
    def from_gram(cls, *given, **options):
        return GramStats.from_gram(*given, **options)

    def add_up(self, paired=False):
        super().add_up(paired)
        self._sum, self.total = self._sum.float(), self.total.float()
        for name in ("cross", "residual", "full_total"):
            sums = getattr(self, name)
            setattr(self, name, None if sums is None else sums.float())
        return self


def chunks_in_float64(rows, root):
    yield rows.double() if root is None else rows.double() * root.double()


def in_float64(requests):
    """Runs with such sums."""
    gram._chunks = chunks_in_float64
    for module in (observe, experts, outside):
        module.GramStats = InFloat64
    return [perform(request) for request in requests]


def answers(path: Path) -> dict:
    directory, blocks = RunDirectory(path), []
    while directory.block_file(len(blocks)).exists():
        blocks.append(directory.read_weights(len(blocks)))
    return {(i, name): answer for i, block in enumerate(blocks) for name, answer in block.items()}


def count_differences(first: Path, second: Path) -> tuple[int, int]:
    """Codes that differ, and all."""
    one, other = answers(first), answers(second)
    assert one.keys() == other.keys()
    return sum(int((one[k].codes != other[k].codes).sum()) for k in one), sum(a.codes.numel() for a in one.values())


RUNS = {
    "gptq": {"solver": "gptq", "group_size": 16, "options": {"act_order": True}},
    "quantease": {"true_sequential": True, "range": "mse"},
    "spqr": {"solver": "spqr", "group_size": 16, "options": {"outlier": 0.2}},
    "outliers": {"options": {"num_iter": 3, "outlier": 0.02}},
    "gptaq": {"solver": "gptaq", "options": {}},
    "biases": {"solver": "rtn", "options": {}, "bias_correction": True, "act": ActSpec(8, method="static")},
    "corrected": {"target_correction": 1.0, "residual_correction": True, "column_scales": True},
    "head": {"solver": "gptq", "options": {}, "head_bits": 4},
}


@pytest.fixture(scope="module")
def runs(model_dir, text, tmp_path_factory):
    """Directories and results of RUNS by one process and by three. 7 windows in batches of 2: three have 2, 2 and 3."""
    path = tmp_path_factory.mktemp("shared")
    requests = {}
    for name, options in RUNS.items():
        model = model_dir("opt" if name == "biases" else "llama")
        requests[name] = config_for(model, text, path, nsamples=7, calib_batch=2, limit=5, **options)
    by_size = {}
    for size in (1, 3):
        given = [replace(request, run_dir=path / f"{name}-{size}") for name, request in requests.items()]
        by_size[size] = [dict(zip(RUNS, own, strict=True)) for own in together(size, in_float64, given, directory=path)]
    return path, by_size


@pytest.mark.parametrize("name", RUNS)
def test_codes_are_those_of_one_process(name, runs):
    """In float64: every code and scale."""
    path, by_size = runs
    one = by_size[1][0][name]
    first, second = answers(path / f"{name}-1"), answers(path / f"{name}-3")
    assert first and first.keys() == second.keys() and all(same_codes(first[k], second[k]) for k in first)
    for own in (results[name] for results in by_size[3]):
        assert own["codes_sha256"] == one["codes_sha256"]
        for key in ("fp", "quantized"):
            assert own["perplexity"]["words"][key] == pytest.approx(one["perplexity"]["words"][key], rel=1e-6)
        assert own["mean_relative_error"] == pytest.approx(one["mean_relative_error"], rel=1e-5)
        assert own["mean_relative_error_heldout"] == pytest.approx(one["mean_relative_error_heldout"], rel=1e-5)
    journals = [(path / f"{name}-{size}" / "journal.jsonl").read_text().splitlines() for size in (1, 3)]
    for ours, theirs in zip(*([json.loads(line) for line in lines] for lines in journals), strict=True):
        assert ours["n_tokens"] == theirs["n_tokens"] and ours["name"] == theirs["name"]
