"""The corrected target in a run: what is summed, where the residual stream is, resuming, and that it helps."""

import pytest
import torch
from torch.func import functional_call

from data.demo import text as stories
from models.load import load_model
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.names import CORRECTING
from quant.run.directory import RunDirectory
from quant.run.observe import observe, original_beside
from quant.run.session import open_session
from quant.run.statistics import Original
from quant.solvers import declaration_of, solvers
from tests.conftest import CONFIGS
from tests.helpers import CPU, DEMO, config_for, perform

BEHIND = ("gemma2", "gemma3_text", "olmo2", "glm4", "granite")  # a norm or a factor comes between
ADDING = [name for name, (kind, _) in CONFIGS.items() if kind not in BEHIND]


def stream_of(path, tokens=48):
    model = load_model(str(path), dtype=torch.float32, cache_dir=path)
    ids = torch.randint(0, 200, (5, tokens), generator=torch.Generator().manual_seed(1))
    return BlockStream(model, ids, device=CPU, batch=2).capture(model.outside_weights(CPU))


@pytest.mark.parametrize("name", ADDING)
def test_linears_add_to_what_the_family_says(name, model_dir):
    """R + what the linear writes is what comes next: the next place's input, or behind a norm, or the block's output."""
    stream = stream_of(model_dir(name))
    model, block = stream.model, stream.model.blocks[1]
    weights = BlockWeights.read(model, 1, CPU)
    places = model.family.residual_at(model.config)
    assert set(places) <= set(model.linear_shapes()) and len(places) == 2
    seen, handles = {}, []

    def keep(key, pick):
        return lambda module, given, *output: seen.__setitem__(key, pick(given, output).clone())  # some add in place

    for linear, place in places.items():
        into = block.get_submodule(place)
        handles.append(into.register_forward_pre_hook(keep(place, lambda given, _: given[0])))
        handles.append(block.get_submodule(linear).register_forward_hook(keep(linear, lambda _, output: output[0])))
    entering = []
    for module in block.modules():
        handles.append(module.register_forward_pre_hook(lambda _, given: entering.extend(given[:1])))
    with torch.no_grad():
        args, kwargs = stream.arguments[0][1]
        output = functional_call(block, weights.parameters, (stream.hidden[stream.rows[0]], *args), kwargs)
    for handle in handles:
        handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    stages = [t for t in [*entering, output] if isinstance(t, torch.Tensor)]
    (first, second), (attention, mlp) = (tuple(names) for names in (places.values(), places))
    if torch.equal(seen[first], seen[second]):  # side by side
        totals = [seen[first] + seen[attention] + seen[mlp]]
    else:
        totals = [seen[place] + seen[linear].view_as(seen[place]) for linear, place in places.items()]
    for total in totals:
        assert any(
            t.numel() == total.numel() and torch.allclose(t.reshape(total.shape), total, atol=1e-5) for t in stages
        )


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_sums_are_those_of_both_models_at_the_same_tokens(name, model_dir):
    stream = stream_of(model_dir(name))
    model = stream.model
    full = original_beside(stream)
    before = BlockWeights.read(model, 0, CPU)
    moved = before.with_parameters({k: t * 1.1 for k, t in before.parameters.items() if t.dim() == 2})
    stream.run(0, moved, advance=True)
    full.run(0, before, advance=True)
    weights = BlockWeights.read(model, 1, CPU)
    places = model.family.residual_at(model.config)
    original = Original(full, weights, places)
    coarse = weights.with_parameters({k: t * 0.9 for k, t in weights.parameters.items() if t.dim() == 2})
    stats = observe(stream, 1, coarse, model.groups, original=original)

    def inputs(which, block):
        seen = {}
        names = [*(group[0] for group in model.groups), *places.values()]
        which.run(1, block, observe={n: (lambda x, n=n: seen.setdefault(n, []).append(x)) for n in names})
        return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]).double() for n, parts in seen.items()}

    theirs, ours = inputs(full, weights), inputs(stream, coarse)
    for group in model.groups:
        known, linear = stats[group[0]].calibration, group[0]
        assert known.n_tokens == 5 * 48
        torch.testing.assert_close(known.gram.double(), ours[linear].T @ ours[linear], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(known.cross.double(), theirs[linear].T @ ours[linear], rtol=1e-4, atol=1e-3)
        if linear in places:
            lacking = theirs[places[linear]] - ours[places[linear]]
            torch.testing.assert_close(known.residual.double(), lacking.T @ ours[linear], rtol=1e-4, atol=1e-3)
        else:
            assert known.residual is None


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def demo(demo_text, tmp_path, **options):
    small = {"nsamples": 24, "wbits": 2, "solver": "quantease", "options": {"num_iter": 8}, "limit": 16,
             "true_sequential": True, "range": "mse"}  # fmt: skip
    return config_for(DEMO / "llama", demo_text, tmp_path, **(small | options))


@pytest.mark.long
def test_the_correction_brings_the_model_nearer_to_the_original(demo_text, tmp_path):
    plain = demo(demo_text, tmp_path, run_dir=tmp_path / "plain")
    session = open_session(plain)
    runs = {
        "plain": plain,
        "corrected": plain.but(target_correction=1.0, run_dir=tmp_path / "corrected"),
        "residual": plain.but(target_correction=1.0, residual_correction=True, run_dir=tmp_path / "residual"),
        "gptq": plain.but(solver="gptq", options={}, run_dir=tmp_path / "gptq"),
        "qronos": plain.but(solver="qronos", options={}, run_dir=tmp_path / "qronos"),
        "gptaq": plain.but(solver="gptaq", options={}, run_dir=tmp_path / "gptaq"),
    }
    results = session.run_all([(request.run, request.output) for request in runs.values()])
    by_name = dict(zip(runs, results, strict=True))
    kl = {name: result["fidelity"]["stories"]["kl_divergence"] for name, result in by_name.items()}
    assert kl["residual"] < kl["corrected"] < kl["plain"], kl
    assert max(kl["qronos"], kl["gptaq"]) < kl["gptq"], kl
    records = [record for block in RunDirectory(tmp_path / "residual").finished_blocks() for record in block.records]
    assert all(record.relative_error_heldout < 1 for record in records)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(demo_text, tmp_path):
    whole = demo(demo_text, tmp_path, target_correction=1.0, residual_correction=True)
    perform(whole)
    again = whole.but(run_dir=tmp_path / "again")

    class StopError(Exception):
        pass

    def stop(stage, done, total, note):
        if (stage, done) == ("quantize", 2):
            raise StopError

    with pytest.raises(StopError):
        perform(again, stop)
    perform(again)
    codes = [[b.codes_sha256 for b in RunDirectory(tmp_path / place).finished_blocks()] for place in ("run", "again")]
    assert codes[0] == codes[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"target_correction": 1.0, "solver": "gptaq", "options": {}}, "gptaq corrects its target itself"),
        ({"target_correction": 1.0, "residual_correction": True}, "a norm stands between"),
    ],
)
def test_what_cannot_be_corrected_is_refused_before_work(more, says, model_dir, text, tmp_path):
    model = model_dir("gemma2") if "residual_correction" in more else model_dir("llama")
    with pytest.raises(InputError, match=says):
        perform(config_for(model, text, tmp_path, **more))
    assert not (tmp_path / "run").exists()


def test_the_names_of_correcting_methods_are_those_that_declare_it():
    assert {name for name in solvers() if declaration_of(name).uses_cross} == set(CORRECTING)
