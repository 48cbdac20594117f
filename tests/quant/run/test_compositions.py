"""Pairs of what can be asked for together: they work, or are refused in one line before any work.

Every pair that is not refused is in one of few runs that ask for much at once (`tests.quant.run.combined`): what is saved and what is
packed answers like the run, and a run that was interrupted ends with the same bits.
"""

from itertools import combinations

import pytest

import main
import model_quantizer
from quant.run.session import open_session
from tests import conftest
from tests.helpers import called, long, perform
from tests.quant.run.combined import APART, PARTS, REFUSED, fit, pairs, runs, words

QUANTIZER = ("--dataset", "--wbits", 4, "--quantization-method", "rtn", "--no-report")
LEARNER = ("--calib_dataset", "--wbits", 4, "--epochs", 1, "--let", "--let-seams", "mul", "--no-report")
TURNED = {"column scales": (model_quantizer, QUANTIZER, "--column-scales"), "learned scales": (main, LEARNER, "--let")}


@pytest.mark.parametrize("case", TURNED)
def test_no_scales_go_into_columns_that_a_rotation_turns(case, small, text, tmp_path, monkeypatch, capsys):
    module, (dataset, *words), flag = TURNED[case]
    extra = ("--column-scales",) if flag == "--column-scales" else ()
    code, _, error = called(module, monkeypatch, capsys, *small, dataset, text, *words, *extra, "--rotate", "all")
    assert code == 2 and error.count("\n") == 1, error
    assert f"{flag} scales the columns of mlp.down_proj, whose inputs --rotate down turns" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, text):
    """Flags of a run of a model of two blocks that has some biases, heads that share keys, and RMSNorm."""
    path = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.CONFIGS, "tiny", ("qwen2", conftest.GQA | {"num_hidden_layers": 2}))
        conftest.build("tiny").save_pretrained(path / "model")
    conftest.save_tokenizer(path / "model")
    return ["--model", path / "model", "--eval-datasets", text, "--seqlen", 16, "--nsamples", 8, "--limit", 4,
            "--cache-dir", path / "cache"]  # fmt: skip


def flags_of(parts, text):
    given = words(parts)
    return given if "--dataset" in given else [*given, "--dataset", text]


def perplexity(request, **changes):
    (entry,) = perform(request.but(**changes))["perplexity"].values()
    return entry


@pytest.mark.parametrize("parts", [*runs()[::2], *long(*runs()[1::2])], ids=", ".join)
def test_parts_work_together(parts, tiny, text, tmp_path):
    request = model_quantizer.request_from([str(word) for word in (*tiny, *flags_of(parts, text))])
    request = request.but(run_dir=tmp_path / "run", save=tmp_path / "saved", format="bitplane")
    session = open_session(request)
    results = session.run(request.run, request.output)
    (entry,) = results["perplexity"].values()
    assert perplexity(request, save=None, packed=True)["quantized"] == pytest.approx(entry["quantized"], rel=1e-4)
    stored = model_quantizer.request_from([str(word) for word in ("--model", tmp_path / "saved", *tiny[2:])])
    stored = stored.but(nsamples=128, run_dir=tmp_path / "stored")
    assert perplexity(stored)["fp"] == pytest.approx(entry["quantized"], rel=1e-6)
    packed = perplexity(stored, packed=True, run_dir=tmp_path / "stored packed")
    assert packed["fp"] == pytest.approx(entry["quantized"], rel=1e-4)

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "quantize" and done == 1:
            raise KeyboardInterrupt

    other = request.but(save=None, run_dir=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        session.run(other.run, other.output, stop)
    assert session.run(other.run, other.output)["codes_sha256"] == results["codes_sha256"]


def test_every_pair_is_in_a_run_or_refused_or_of_alternatives():
    asked = [set(run) for run in runs()]
    for pair in combinations(PARTS, 2):
        held = any(run.issuperset(pair) for run in asked)
        alternatives = words(pair) is None
        assert held + (pair in REFUSED) + alternatives == 1, pair
    assert len(pairs()) > 150 and len(asked) < 20 and all(map(fit, asked))


@pytest.mark.parametrize("parts", [*REFUSED, *(tuple(sorted(parts)) for parts in APART)], ids=" and ".join)
def test_what_does_not_compose_is_refused_in_one_line(parts, tiny, text, tmp_path, monkeypatch, capsys):
    flags = [
        *tiny,
        *flags_of([part for part in PARTS if part in parts], text),
        "--run-dir",
        tmp_path / "run",
        "--no-report",
    ]
    code, _, error = called(model_quantizer, monkeypatch, capsys, *flags)
    assert code == 2 and error.count("\n") == 1, error
    for named in REFUSED.get(parts, ("--saliency", "--act-order")):
        assert named in error
    assert not (tmp_path / "run").exists()
