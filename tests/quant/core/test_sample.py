"""Inputs that errors are measured on, against sums over tokens in float64."""

from __future__ import annotations

import pytest
import torch

from quant.core.gram import GramStats
from quant.core.linalg import NARROWEST, PARTS, objective, relative_error
from quant.core.sample import InputSample


def outputs64(weight, x):
    """W X at every token, float64."""
    return x.double().reshape(-1, x.shape[-1]) @ weight.double().T


def test_a_sample_has_every_first_token_and_the_weight_of_the_others():
    x = torch.randn(3, 41, 24)
    x[:, 0] *= 1000  # as attention sinks are
    sample, fifth, flat = InputSample(), InputSample(5), InputSample(5)
    for one in (sample, fifth):
        one.update(x[:2])
        one.update(x[2:])
    flat.update(x[:, 1:].reshape(-1, 24))
    assert torch.equal(sample.inputs, x.view(-1, 24)) and sample.full is None
    drawn = x[:, 3::5]
    assert drawn.shape[1] == 8
    root = (40 / 8) ** 0.5
    parts = [x[:2, 0], root * drawn[:2].reshape(-1, 24), x[2:, 0], root * drawn[2:].reshape(-1, 24)]
    assert torch.allclose(fifth.inputs, torch.cat(parts))
    assert torch.allclose(flat.inputs, root * x[:, 1:].reshape(-1, 24)[2::5])
    alike = torch.ones(2, 33, 4)
    alike[:, 0] = 7
    for every in (1, 2, 3, 16, 40):
        one = InputSample(every)
        one.update(alike)
        assert float(one.inputs.square().sum()) == pytest.approx(float(alike.square().sum()), rel=1e-5), every


def test_errors_are_those_of_outputs_at_inputs_and_in_their_gram_matrix():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(100, 24, generator=generator), torch.randn(10, 24, generator=generator)
    sample, stats = InputSample(), GramStats(24)
    for one in (sample, stats):
        one.update(x[:7])
        one.update(x[7:])
    answers = [weight + s * torch.randn(10, 24, generator=generator) for s in (0.1, 0.001)]
    norm = float(outputs64(weight, x).square().sum())
    expected = [float(outputs64(weight - answer, x).square().sum()) / norm for answer in answers]
    assert sample.norm(weight) == pytest.approx(norm, rel=1e-5)
    assert objective(weight, stats.gram) == pytest.approx(norm, rel=1e-5)
    assert list(map(sample.errors_of(weight), answers)) == pytest.approx(expected, rel=1e-5)
    assert [relative_error(weight, answer, stats.gram) for answer in answers] == pytest.approx(expected, rel=1e-5)
    vast = sample.errors_of(2.0**100 * weight)
    assert [vast(2.0**100 * answer) for answer in answers] == pytest.approx(expected, rel=1e-5)
    of_nothing = sample.errors_of(torch.zeros(10, 24))
    assert (of_nothing(torch.zeros(10, 24)), of_nothing(weight)) == (0.0, float("inf"))


def test_errors_against_outputs_of_the_original_model_do_not_cancel():
    generator = torch.Generator().manual_seed(3)
    full, weight = torch.randn(60, 24, generator=generator), torch.randn(10, 24, generator=generator)
    x = full + 1e-4 * torch.randn(full.shape, generator=generator)
    sample = InputSample()
    sample.update(x, full)
    answer = weight + 1e-4 * torch.randn(10, 24, generator=generator)
    lost = outputs64(weight, full) - outputs64(answer, x)
    norm = float(outputs64(weight, full).square().sum())
    assert sample.norm(weight) == pytest.approx(norm, rel=1e-5)
    assert sample.errors_of(weight)(answer) == pytest.approx(float(lost.square().sum()) / norm, rel=1e-3)
    vast = sample.errors_of(2.0**100 * weight)
    assert vast(2.0**100 * answer) == pytest.approx(float(lost.square().sum()) / norm, rel=1e-3)


@pytest.mark.parametrize("n_in", [1, NARROWEST, NARROWEST + 1, PARTS * NARROWEST, PARTS * NARROWEST + 77])
@pytest.mark.parametrize("n_out", [1, 700])  # more rows than a strip has
def test_the_objective_is_the_trace_whatever_blocks_it_is_summed_by(n_in, n_out):
    generator = torch.Generator().manual_seed(n_in)
    x, error = torch.randn(3 * n_in, n_in, generator=generator), torch.randn(n_out, n_in, generator=generator)
    gram = x.T @ x
    expected = float(((error.double() @ gram.double()) * error.double()).sum())
    assert objective(error, gram) == pytest.approx(expected, rel=1e-5)
    assert objective(error.double(), gram.double()) == pytest.approx(expected, rel=1e-12)
    gram[0, n_in - 1] = torch.nan
    assert torch.tensor(objective(error, gram)).isnan(), "a sum that is no number stays one"
