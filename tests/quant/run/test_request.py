"""What is told of a run: three parts in memory, one flat object in manifests, and what follows from each field."""

from dataclasses import fields, replace

import pytest

from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.names import AUTO_GROUPS
from quant.learn.config import Rotation
from quant.run.choice import with_groups
from quant.run.config import BY_WHAT_IT_NAMES, Output, RunConfig, SessionConfig
from quant.run.content import group_sizes, spec_of
from quant.run.request import Request
from quant.run.session import Session, open_session
from quant.run.stored import Allowed
from quant.tune.config import Tuning
from tests.helpers import DEMO, asked, config_for

OWN = Allowed(paths=True)
FLAT = {
    "model": "m", "dataset": "c4", "seed": 0, "nsamples": 128, "method": "gptq", "wbits": 3, "solver": None,
    "learning": None, "act": {"bits": 16, "kv_bits": 16, "method": "per_token", "symmetric": False},
}  # fmt: skip


def test_no_two_fields_have_one_name_and_no_part_has_too_many():
    names = [field.name for kind in (SessionConfig, RunConfig, Output) for field in fields(kind)]
    assert len(names) == len(set(names))
    assert [len(fields(kind)) <= most for kind, most in ((SessionConfig, 22), (RunConfig, 32), (Output, 10))] == [
        True
    ] * 3


def test_manifests_of_earlier_runs_are_still_read():
    """They kept no solver where the method was one, and the name of both where a learner had another."""
    stored = Request.from_json(FLAT, "m", OWN)
    assert (stored.run.solver, stored.run.learner, stored.run.method) == ("gptq", None, "gptq")
    learning = asked()
    both = Request.of("m", learning=learning, learner="omniquant", solver="gptq").to_json()
    assert (both["method"], both["solver"]) == ("omniquant+gptq", "gptq")
    assert not {"learner", "biases", "evaluates"} & both.keys(), "what follows is not kept"
    stored = Request.from_json(both, "m", OWN)
    assert (stored.run.learner, stored.run.solver, stored.run.learning) == ("omniquant", "gptq", learning)
    nearest = Request.from_json(both | {"method": "omniquant", "solver": "rtn"}, "m", OWN)
    assert (nearest.run.learner, nearest.run.method) == ("omniquant", "omniquant")


@pytest.mark.parametrize("change", [{"learner": "x"}, {"biases": True}, {"evaluates": True}, {"method": 3}, {"seed": "x"},
                                    {"seed": True}, {"act": {"bits": 4, "no": 1}}, {"act": {"kv_bits": [[16]]}},
                                    {"act": {"method": 0.5}}, {"learning": 3}, {"learning": {"transform": {"alpha": True}}},
                                    {"learning": {"transform": {"kinds": "vo"}}}, {"tuning": {"rate": "x"}}, {"method": None}])  # fmt: skip
def test_a_stored_request_of_another_form_is_one_line(change):
    with pytest.raises(InputError) as error:
        Request.from_json(FLAT | change, "the manifest", OWN)
    assert len(error.value.args) == 1


def test_what_a_run_asks_of_its_session_follows_from_the_run():
    base = Request.of("m")
    assert base.session.evaluates and not base.session.biases
    shifted = base.but(learner="omniquant", learning=asked(abits=4), act=ActSpec(4, 4))
    assert shifted.session.biases and not shifted.session.evaluates
    assert base.but(wbits=3, seed=5).session == base.but(wbits=2).session != base.session
    with pytest.raises(TypeError, match="no field of a request: colour"):
        base.but(colour=1)


def test_a_session_refuses_what_it_was_not_opened_for(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    base = config.but(wbits=16, act=ActSpec())
    with pytest.raises(InputError, match="was opened for other runs, not for quantease"):
        Session(base.session).run(config.run, config.output)
    shifted = config.but(learner="omniquant", learning=asked(abits=4), act=ActSpec(4, 4), solver="rtn", options={})
    with pytest.raises(InputError, match="was opened for other runs, not for omniquant"):
        Session(config.session).run(shifted.run, shifted.output)
    with pytest.raises(ValueError, match="not of one session"):
        open_session(config, config.but(limit=3))
    assert not (tmp_path / "run").exists()


OTHER = {"seed": 1, "nsamples": 3, "solver": "rtn", "options": {"num_iter": 5}, "wbits": 4, "group_size": 16, "symmetric": True,
         "range": "mse", "levels": 5, "learner": "abq", "act": ActSpec(8, 8), "true_sequential": True, "num_layers": 1,
         "solver_precision": "high", "tuning": Tuning(), "rotation": Rotation(), "column_scales": True, "bias_correction": True,
         "avg_bits": 2.5, "grid_kind": "real", "head_bits": 4, "embedding_bits": 4,
         "target_correction": 0.5, "residual_correction": True, "saliency": 2, "saliency_labels": "data"}  # fmt: skip


def test_every_field_of_a_run_decides_its_identity(model_dir, text, tmp_path):
    """A field that is new is part of it without a line anywhere else."""
    config = config_for(model_dir("llama"), text, tmp_path)
    session = open_session(config)
    (tmp_path / "other.txt").write_text(text.read_text()[100:])
    ranges = tmp_path / "ranges"
    ranges.write_text("x")
    others = OTHER | {
        "dataset": str(tmp_path / "other.txt"),
        "learning": asked(),
        "act_scales": ranges,
        "act_shifts": ranges,
    }
    untold = {field.name for field in fields(RunConfig)} - set(others)
    assert untold == {"resume"}, "needs a finished run: tests/quant/run/test_learned.py"
    plain = session.configuration(config.run)
    for name, value in others.items():
        assert session.configuration(replace(config.run, **{name: value})) != plain, name
    named = {field.name for field in fields(RunConfig) if field.metadata == BY_WHAT_IT_NAMES}
    assert not named & plain.keys() and "calib_batch" in plain and "attn_implementation" in plain


def test_sizes_of_groups_that_fit_every_linear():
    assert group_sizes([80, 200]) == [2, 4, 5, 8, 10, 20, 40]
    shapes = {"a": (8, 80), "b": (8, 200)}
    with pytest.raises(
        InputError, match="b: group_size=16 does not divide in_features=200; use one of 2, 4, 5, 8, 10, 20, 40"
    ):
        spec_of(RunConfig(wbits=4, group_size=16), shapes)
    assert spec_of(RunConfig(wbits=4, group_size=40), shapes).group_size == 40


def test_the_shapes_of_the_model_decide_groups_left_open(model_dir):
    sizes = [with_groups(Request.of(str(path), wbits=4, group_size=AUTO_GROUPS)).run.group_size
             for path in (DEMO / "llama", model_dir("llama"))]  # fmt: skip
    assert sizes[0] == 128 and all(128 % size == 0 for size in sizes) and sizes[1] == 32
    kept = Request.of("no such model", group_size=-1)
    assert with_groups(kept) is kept, "no model is looked at where the size is given"
