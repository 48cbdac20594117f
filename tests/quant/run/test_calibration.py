"""Whether calibration is enough, which windows are kept out of it, and what is measured on them."""

import json
import logging

import pytest
import torch

from models.load import load_model
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats
from quant.core.linalg import relative_error
from quant.core.types import QuantSpec
from quant.run.calibration import HELDOUT, heldout_windows, shortage, windows_apart
from quant.run.directory import RunDirectory
from quant.run.linear import LinearRecord, verdict
from quant.run.quantize import quantize_block
from quant.run.session import open_session
from quant.run.solving import Recipe
from quant.solvers import get_solver
from quant.solvers.rtn import rtn
from tests.helpers import CPU, SEQLEN, config_for, perform, replace

SHAPES = {"q": (64, 32), "down": (32, 100)}


def test_windows_that_overlap_are_seen():
    text = torch.arange(1000)
    window = lambda start: text[start : start + 64]  # noqa: E731
    others = torch.stack([window(100), window(500)])
    drawn = torch.stack([window(s) for s in (0, 37, 52, 100, 148, 150, 164, 463, 563, 564, 900)])
    # 52 and 148 have 16 tokens in common with the window at 100, 463 has 27 with that at 500
    assert windows_apart(drawn, others)[:, 0].tolist() == [0, 37, 150, 164, 563, 564, 900]


def test_what_is_enough_is_said(tmp_path):
    config = config_for(tmp_path, tmp_path, tmp_path, nsamples=3, solver="gptq", options={})
    assert shortage(config.run, SHAPES, 34) is None
    said = shortage(config.run, SHAPES, 33)
    assert "99 tokens (3 x 33) for 1 of 2 linears of a block, which have up to 100 inputs (down)" in said
    assert "--nsamples 4 gives" in said and "--nsamples 16 is where" in said
    for more in ({"solver": "rtn"}, {"learner": "omniquant", "solver": "rtn"}, {"wbits": 16}):
        assert shortage(replace(config.run, **more), SHAPES, 1) is None, "nothing is fitted to them"


def test_held_out_windows_are_of_the_text_and_apart(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    session = open_session(config)
    windows, calibration = heldout_windows(session, config.run), session.calibration(config.run).ids
    assert windows.shape == (HELDOUT, SEQLEN) and len(windows_apart(windows, calibration)) == HELDOUT
    assert torch.equal(windows, heldout_windows(session, config.run))
    assert not torch.equal(windows, heldout_windows(session, replace(config.run, seed=1)))


def test_errors_on_held_out_windows_are_those_on_their_inputs(model_dir, tmp_path):
    """Against Gram matrices of the same windows; and what is solved does not depend on them."""
    model = load_model(str(model_dir("llama")), dtype=torch.float32, cache_dir=tmp_path)
    outside = model.outside_weights(CPU)
    few, others = torch.randint(1, 200, (3, 16)), torch.randint(1, 200, (4, 16))
    recipe = Recipe("quantease", get_solver("quantease"), QuantSpec(3), {"num_iter": 3})

    def stream(ids):
        return BlockStream(model, ids, device=CPU, batch=2).capture(outside)

    alone, both, measured = stream(few), stream(few), stream(others)
    both.attach(stream(others))
    for index in (0, 1):
        weights = BlockWeights.read(model, index, CPU)
        blocks = [quantize_block(one, index, weights, recipe) for one in (alone, both)]
        stats = {g[0]: GramStats(weights.weight(g[0]).shape[1]) for g in model.groups}
        measured.run(index, weights, observe={name: one.update for name, one in stats.items()})
        grams = {name: stats[group[0]].gram for group in model.groups for name in group}
        for plain, record in zip(*(block.records for block in blocks), strict=True):
            weight, answer = weights.weight(record.name), blocks[1].solved[record.name]
            nearest = rtn(weight, None, QuantSpec(3)).dequantize()
            wanted = [relative_error(weight, value, grams[record.name]) for value in (answer.dequantize(), nearest)]
            assert [record.relative_error_heldout, record.relative_error_rtn_heldout] == pytest.approx(wanted, rel=1e-4)
            assert plain.relative_error_heldout is None and plain.relative_error == record.relative_error
            assert record.relative_error_heldout > record.relative_error
            assert torch.equal(blocks[0].solved[record.name].codes, answer.codes)
        for one in (alone, both, measured):
            one.run(index, blocks[1].weights, advance=True)
    assert torch.equal(both.heldout.hidden.data, measured.hidden.data), "they go where the others go"
    assert both.fork().heldout is None and both.in_batches_of(1, outside).heldout is None


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease"])
def test_too_few_tokens_are_said_once_and_looked_at(method, model_dir, text, tmp_path, caplog):
    config = config_for(model_dir("llama"), text, tmp_path, solver=method, options={}, nsamples=1, eval_datasets=())
    with caplog.at_level(logging.WARNING):
        results = perform(config)
    said = [r.getMessage() for r in caplog.records if "too little calibration" in r.getMessage()]
    records = RunDirectory(tmp_path / "run").read_summary(0).records
    short = [r for r in records if r.n_tokens < r.shape[1]]
    assert {r.name for r in short} == {"mlp.down_proj"} and short[0].n_tokens == SEQLEN
    if method == "rtn":
        assert not said and short[0].rank is None
        return
    assert len(said) == 1 and "--nsamples 2 gives" in said[0]
    assert all(r.rank == SEQLEN and r.verdict in ("look", "bad") for r in short)
    assert ("damping" in short[0].info) == (method == "quantease") and results["verdicts"]["look"] > 0


def test_a_text_without_room_is_said(model_dir, tmp_path, caplog):
    text = tmp_path / "short.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    config = config_for(model_dir("llama"), text, tmp_path, eval_datasets=())
    results = perform(config)
    assert "has no room for windows beside those of calibration" in caplog.text
    assert results["mean_relative_error_heldout"] is None
    assert all(r.relative_error_heldout is None for r in RunDirectory(tmp_path / "run").read_summary(0).records)


def test_a_line_of_the_journal_and_back(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path, eval_datasets=())
    perform(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert len(lines) == 21
    for line in lines:
        record = LinearRecord.from_json(line)
        assert record.to_json() == line and record.n_weights == line["shape"][0] * line["shape"][1]
        older = {k: v for k, v in line.items() if "heldout" not in k}
        assert LinearRecord.from_json(older).relative_error_heldout is None
    with pytest.raises(KeyError):
        LinearRecord.from_json({"block": 0})
    with pytest.raises(TypeError):
        LinearRecord.from_json(lines[0] | {"unknown": 1})


def test_verdicts():
    assert verdict(0.01, 0.02, 4.0) == "ok" and verdict(0.01, 0.02, 4.0, is_short=True) == "look"
    assert verdict(0.2, 0.3, 4.0) == "look" and verdict(0.03, 0.02, 4.0, is_short=True) == "bad"
    assert {verdict(e, 2.0, 4.0) for e in (1.0, float("nan"), float("inf"))} == {"bad"}
    assert verdict(0.01, 0.02, 16.0) == "bad"
