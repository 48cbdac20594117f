"""Text that the model writes itself: draws by their definition, the same text with and without a cache, and its use."""

from __future__ import annotations

import math

import pytest
import torch

from data.calibration import Author, calibration_tokens, first_tokens
from data.written import Written, text_of, windows_of, written
from models.load import load_model
from quant.core.errors import InputError
from quant.run import writing
from quant.run.session import open_session
from quant.run.stored import Allowed, allowed_entries
from quant.run.writing import Writer, draw, whole_weights
from tests.conftest import CONFIGS
from tests.helpers import CPU, config_for, perform

LENGTH = 10


def opened(path):
    return load_model(str(path), dtype=torch.float32, cache_dir=path)


def first(n=6):
    return torch.randint(4, 200, (n,), generator=torch.Generator().manual_seed(3))


def test_a_draw_is_where_the_cumulated_probabilities_pass_the_number():
    logits = torch.tensor([[0.0, math.log(2), -math.inf, math.log(5)]]).repeat(6, 1)
    chance = torch.tensor([0.0, 0.124, 0.126, 0.374, 0.376, 0.999999], dtype=torch.float64)
    assert draw(logits, 1.0, chance).tolist() == [0, 0, 1, 1, 3, 3]
    assert draw(logits[1:], 0.01, chance[1:]).tolist() == [3] * 5


def test_frequencies_of_draws_are_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    chance = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(p.log().expand(20000, 4), 1.0, chance).bincount(minlength=4) / 20000
    assert torch.allclose(counts, p, atol=0.012)  # three standard deviations of the first


@pytest.mark.parametrize("family", list(CONFIGS))
def test_block_by_block_the_same_text_is_written_as_with_a_cache(family, model_dir, monkeypatch):
    model = opened(model_dir(family))
    cached = Writer(model, CPU).write(first(), LENGTH, seed=0)
    monkeypatch.setattr(Writer, "fits", lambda self, windows, length: False)
    assert torch.equal(Writer(model, CPU).write(first(), LENGTH, seed=0), cached)
    assert torch.equal(cached[:, 0], first())
    assert len(cached.unique()) > 20


