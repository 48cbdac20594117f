"""Learned rotations in a run: they help where they were not trained, are kept, read again, and told where they are damaged."""

import pytest
import torch

from data.demo import text as stories
from quant.blocks.fake_quant import ActSpec
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.config import Rotation
from quant.run import rotating as stage
from quant.run.directory import ROTATION, RunDirectory
from quant.run.loop import read_block
from quant.run.packed_model import open_quantized
from quant.run.rotating import read_matrices
from quant.run.session import open_session
from quant.tune.config import batch_of, split
from quant.tune.objectives import divergence
from tests.helpers import CPU, DEMO, config_for, in_float32, learned_config, perform, replace, whole_model_logits

STEPS = 12


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def turned(text, tmp_path, steps=STEPS, **options):
    """A small run of the demo model, rotated, with everything in 4 bits."""
    small = {"nsamples": 16, "wbits": 4, "solver": "rtn", "options": {}, "limit": 8, "act": ActSpec(4, 4),
             "rotation": Rotation(steps=steps)}  # fmt: skip
    return config_for(options.pop("model", DEMO / "llama"), text, tmp_path, **(small | options))


@pytest.fixture(scope="module")
def whole(demo_text, tmp_path_factory):
    """A run of `turned` and its results."""
    config = turned(demo_text, tmp_path_factory.mktemp("whole"))
    return config, perform(config)


def test_it_helps_on_windows_that_it_did_not_see(whole, demo_text, tmp_path):
    config, results = whole
    before = perform(turned(demo_text, tmp_path, steps=0))
    learned = results["rotation"].pop("learned")
    assert learned["held_out_end"] == min(learned["losses"]) < learned["held_out_start"] == learned["losses"][0]
    assert results["rotation"] == before["rotation"]
    assert results["codes_sha256"] != before["codes_sha256"]
    kept = read_matrices(config.output.run_dir / ROTATION)
    assert len(kept.matrices) > 1 and "residual" in kept.matrices
    for matrix in kept.matrices.values():
        eye = torch.eye(matrix.shape[-1], dtype=torch.float64).expand(matrix.shape)
        torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-12)


def test_the_held_out_loss_is_that_of_the_rotated_model(demo_text, tmp_path, monkeypatch):
    """What is trained is what is run: the divergence of the rotated checkpoint, rounded to nearest by the solver. Its embedding
    and head are rotated there and the stream in training, so that single codes of activations may differ."""
    seen, usual = {}, stage.model_objective

    def watched(chain, full, outside):
        seen["full"] = full
        return usual(chain, full, outside)

    monkeypatch.setattr(stage, "model_objective", watched)
    config = turned(demo_text, tmp_path, wbits=3, act=ActSpec(3, 3), model=in_float32("llama", tmp_path / "llama"))
    session = open_session(config)
    session.quantize(config.run, config.output)
    target, model, full = RunDirectory(config.output.run_dir), session.model, seen["full"]
    weights = BlockWeights()
    for i in range(len(model.blocks)):
        weights |= read_block(model, target, i, BlockWeights.read(model, i, CPU)).within(i)
    losses = []
    with torch.no_grad():
        for batch in split(len(full.rows), batch_of(16))[1]:
            ids = session.calibration(config.run).ids[full.rows[batch]]
            q = torch.log_softmax(whole_model_logits(model, weights, ids, config.run.act), -1).flatten(0, 1)
            p = torch.log_softmax(full.logits(full.rows[batch], session.original.outside_weights(CPU)), -1).flatten(
                0, 1
            )
            losses.append(float(divergence(q, p)))
    record = session.rotation.record
    assert sum(losses) / len(losses) == pytest.approx(record["held_out_end"], rel=0.03)  # of a fall of more than 0.1
    assert record["held_out_end"] < 0.9 * record["held_out_start"]


def test_they_are_learned_once_and_alike(whole, demo_text, tmp_path, monkeypatch):
    """The cache has them for the next run; without it the same bits are learned again; other data are others."""
    config, results = whole
    again = replace(config, run_dir=tmp_path / "again", cache_dir=tmp_path / "cache")
    one, two = open_session(again), open_session(config)
    for name, matrix in one.rotation.matrices.items():
        assert torch.equal(matrix, two.rotation.matrices[name])
    monkeypatch.setattr(stage, "_train", None)  # which nobody calls any more
    assert perform(replace(again, solver="gptq", options={}))["perplexity"]
    other = open_session(again)
    with pytest.raises(TypeError):
        open_session(replace(again, nsamples=17))
    with pytest.raises(InputError, match="was opened for other runs"):
        other.recipe(replace(again, nsamples=17).run)


def test_a_run_is_read_with_its_own_matrices(whole, tmp_path):
    config, results = whole
    path = config.output.run_dir
    quantized = open_quantized(str(path), tmp_path / "cache")
    ours, theirs = (
        open_session(config).model.block_weights(1, torch.device("cpu")),
        quantized.model.block_weights(1, torch.device("cpu")),
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    kept = (path / ROTATION).read_bytes()
    try:
        (path / ROTATION).write_bytes(kept[:200])
        with pytest.raises(InputError, match=r"rotation\.safetensors is damaged .* learned again"):
            open_quantized(str(path), tmp_path / "cache")
        (path / ROTATION).unlink()
        with pytest.raises(InputError, match=r"rotation\.safetensors is missing: without it nobody knows the model"):
            open_quantized(str(path), tmp_path / "cache")
        rotation = open_session(config).rotation
        wrong = {name: -matrix for name, matrix in rotation.matrices.items()}
        stage.write_matrices(path / ROTATION, stage.LearnedRotation(wrong, {}))
        with pytest.raises(InputError, match="holds other rotations than this machine learns"):
            perform(config)
    finally:
        (path / ROTATION).write_bytes(kept)


def test_a_saved_model_is_the_run(demo_text, tmp_path):
    """Folded rotations alone: a plain checkpoint has the run's perplexity."""
    config = turned(
        demo_text, tmp_path, rotation=Rotation(("residual", "vo"), steps=4), act=ActSpec(), save=tmp_path / "saved"
    )
    results = perform(config)
    plain = config_for(
        tmp_path / "saved", demo_text, tmp_path, wbits=16, limit=8, options={}, run_dir=tmp_path / "eval"
    )
    assert perform(plain)["perplexity"]["stories"]["fp"] == pytest.approx(
        results["perplexity"]["stories"]["quantized"], rel=1e-5
    )


def test_what_is_learned_composes_with_learned_rotations(model_dir, demo_text, tmp_path):
    config = learned_config(
        model_dir("llama"), demo_text, tmp_path, nsamples=16, rotation=Rotation(("residual", "vo"), steps=3)
    )
    results = perform(config)
    assert results["rotation"]["learned"]["steps"] == 3 and len(results["learning"]) == 3