def test_every_token_is_drawn_from_what_transformers_says_comes_next(model_dir):
    from transformers import AutoModelForCausalLM

    path = model_dir("llama")
    ids = Writer(opened(path), CPU).write(first(), LENGTH, seed=5)
    chance = torch.rand(6, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        p = torch.softmax(theirs(ids).logits.double(), -1).cumsum(-1)
    for row in range(6):
        for place in range(1, LENGTH):
            token = int(ids[row, place])
            below = float(p[row, place - 1, token - 1]) if token else 0.0
            assert below - 1e-5 <= float(chance[row, place]) <= float(p[row, place - 1, token]) + 1e-5


def test_the_seed_decides_and_batches_do_not(model_dir, monkeypatch):
    model = opened(model_dir("opt"))
    text = Writer(model, CPU).write(first(), LENGTH, seed=0)
    assert not torch.equal(Writer(model, CPU).write(first(), LENGTH, seed=1), text)
    monkeypatch.setattr(writing, "BATCH", 4)
    assert torch.equal(Writer(model, CPU).write(first(), LENGTH, seed=0), text)


def test_a_model_that_does_not_fit_is_streamed(model_dir, monkeypatch):
    model = opened(model_dir("llama"))
    free = {"bytes": 10**9}
    monkeypatch.setattr(writing.env, "free_bytes", lambda device: free["bytes"])
    assert Writer(model, CPU).fits(64, 128)
    free["bytes"] = sum(t.nbytes for t in whole_weights(model, CPU).values())
    assert not Writer(model, CPU).fits(64, 128)


@pytest.mark.parametrize(
    ("source", "means"),
    [
        ("self", Written(None, None)),
        ("self:12", Written(None, 12)),
        ("notes.txt+self", Written("notes.txt", None)),
        ("a/b+c.jsonl+self:896", Written("a/b+c.jsonl", 896)),
        ("mix+self:3", Written("mix", 3)),
        ("self.txt", None),
        ("self+c4", None),
        ("selfish", None),
    ],
)
def test_names(source, means):
    assert written(source) == means
    assert text_of(source) == (source if means is None else means.beside)


def test_windows_are_counted():
    sources = ("c4", "self", "self:5", "c4+self", "c4+self:5")
    assert [windows_of(source, 128) for source in sources] == [128, 128, 5, 256, 133]


def test_no_windows_are_refused():
    with pytest.raises(InputError, match="0 windows"):
        written("self:0")


def test_what_a_model_writes_it_writes_once():
    for source in ("self+self", "demo+self:3+self:4"):
        with pytest.raises(InputError, match="the model writes once"):
            written(source)
    with pytest.raises(InputError, match="use at most 10000000 windows"):
        written("self:10000001")


class Words:
    """A tokenizer of six tokens, two of them special."""

    all_special_ids = (0, 5)

    def get_vocab(self):
        return {str(i): i for i in range(6)}


def test_first_tokens_are_of_the_text_beside_or_of_the_vocabulary():
    drawn = first_tokens(400, 0, Words(), None)
    assert sorted(drawn.unique().tolist()) == [1, 2, 3, 4]
    assert all(60 < count < 140 for count in drawn.bincount()[1:].tolist())
    assert set(first_tokens(50, 0, Words(), torch.tensor([[3, 3], [3, 4]])).tolist()) == {3, 4}
    empty = Words()
    empty.all_special_ids = range(6)
    with pytest.raises(InputError, match="no tokens to begin with"):
        first_tokens(1, 0, empty, None)


def test_text_of_its_own_without_a_model_is_refused(text):
    with pytest.raises(InputError, match="self: text of the model's own"):
        calibration_tokens("self", Words(), nsamples=2, seqlen=4, seed=0)


def test_the_cache_knows_the_author(tmp_path):
    calls = []

    def author(key, token):
        def write(first, length, seed):
            calls.append(key)
            return torch.full((len(first), length), token)

        return Author(write, [key])

    def ids(**more):
        given = {"nsamples": 2, "seqlen": 4, "seed": 0, "cache_dir": tmp_path, "author": author("a", 1)}
        return calibration_tokens("self", Words(), **(given | more)).ids

    assert ids().tolist() == [[1] * 4] * 2
    assert ids(author=author("a", 9)).tolist() == [[1] * 4] * 2
    assert calls == ["a"]
    assert ids(author=author("b", 2)).tolist() == [[2] * 4] * 2
    ids(seed=1), ids(seqlen=5), ids(nsamples=3)
    assert len(calls) == 5


def test_a_run_calibrates_on_a_text_and_what_the_model_wrote(model_dir, text, tmp_path):
    plain = config_for(model_dir("llama"), text, tmp_path, wbits=3, solver="rtn", options={})
    request = plain.but(dataset=f"{text}+self:5", run_dir=tmp_path / "self")
    session = open_session(request)
    tokens, beside = session.calibration(request.run), session.calibration(plain.run)
    assert tokens.ids.shape == (17, 32)
    assert torch.equal(tokens.ids[:12], beside.ids)
    chosen = first_tokens(5, 0, session.tokenizer, beside.ids)
    assert torch.equal(tokens.ids[12:], Writer(session.model, CPU).write(chosen, 32, seed=0))
    assert (tokens.name, tokens.protocol) == ("words+self:5", "local/wikitext2 + self")
    assert session.configuration(request.run)["calibration"] != session.configuration(plain.run)["calibration"]
    assert session.run(request.run, request.output)["perplexity"]["words"]["quantized"] > 0
    assert perform(plain.but(dataset="self:4", run_dir=tmp_path / "alone"))["perplexity"]["words"]["quantized"] > 0


@pytest.mark.parametrize("dataset", ["mine.txt+self:4", "mine.jsonl+self", "/etc/mine.txt+self"])
def test_a_stored_request_may_not_name_a_text_beside(dataset):
    with pytest.raises(InputError, match="give --allow-paths"):
        allowed_entries({"dataset": dataset}, "manifest.json", Allowed())
    for harmless in ("c4+self:4", "self", "self:7"):
        assert allowed_entries({"dataset": harmless}, "manifest.json", Allowed()) == {"dataset": harmless}


def test_the_text_beside_may_not_be_written_over(model_dir, text, tmp_path):
    mine = tmp_path / "mine" / "words.txt"
    mine.parent.mkdir()
    mine.write_text(text.read_text())
    request = config_for(model_dir("llama"), text, tmp_path, dataset=f"{mine}+self:5", save=mine.parent)
    with pytest.raises(InputError, match="words.txt"):
        open_session(request)
